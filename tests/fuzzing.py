"""Damaged files for every reader, and what a reader may do with them: use the content, or raise an error of ours.

A mutation is drawn by hypothesis from a valid file: values of other types, extreme numbers, missing, renamed and
repeated keys, deep nesting, changed and missing bytes.
"""

import copy
import json
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune.run.failure import is_told, readable

SECONDS_AN_EXAMPLE = 20
MOST_MEMORY_BYTES = 700 << 20  # that the process may grow by while one reader is tested
MANY = 400

# Written into the text in place of a value: what `json.dumps` would not write.
RAW = [
    *("9" * 5000, "-" + "9" * 400, "1e999", "-1e999", "NaN", "Infinity", "1e-999", "0.1e1000000", "-0", "1E400"),
    *("[" * 50_000, '{"a":' * 2000 + "1" + "}" * 2000, "[" * 900 + "]" * 900, "[" * 300 + "]" * 300),
    *('"\\ud800"', '"\\u0000"', '"a\\nb"', '"' + "x" * 70_000 + '"', '""', "{}", "[]", "null", "true", "01", "'a'"),
    *('{"a": 1, "a": 2}', "tru", "/* */ 1"),
]
VALUES: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        3,
        7,
        2**31,
        2**63,
        -(2**63),
        2**64,
        10**9,
        10**18,
        10**30,
        0.5,
        -0.0,
        1.5,
        1e308,
    ),
    *("", "0", "4", "a", "../x", "/etc/passwd", ".", "a\nb", "é", "\u202e", [], [[]], [1], ["a"], [None], {}, {"a": 1}),
    *([{}], "\x00", "true", "None", "[]", "{}", "F32", "BF16", "I8", "float32", "null", " ", "-1", "1e9"),
]


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside `value`, itself included."""
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*at, key))


@st.composite
def changed_json(draw: st.DrawFn, valid: Any, most: int = 3) -> str:
    """`valid` as JSON with up to `most` changes to its structure."""
    value, raw = copy.deepcopy(valid), {}
    for number in range(draw(st.integers(1, most))):
        everywhere = list(places(value))
        near_the_top = [path for path in everywhere if len(path) <= 2]
        path = draw(st.sampled_from(draw(st.sampled_from([everywhere, near_the_top]))))
        change = draw(st.sampled_from(["drop", "value", "value", "raw", "raw", "rename", "wrap", "repeat"]))
        if change == "raw":
            marker = f"@raw{number}@"
            raw[f'"{marker}"'] = draw(st.sampled_from(RAW))
            value = _put(value, path, marker)
        elif change == "value":
            value = _put(value, path, copy.deepcopy(draw(st.sampled_from(VALUES))))
        elif change == "wrap":
            inside = _get(value, path)
            value = _put(value, path, draw(st.sampled_from([[inside], {"a": inside}, str(inside), [inside, inside]])))
        elif path:
            parent, key = _get(value, path[:-1]), path[-1]
            if change == "drop":
                del parent[key]
            elif isinstance(parent, dict) and change == "rename":
                parent[draw(st.sampled_from([f"{key}_", "", "a\nb", "\udc80", str(key).upper()]))] = parent.pop(key)
            elif isinstance(parent, list):
                parent.append(copy.deepcopy(parent[key]))
            else:
                parent[f"@again@{key}"] = copy.deepcopy(draw(st.sampled_from(VALUES)))
    text = json.dumps(value).replace("@again@", "")
    for marker, written in raw.items():
        text = text.replace(marker, written)
    return text


def _get(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def _put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    _get(value, path[:-1])[path[-1]] = new
    return value


@st.composite
def changed_bytes(draw: st.DrawFn, valid: bytes) -> bytes:
    """`valid` with some bytes overwritten, put in or cut off."""
    content = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        change = draw(st.sampled_from(["flip", "cut", "insert", "zeros", "repeat"]))
        if change == "flip" and content:
            content[at] = draw(st.integers(0, 255))
        elif change == "cut":
            del content[at : draw(st.sampled_from([at + 1, at + 8, len(content)]))]
        elif change == "insert":
            odd = [b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\n", b'"', b"{", b"[" * 3000, b"\xed\xa0\x80", b"9" * 5000]
            content[at:at] = draw(st.sampled_from(odd))
        elif change == "zeros":
            content[at : at + 64] = bytes(64)
        else:
            content[at:at] = content[at : at + 200]
    return bytes(content)


def changed_file(valid: Any) -> st.SearchStrategy[bytes]:
    """A JSON file with changes to its structure or its bytes."""
    return st.one_of(
        changed_json(valid).map(lambda text: text.encode("utf-8", "surrogatepass")),
        changed_json(valid, most=1).map(lambda text: text.encode("utf-8", "surrogatepass")),
        changed_bytes(json.dumps(valid).encode()),
    )


def verdict(read: Callable[[], Any], names: str | Path | None) -> Any:
    """What `read` returns, or the error of ours that it raises; anything else that leaves it fails the test.

    Args:
        names: what the message of an error must contain: the path of the damaged file or its folder.
    """
    try:
        with time_limit():
            return read()
    except ValueError as raised:
        if not is_told(raised):
            raise
        error = raised
    message = readable(error)
    assert message.strip(), f"{type(error).__name__} without a message"
    assert "Traceback" not in message
    assert names is None or str(names) in message, f"does not name {names}: {message[:300]}"
    return error


@contextmanager
def time_limit() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise AssertionError(f"hung for {SECONDS_AN_EXAMPLE} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS_AN_EXAMPLE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fuzz(check: Callable[[Any], None], mutated: st.SearchStrategy[Any], examples: int) -> None:
    """Call `check` with so many mutations; the same ones in every run, except where there are many."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    limits = settings(
        max_examples=examples,
        derandomize=examples < MANY,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=True,
    )
    limits(given(mutated)(check))()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < MOST_MEMORY_BYTES, f"the reader grew by {grown >> 20} MiB"


def few_and_many(few: int) -> pytest.MarkDecorator:
    """Run a test with few examples always, and with many when slow tests run."""
    return pytest.mark.parametrize("examples", [few, pytest.param(MANY, marks=pytest.mark.slow)])
