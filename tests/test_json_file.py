"""Whatever a file holds or is, reading it gives a value or one sentence; nothing waits, and no library error leaves."""

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monitoring.json_file import FileError, MissingFileError, parse_json, read_bytes, read_json, read_object


def nested(depth: int, inner: str = "1") -> str:
    return "[" * depth + inner + "]" * depth


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"", "f.json:1:1: not JSON (Expecting value)"),
        (b'{"a":\n 1', "f.json:2:3: not JSON (Expecting ',' delimiter)"),
        (b'{"a": "\xff"}', "f.json:1: not UTF-8 (byte 7)"),
        (b'\n\n"\xc3"', "f.json:3: not UTF-8 (byte 3)"),
        (nested(101).encode(), "f.json: nested more than 100 deep"),
        (nested(100_000).encode(), "f.json: nested more than 100 deep"),
        (b'{"a":' * 100_000, "f.json: nested more than 100 deep"),
        (b'{"layers": ' + b"9" * 5000 + b"}", "f.json: holds a number of 5,000 digits (99999999...)"),
        (b"-1" + b"0" * 400, "f.json: holds a number of 402 digits (-1000000...)"),
        (rb'{"\ud800": 1}', "f.json: holds half of a surrogate pair, which is no character"),
        (rb'["\uDFFF"]', "f.json: holds half of a surrogate pair, which is no character"),
        (b'{"a": 1, "b": 2, "a": 3}', "f.json: has the key 'a' twice"),
    ],
)
def test_a_text_that_is_not_what_a_reader_expects_is_one_sentence(contents: bytes, message: str) -> None:
    with pytest.raises(FileError) as caught:
        parse_json(contents, "f.json", unique_keys=True)
    assert str(caught.value) == message


def test_what_is_allowed_is_read_as_python_reads_it() -> None:
    for text in (
        nested(100),
        '{"a": "\\ud83d\\ude42", "b": [1e3, -0.5, null, true]}',
        "7",
        '{"a": 1, "a": 2}',
        "9" * 290,
    ):
        assert parse_json(text.encode(), "f.json") == json.loads(text)


def unix_socket(path: Path) -> None:
    """Bound by its relative name: an absolute one may be too long."""
    before = Path.cwd()
    os.chdir(path.parent)
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(before)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: os.mkfifo(path), "is a FIFO, not a regular file"),
        (lambda path: path.mkdir(), "is a folder, not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "is a device, not a regular file"),
        (unix_socket, "is a socket, not a regular file"),
        (lambda path: path.symlink_to(path), "cannot be read (Too many levels of symbolic links)"),
        (lambda path: path.write_bytes(b" " * 2000), "has 2,000 bytes, more than the 1,000 that such a file may have"),
    ],
    ids=["fifo", "folder", "device", "socket", "loop", "large"],
)
def test_what_is_not_a_readable_file_is_named_at_once(
    tmp_path: Path, make: Callable[[Path], None], message: str
) -> None:
    path = tmp_path / "f.json"
    make(path)
    with pytest.raises(FileError) as caught:
        read_json(path, 1000)
    assert str(caught.value) == f"{path}: {message}"


def test_missing_files_are_told_apart(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path / "nowhere/f.json"):
        with pytest.raises(MissingFileError, match="no such file"):
            read_json(path)
    with pytest.raises(FileError, match="cannot be read"):
        read_json(tmp_path / ("n" * 300))
    with pytest.raises(FileError, match="cannot be read"):
        read_json(Path("nul\0byte"))


def test_a_link_to_a_file_is_followed(tmp_path: Path) -> None:
    """A hub cache is made of links that leave the folder."""
    (tmp_path / "blobs").write_text('{"a": 1}')
    (tmp_path / "f.json").symlink_to("blobs")
    assert read_object(tmp_path / "f.json") == {"a": 1}
    (tmp_path / "blobs").write_text("[1]")
    with pytest.raises(FileError, match=r"f\.json: holds a list where an object is expected"):
        read_object(tmp_path / "f.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=150, deadline=None)
@given(
    st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()),
    st.binary(max_size=4),
    st.integers(0, 300),
)
def test_only_our_own_error_leaves_the_reader(contents: bytes, inserted: bytes, place: int) -> None:
    damaged = contents[:place] + inserted + contents[place:]
    try:
        value = parse_json(damaged, "f.json")
    except FileError as error:
        assert str(error).startswith("f.json")  # noqa: PT017
        assert "\n" not in str(error)  # noqa: PT017
    else:
        json.dumps(value, ensure_ascii=False).encode()


def test_contents_are_those_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(range(256)) * 1000)
    assert read_bytes(tmp_path / "f") == bytes(range(256)) * 1000
