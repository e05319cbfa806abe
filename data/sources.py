"""The files of a data source, and their rows one by one, each with its place.

Rows are read by our own reader: an error must name file, line and column, and a library that infers one schema for all
rows adds nulls to them.
"""

import glob
import gzip
import io
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, cast

from data.json_stream import MOST_ROW_BYTES, TOO_LONG, bounded_lines, json_values
from monitoring.file_search import SearchError, files_below, matches
from monitoring.json_file import FileError, FormError, kind_of, load_text, open_regular, reason

Format = Literal["auto", "chat", "sharegpt", "alpaca", "prompt_completion", "text"]
REPORTED_ROWS = 10
LONGEST_DETAIL = 500  # characters
# After the first bad row, at most this many rows are searched for more of them to report.
LOOK_AHEAD_ROWS = 100_000


class DataError(ValueError):
    """Data that cannot be trained on; the message says where it is, what is wrong and what to do."""


class RowError(DataError):
    """One row that cannot be trained on. `reason` is the short name by which such rows are counted."""

    def __init__(self, reason: str, detail: str, place: str = "") -> None:
        detail = " ".join(detail.split("\n"))  # it may quote the row
        detail = detail if len(detail) <= LONGEST_DETAIL else f"{detail[:LONGEST_DETAIL]}..."
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
    """The columns of one row as in the file, and its place, `file:line`."""

    place: str
    columns: dict[str, Any]


class BadRows:
    """Counts unusable rows by reason, and stops the run where the policy says so."""

    def __init__(self, policy: Literal["stop", "skip"]) -> None:
        self.counts: Counter[str] = Counter()
        self._policy = policy
        self._fatal: list[str] = []
        self._rows_since = 0
        self.rows_seen = 0  # from the sources, usable or not

    @property
    def stopping(self) -> bool:
        """Whether the run will stop; the search then only continues to report more errors."""
        return bool(self._fatal)

    def add(self, error: RowError, *, stops: bool | None = None) -> None:
        """Count an unusable row. `stops`, if not None, overrides the policy.

        Raises:
            DataError: `REPORTED_ROWS` rows that stop the run have been collected.
        """
        self.counts[error.reason] += 1
        if self._policy == "stop" if stops is None else stops:
            self._fatal.append(str(error))
        if len(self._fatal) == REPORTED_ROWS:
            self.stop_if_any()

    def looked_at_a_row(self) -> None:
        """Count a row of the sources; `LOOK_AHEAD_ROWS` after a fatal bad row, end the search for more of them."""
        self.rows_seen += 1
        self._rows_since += self.stopping
        if self._rows_since > LOOK_AHEAD_ROWS:
            self.stop_if_any()

    def stop_if_any(self) -> None:
        """Stop the run if any row requires it.

        Raises:
            DataError: lists the first bad rows.
        """
        if self._fatal:
            remedy = "correct these rows, or set data.on_bad_row: skip to train without them"
            raise DataError("\n".join([*self._fatal, remedy]))


def source_files(source: Source) -> list[Path]:
    """The files of a source in a fixed order. Hidden files are ignored. Any other file that cannot be read is an error.

    Raises:
        DataError: no files, a file that cannot be read in this format, or a mixture of row files and other files.
    """
    path = Path(source.path).expanduser()
    files: list[Path] | None = None
    try:
        if path.is_dir():
            files = sorted(files_below(path))
        elif os.path.lexists(path):
            files = [path]
        elif glob.has_magic(str(path)):
            files = sorted(set(matches(str(path))))
    except SearchError as error:
        raise DataError(f"{error}; correct the path in data.train or data.eval") from None
    except (OSError, ValueError) as error:  # a name that is too long or contains NUL
        raise DataError(f"{str(path)[:200]}: is no path ({reason(error)}); correct it") from None
    if files is None:
        raise DataError(f"{path}: no such file or folder; correct the path in data.train or data.eval")
    if not files:
        raise DataError(f"{path}: holds no files; correct the path in data.train or data.eval")
    _refuse_unreadable(path, files, source.format)
    for file in files:
        _refuse_special(file)
    return files


