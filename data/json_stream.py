"""Iteration over the lines or JSON values of a file, each of bounded size, so that no file can exhaust the memory."""

import codecs
import json
import re
from collections.abc import Iterator
from typing import IO, Any

from monitoring.json_file import STRICT_DECODER, TOO_DEEP, FormError, is_deep

MOST_ROW_BYTES = 64 << 20
TOO_LONG = f"longer than {MOST_ROW_BYTES >> 20} MiB, the most that one row may have; split it"
_MOST_SKIPPED_BYTES = 1 << 30  # of one line; a gzip file of 1 MB can expand to that much
_MOST_BLANK_LINES = 1_000_000
_CHUNK_BYTES = 1 << 20
_SPACE = re.compile(r"[ \t\n\r]*")
# `raw_decode` reports the start of an incomplete literal, at most this far before the end of the text.
_LONGEST_LITERAL = 512


def bounded_lines(file: IO[bytes]) -> Iterator[tuple[int, bytes | None]]:
    """The non-blank lines of a file with their numbers; a line above `MOST_ROW_BYTES` is returned as None.

    Raises:
        FormError: a line exceeds one GiB, or there are more than a million blank lines.
    """
    number = blank = 0
    while line := file.readline(MOST_ROW_BYTES + 1):
        number += 1
        if len(line) > MOST_ROW_BYTES and not line.endswith(b"\n"):
            del line
            _skip_line(file, number)
            yield number, None
        elif line.isspace():
            blank += 1
            if blank > _MOST_BLANK_LINES:
                raise FormError(f"holds {blank:,} blank lines; it is not a file of rows", number)
        else:
            yield number, line


def _skip_line(file: IO[bytes], number: int) -> None:
    skipped = 0
    while part := file.readline(_CHUNK_BYTES):
        skipped += len(part)
        if part.endswith(b"\n"):
            return
        if skipped > _MOST_SKIPPED_BYTES:
            raise FormError(f"has no end within {_MOST_SKIPPED_BYTES >> 30} GiB; it is not a row", number)


def json_values(file: IO[bytes]) -> Iterator[tuple[int, Any]]:
    """The values of a list, or a sequence of values, each with the line on which it starts.

    Raises:
        FormError: a value is not JSON, or exceeds `MOST_ROW_BYTES`.
    """
    window = _Window(file)
    in_list = window.next_character() == "["
    if in_list:
        window.position += 1
    while (character := window.next_character()) and not (in_list and character == "]"):
        line, value = window.value()
        yield line, value
        if in_list and window.next_character() == ",":
            window.position += 1
    if in_list:
        window.position += character == "]"
        if not character or window.next_character():
            raise window.fault("not JSON (the list of rows does not end with the file)")


class _Window:
    """The part of a text that is being parsed: parsed text is discarded, further text is read on demand."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._text = ""
        self.position = 0
        self._line, self._counted = 1, 0
        self._line_start = 0  # start of the current line, relative to `_text`
        self._ended = False

    def next_character(self) -> str:
        """The next character that is not white space, without consuming it; "" at the end."""
        while True:
            found = _SPACE.match(self._text, self.position)
            assert found is not None
            self.position = found.end()
            if self.position < len(self._text):
                return self._text[self.position]
            if not self._more():
                return ""

    def value(self) -> tuple[int, Any]:
        """Parse the value at the current position; returns its line and the value."""
        while True:
            try:
                value, end = STRICT_DECODER.raw_decode(self._text, self.position)
            except json.JSONDecodeError as error:
                after = error.pos - self.position
                unfinished = error.msg.startswith("Unterminated") or error.pos > len(self._text) - _LONGEST_LITERAL
                if unfinished and self._more():
                    continue
                raise self.fault(f"not JSON ({error.msg})", self.position + after) from None
            except RecursionError:
                raise self.fault(TOO_DEEP) from None
            except FormError as error:
                raise self.fault(str(error)) from None
            # A number may continue in the part that has not been read yet.
            if end == len(self._text) and self._text[end - 1] not in '}]"' and self._more():
                continue
            if is_deep(value):
                raise self.fault(TOO_DEEP)
            line = self._count(self.position)
            self.position = end
            return line, value

    def fault(self, what: str, at: int | None = None) -> FormError:
        """A FormError with the line and column of a position."""
        at = self.position if at is None else at
        line = self._count(at)
        return FormError(what, line, at - self._line_start + 1)

    def _count(self, position: int) -> int:
        """The line of a position; positions must be queried in ascending order."""
        newlines = self._text.count("\n", self._counted, position)
        if newlines:
            self._line += newlines
            self._line_start = self._text.rindex("\n", self._counted, position) + 1
        self._counted = max(self._counted, position)
        return self._line

    def _more(self) -> bool:
        """Read as much again as is held, so that a value is parsed only a few times; returns False at the end."""
        if self._ended:
            return False
        if len(self._text) - self.position > MOST_ROW_BYTES:
            raise self.fault(TOO_LONG)
        self._count(self.position)
        self._text = self._text[self.position :]
        self._counted -= self.position
        self._line_start -= self.position
        self.position = 0
        block = self._file.read(max(_CHUNK_BYTES, len(self._text)))
        try:
            self._text += self._decode(block, not block)
        except UnicodeDecodeError as error:
            line = self._count(len(self._text)) + error.object[: error.start].count(b"\n")
            raise FormError(f"not UTF-8 ({error.reason})", line) from None
        self._ended = not block
        return not self._ended
