"""Where training rows come from: the files of a source, and their rows one by one, each with its place.

Rows are read line by line by our own reader, because a mistake must be reported with its file, line and column, and
because a library that guesses one schema for all rows invents nulls in the others.
"""

import glob
import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from data.parquet import parquet_rows

Format = Literal["auto", "chat", "sharegpt", "alpaca", "prompt_completion", "text"]
REPORTED_ROWS = 10
# After a bad row, this many more are looked at for others to report with it.
LOOK_AHEAD_ROWS = 100_000


class DataError(ValueError):
    """Data that cannot be trained on: says where it is, what is wrong and what to do."""


class RowError(DataError):
    """One row that cannot be trained on. `reason` is the short name under which it is counted."""

    def __init__(self, reason: str, detail: str, place: str = "") -> None:
        super().__init__(f"{place}: {detail}" if place else detail)
        self.reason = reason
        self.detail = detail

    def at(self, place: str) -> "RowError":
        return RowError(self.reason, self.detail, place)


@dataclass(frozen=True)
class Source:
    """A file, a folder or a glob, and the format of the rows in it."""

    path: str
    format: Format = "auto"


class RawRow(NamedTuple):
    """The columns of one row as the file has them, and its place: `file:line`."""

    place: str
    columns: dict[str, Any]


class BadRows:
    """What to do about rows that cannot be used, and how many there were for each reason."""

    def __init__(self, policy: Literal["stop", "skip"]) -> None:
        self.counts: Counter[str] = Counter()
        self._policy = policy
        self._fatal: list[str] = []
        self._rows_since = 0

    @property
    def stopping(self) -> bool:
        """Whether the run will stop, so that only further mistakes are of interest."""
        return bool(self._fatal)

    def add(self, error: RowError, *, stops: bool | None = None) -> None:
        """Counts a row. `stops` decides about it in place of the policy.

        Raises:
            DataError: enough rows that stop the run are collected to report.
        """
        self.counts[error.reason] += 1
        if self._policy == "stop" if stops is None else stops:
            self._fatal.append(str(error))
        if len(self._fatal) == REPORTED_ROWS:
            self.stop_if_any()

    def looked_at_a_row(self) -> None:
        """Ends the search for further mistakes once it has been long enough."""
        self._rows_since += self.stopping
        if self._rows_since > LOOK_AHEAD_ROWS:
            self.stop_if_any()

    def stop_if_any(self) -> None:
        """Lists the first bad rows, if there were any that stop the run.

        Raises:
            DataError: there were.
        """
        if self._fatal:
            remedy = "correct these rows, or set data.on_bad_row: skip to train without them"
            raise DataError("\n".join([*self._fatal, remedy]))


def source_files(source: Source) -> list[Path]:
    """The files of a source in a fixed order. None is passed over silently, hidden ones excepted.

    Raises:
        DataError: there are none, one cannot be read in this format, or rows and other files are mixed.
    """
    path = Path(source.path).expanduser()
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and not _hidden(p.relative_to(path)))
    else:
        files = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
        if not files and not glob.has_magic(str(path)):
            raise DataError(f"{path}: no such file or folder; correct the path in data.train or data.eval")
    if not files:
        raise DataError(f"{path}: holds no files; correct the path in data.train or data.eval")
    _refuse_unreadable(path, files, source.format)
    return files


def read_rows(path: Path) -> Iterator[RawRow | RowError]:
    """The rows of one file; a row that is not an object comes as the error that says so.

    Raises:
        DataError: the file as a whole is damaged.
    """
    reader = _reader(path) or _read_whole
    try:
        yield from reader(path)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: damaged gzip file ({error}); copy it again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None


def _read_json_lines(path: Path) -> Iterator[RawRow | RowError]:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            place = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line.rstrip(b"\r\n").decode("utf-8"))
            except UnicodeDecodeError as error:
                yield RowError("not UTF-8", f"not UTF-8 ({error.reason})", f"{place}:{error.start + 1}")
            except json.JSONDecodeError as error:
                yield RowError("not JSON", f"not JSON ({error.msg})", f"{place}:{error.colno}")
            except RecursionError:
                yield RowError("not JSON", "nested too deeply", place)
            else:
                yield _object(place, row)


