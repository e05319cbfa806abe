"""Reading of untrusted files: regular files only, of bounded size, with every error as one sentence with its place.

`open` of a FIFO blocks forever. `json.loads` raises RecursionError for deep nesting and a plain ValueError for an
integer of 5,000 digits; it accepts repeated keys, and half of a surrogate pair, which a later `print` cannot encode.
"""

import json
import os
import re
import stat
from pathlib import Path
from typing import IO, Any

MOST_BYTES = 256 << 20  # a tokenizer.json of 250,000 tokens has 20 MB
MOST_DEPTH = 100
TOO_DEEP = f"nested more than {MOST_DEPTH} deep"
_MOST_DIGITS = 300  # the largest float64 has 309; Python refuses to parse more than 4,300

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_LONG_NUMBER = re.compile(rf"[0-9]{{{_MOST_DIGITS}}}")


class FileError(ValueError):
    """A file that cannot be read; the message says which, where in it, and what is wrong."""


class MissingFileError(FileError):
    """A file that does not exist."""


class FormError(ValueError):
    """Text that is not JSON, or rejected JSON; line and column count from 1, and are 0 if unknown."""

    def __init__(self, what: str, line: int = 0, column: int = 0) -> None:
        super().__init__(what)
        self.line, self.column = line, column


def open_regular(path: Path) -> IO[bytes]:
    """Open a regular file, or a link to one, for unbuffered reading; anything else is an error.

    Raises:
        FileError: no such file, no permission, or a folder, FIFO, socket or device.
    """
    try:
        _refuse_special(path, os.stat(path).st_mode)  # checked first, since opening a device may have effects
        file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=0)  # noqa: SIM115
        _refuse_special(path, os.fstat(file.fileno()).st_mode)
    except FileNotFoundError:
        raise MissingFileError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"{path}: cannot be read ({reason(error)})") from error
    return file


def read_bytes(path: Path, most_bytes: int = MOST_BYTES) -> bytes:
    """The contents of a regular file.

    Raises:
        FileError: it cannot be opened or read, or exceeds `most_bytes`.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most_bytes:
            raise FileError(f"{path}: has {size:,} bytes, more than the {most_bytes:,} that such a file may have")
        try:
            contents = bytearray()
            while block := file.read(most_bytes + 1 - len(contents)):  # the file may grow meanwhile
                contents += block
        except OSError as error:
            raise FileError(f"{path}: cannot be read ({reason(error)})") from error
    if len(contents) > most_bytes:
        raise FileError(f"{path}: has more than the {most_bytes:,} bytes that such a file may have")
    return bytes(contents)


def read_json(path: Path, most_bytes: int = MOST_BYTES, *, unique_keys: bool = False) -> Any:
    """The value in a JSON file.

    Args:
        unique_keys: reject objects with repeated keys; otherwise the last one counts, as in other parsers.

    Raises:
        FileError: the file cannot be read, is not JSON or exceeds the limits of `parse_json`.
    """
    return parse_json(read_bytes(path, most_bytes), str(path), unique_keys=unique_keys)


def read_object(path: Path, most_bytes: int = MOST_BYTES) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileError: the file cannot be read, is not JSON, or holds another type at the top level.
    """
    value = read_json(path, most_bytes)
    if not isinstance(value, dict):
        raise FileError(f"{path}: holds {kind_of(value)} where an object is expected")
    return value


def parse_json(contents: bytes, place: str, *, unique_keys: bool = False) -> Any:
    """Parse JSON in UTF-8; nesting is limited to `MOST_DEPTH`, and integers to `_MOST_DIGITS`.

    Args:
        place: name of the text in messages.

    Raises:
        FileError: invalid text; the message says where.
    """
    try:
        text = contents.decode("utf-8")
    except UnicodeDecodeError as error:
        line = contents.count(b"\n", 0, error.start) + 1
        raise FileError(f"{place}:{line}: not UTF-8 (byte {error.start})") from None
    try:
        return load_text(text, unique_keys=unique_keys)
    except FormError as error:
        where = f":{error.line}:{error.column}" if error.line else ""
        raise FileError(f"{place}{where}: {error}") from None


def load_text(text: str, *, unique_keys: bool = False, half_characters: bool = False) -> Any:
    """Parse a JSON text within the limits of `parse_json`.

    Args:
        half_characters: accept half of a surrogate pair, for callers that check the text they use.

    Raises:
        FormError: invalid text.
    """
    try:
        value = json.loads(
            text,
            parse_int=_integer if _LONG_NUMBER.search(text) else None,
            object_pairs_hook=_unique if unique_keys else None,
        )
    except json.JSONDecodeError as error:
        raise FormError(f"not JSON ({error.msg})", error.lineno, error.colno) from None
    except RecursionError:
        raise FormError(TOO_DEEP) from None
    if is_deep(value):
        raise FormError(TOO_DEEP)
    if not half_characters and _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise FormError("holds half of a surrogate pair, which is no character") from None
    return value


def kind_of(value: Any) -> str:
    """The name of a value's JSON type."""
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), "null")


def reason(error: Exception) -> str:
    """The system's message for an error, without the path."""
    return getattr(error, "strerror", None) or str(error)


def _refuse_special(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "special")
        raise FileError(f"{path}: is {kind}, not a regular file")


def _integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise FormError(f"holds a number of {len(digits):,} digits ({digits[:8]}...)")
    return int(digits)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise FormError(f"has the key {twice[:80]!r} twice")
    return value


def is_deep(value: Any) -> bool:
    """Whether lists and objects are nested more than `MOST_DEPTH` deep."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MOST_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


# For a sequence of values in one text; the caller checks their depth.
STRICT_DECODER = json.JSONDecoder(parse_int=_integer, object_pairs_hook=_unique)
