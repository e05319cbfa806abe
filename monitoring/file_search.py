"""Bounded search for files in a folder or by pattern; each real folder is visited once, hidden names are skipped."""

import fnmatch
import glob
import os
from collections.abc import Iterator
from pathlib import Path

MOST_ENTRIES = 1_000_000


class SearchError(ValueError):
    """A folder that cannot be searched; the message says which and why."""


def files_below(folder: Path) -> Iterator[Path]:
    """Every path below a folder that is not a folder, without hidden names.

    Raises:
        SearchError: a folder cannot be read, or there are more than `MOST_ENTRIES` entries.
    """
    return _Search(str(folder)).entries(folder, ["**"])


def matches(pattern: str) -> Iterator[Path]:
    """Every path that matches a pattern of `*`, `?`, `[...]` and `**`, except folders.

    Like `glob.iglob` with `recursive=True`, but links to a parent folder are followed only once, so the search ends.

    Raises:
        SearchError: a folder cannot be read, or there are more than `MOST_ENTRIES` entries.
    """
    path = Path(pattern)
    parts = [part for part in path.parts if part != path.anchor]
    fixed = next((number for number, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    return _Search(pattern).entries(Path(path.anchor, *parts[:fixed]), parts[fixed:])


class _Search:
    """One search, which counts the entries it has seen; `what` names it in messages."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._seen = 0

    def entries(self, folder: Path, parts: list[str]) -> Iterator[Path]:
        if "**" in parts and os.path.realpath(folder) == "/":
            raise SearchError(f"{self._what}: means every file of this machine; name a folder")
        return self._entries(folder, parts)

    def _entries(self, folder: Path, parts: list[str]) -> Iterator[Path]:
        """The paths below `folder` that match `parts`."""
        if not parts:
            if os.path.lexists(folder) and not folder.is_dir():
                yield folder
        elif parts[0] == "**":
            rest = [part for number, part in enumerate(parts) if part != "**" or parts[number - 1 : number] != ["**"]]
            for place in self._folders(folder):
                yield from self._entries(place, rest[1:] or ["*"])
        elif glob.has_magic(parts[0]):
            for entry in self._scan(folder):
                if fnmatch.fnmatchcase(entry.name, parts[0]) and not _is_hidden(entry.name, parts[0]):
                    yield from self._entries(folder / entry.name, parts[1:])
        else:
            yield from self._entries(folder / parts[0], parts[1:])

    def _folders(self, top: Path) -> Iterator[Path]:
        """`top` and all folders below it, each real folder once, whatever the number of links to it."""
        known, waiting = set(), [top] if top.is_dir() else []
        while waiting:
            folder = waiting.pop()
            try:
                found = folder.stat()
            except OSError as error:
                raise SearchError(f"{folder}: cannot be read ({error.strerror})") from None
            if (found.st_dev, found.st_ino) not in known:
                known.add((found.st_dev, found.st_ino))
                yield folder
                waiting += [folder / entry.name for entry in self._scan(folder) if _is_folder(entry)]

    def _scan(self, folder: Path) -> list["os.DirEntry[str]"]:
        try:
            with os.scandir(folder) as found:
                entries = list(found)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise SearchError(f"{folder}: cannot be read ({error.strerror})") from None
        self._seen += len(entries)
        if self._seen > MOST_ENTRIES:
            raise SearchError(
                f"{self._what}: means more than {MOST_ENTRIES:,} files and folders; name a smaller folder"
            )
        return entries


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return not entry.name.startswith(".") and entry.is_dir()
    except OSError:  # a link to itself; opening it will report the error
        return False


def _is_hidden(name: str, pattern: str) -> bool:
    return name.startswith(".") and not pattern.startswith(".")