def _read_json(path: Path) -> Iterator[RawRow | RowError]:
    """One list of rows, or rows after one another, each over as many lines as it likes."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start}); convert it") from None
    decoder = json.JSONDecoder()
    in_list = text.lstrip()[:1] == "["
    gap = re.compile(r"\s*,?\s*" if in_list else r"\s*")
    position = _skip(re.compile(r"\s*\[?\s*"), text, 0) if in_list else _skip(gap, text, 0)
    line, counted = 1, 0
    while position < len(text) and not (in_list and text[position] == "]"):
        line, counted = line + text.count("\n", counted, position), position
        try:
            row, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise _broken_json(path, f"{error.lineno}:{error.colno}", error.msg) from None
        except RecursionError:
            raise _broken_json(path, str(line), "nested too deeply") from None
        yield _object(f"{path}:{line}", row)
        position = _skip(gap, text, position)
    if in_list and text[position:].strip() != "]":
        raise _broken_json(path, str(text.count("\n") + 1), "the list of rows does not end with the file")


def _skip(gap: re.Pattern[str], text: str, position: int) -> int:
    found = gap.match(text, position)
    return found.end() if found else position


def _broken_json(path: Path, where: str, what: str) -> DataError:
    return DataError(f"{path}:{where}: not JSON ({what}); correct it, or write one row a line in a .jsonl file")


def _read_parquet(path: Path) -> Iterator[RawRow | RowError]:
    try:
        for number, row in enumerate(parquet_rows(path), start=1):
            yield RawRow(f"{path}: row {number}", row)
    except ValueError as error:
        raise DataError(f"{path}: cannot be read as parquet ({' '.join(str(error).split())}); copy it again") from None


def _read_whole(path: Path) -> Iterator[RawRow | RowError]:
    try:
        yield RawRow(str(path), {"text": path.read_bytes().decode("utf-8")})
    except UnicodeDecodeError as error:
        yield RowError("not UTF-8", f"not UTF-8 (byte {error.start})", str(path))


def _object(place: str, row: Any) -> RawRow | RowError:
    if not isinstance(row, dict):
        return RowError("not an object", f"expected an object with columns, found {type(row).__name__}", place)
    return RawRow(place, row)


def _refuse_unreadable(path: Path, files: list[Path], kind: Format) -> None:
    unreadable = sorted({p.suffix for p in files if not _reader(p) and p.suffix.lower() in UNREADABLE})
    if unreadable:
        raise DataError(
            f"{path}: {', '.join(unreadable)} is not read here; convert to .jsonl or .parquet, or use a glob"
        )
    whole = [p for p in files if not _reader(p)]
    rows = [p for p in files if _reader(p)]
    if whole and kind not in ("auto", "text"):
        raise DataError(f"{whole[0]}: format {kind} needs rows (.jsonl, .jsonl.gz, .json, .parquet); use a glob")
    if whole and rows and kind == "auto":
        names = ", ".join(sorted({p.suffix or p.name for p in whole}))
        raise DataError(
            f"{path}: rows ({rows[0].name}) are mixed with other files ({names}); "
            "name the rows with a glob such as **/*.jsonl, or set format: text to read the others whole"
        )


def _reader(path: Path) -> Callable[[Path], Iterator[RawRow | RowError]] | None:
    name = path.name.lower()
    return next((reader for ending, reader in READERS.items() if name.endswith(ending)), None)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


READERS: dict[str, Callable[[Path], Iterator[RawRow | RowError]]] = {
    ".jsonl": _read_json_lines,
    ".jsonl.gz": _read_json_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
# Containers of rows, archives and arrays: reading their bytes as text would train on noise.
UNREADABLE = {
    *(".csv", ".tsv", ".arrow", ".feather", ".xlsx", ".sqlite", ".pkl", ".bin", ".safetensors", ".npy", ".npz"),
    *(".pt", ".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz", ".7z"),
}