def read_rows(path: Path) -> Iterator[RawRow | RowError]:
    """The rows of one file; a row that is not an object is returned as a RowError.

    Raises:
        DataError: the file as a whole is damaged.
    """
    reader = _reader(path) or _read_whole
    try:
        yield from reader(path)
    except FormError as error:
        raise DataError(
            f"{path}{_where(error)}: {error}; correct it, or write one row a line in a .jsonl file"
        ) from None
    except FileError as error:
        raise DataError(str(error)) from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: damaged gzip file ({error}); copy it again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None


def _read_json_lines(path: Path) -> Iterator[RawRow | RowError]:
    with _opened(path) as file:
        for number, line in bounded_lines(file):
            place = f"{path}:{number}"
            if line is None:
                yield RowError("too long", TOO_LONG, place)
                continue
            try:
                row = load_text(line.rstrip(b"\r\n").decode("utf-8"), unique_keys=True, half_characters=True)
            except UnicodeDecodeError as error:
                yield RowError("not UTF-8", f"not UTF-8 ({error.reason})", f"{place}:{error.start + 1}")
            except FormError as error:
                yield RowError("not JSON", str(error), f"{place}:{error.column}" if error.column else place)
            else:
                yield _object(place, row)


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a regular file, decompressed if its name ends in .gz."""
    with open_regular(path) as raw, io.BufferedReader(cast(io.RawIOBase, raw)) as file:
        if path.suffix.lower() != ".gz":
            yield file
            return
        with gzip.open(file) as unpacked:
            yield cast(IO[bytes], unpacked)


def _read_json(path: Path) -> Iterator[RawRow | RowError]:
    """A list of rows, or rows one after another; a row may span several lines."""
    with _opened(path) as file:
        for line, row in json_values(file):
            yield _object(f"{path}:{line}", row)


def _read_parquet(path: Path) -> Iterator[RawRow | RowError]:
    from data.parquet import parquet_rows  # pyarrow and datasets take a second to import

    try:
        for number, row in enumerate(parquet_rows(path), start=1):
            place = f"{path}: row {number}"
            yield RowError("too long", TOO_LONG, place) if row is None else RawRow(place, row)
    except FileError:
        raise
    except ValueError as error:
        raise DataError(f"{path}: cannot be read as parquet ({' '.join(str(error).split())}); copy it again") from None


def _read_whole(path: Path) -> Iterator[RawRow | RowError]:
    with _opened(path) as file:
        content = file.read(MOST_ROW_BYTES + 1)
    if len(content) > MOST_ROW_BYTES:
        yield RowError("too long", TOO_LONG, str(path))
        return
    try:
        yield RawRow(str(path), {"text": content.decode("utf-8")})
    except UnicodeDecodeError as error:
        yield RowError("not UTF-8", f"not UTF-8 (byte {error.start})", str(path))


def _object(place: str, row: Any) -> RawRow | RowError:
    if not isinstance(row, dict):
        return RowError("not an object", f"expected an object with columns, found {kind_of(row)}", place)
    return RawRow(place, row)


def _where(error: FormError) -> str:
    return "".join(f":{number}" for number in (error.line, error.column) if number)


def _refuse_special(path: Path) -> None:
    try:
        open_regular(path).close()
    except FileError as error:
        raise DataError(f"{error}; leave it out with a glob, or correct the path") from None


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


READERS: dict[str, Callable[[Path], Iterator[RawRow | RowError]]] = {
    ".jsonl": _read_json_lines,
    ".jsonl.gz": _read_json_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
# Row containers, archives and arrays: their bytes, read as text, would be noise.
UNREADABLE = {
    *(".csv", ".tsv", ".arrow", ".feather", ".xlsx", ".sqlite", ".pkl", ".bin", ".safetensors", ".npy", ".npz"),
    *(".pt", ".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz", ".7z"),
}
