"""A YAML 1.2 reader that records the place of every value, and `--set` overrides of the tree it returns.

Scalars follow the YAML 1.2 core schema (`no` is text, `010` is ten), plus underscores between the digits of integers.
Features with surprising effects are errors: repeated keys, empty values, anchors, merge keys, tags, directives, several
documents. Nothing here depends on the settings of a recipe.
"""

import io
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    NodeEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)

Scalar = str | int | float | bool | None
Plain = Scalar | dict[str, "Plain"] | tuple["Plain", ...]

_NULL = ("null", "Null", "NULL", "~")
_BOOL = {text: text.lower() == "true" for text in ("true", "True", "TRUE", "false", "False", "FALSE")}
_INT = re.compile(r"[-+]?[0-9]+(_[0-9]+)*|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = {sign + word: float(sign + word[1:]) for sign in ("", "+", "-") for word in (".inf", ".Inf", ".INF")} | {
    word: float("nan") for word in (".nan", ".NaN", ".NAN")
}
_LONGEST_NUMBER = 100  # characters; longer scalars are text
_DEEPEST = 20  # levels of nesting
_MOST_BYTES = 1 << 20
_SHOWN_CHARACTERS = 200
_LARGEST = 2**53  # a float64, used in computations of memory and time, is not exact beyond it
_NO_TEXT = re.compile("[\0\ud800-\udfff]")  # escapes in a quoted scalar can produce them


class Place(NamedTuple):
    """The place of a value: a line of a file, or a `--set` argument (line 0)."""

    source: str
    line: int

    @property
    def is_override(self) -> bool:
        """Whether it is a `--set` argument; places in a file have a line."""
        return self.line == 0

    def __str__(self) -> str:
        return f"{self.source}:{self.line}" if self.line else self.source


class Mistake(NamedTuple):
    """One error in a settings file: its place, its dotted key ("" for the whole file), and a sentence."""

    place: Place
    key: str
    sentence: str

    def __str__(self) -> str:
        return f"{self.place}: {self.key}: {self.sentence}" if self.key else f"{self.place}: {self.sentence}"


@dataclass
class Node:
    """A scalar, list or mapping, and the place of its key."""

    value: "Scalar | list[Node] | dict[str, Node]"
    place: Place

    def child(self, key: str) -> "Node | None":
        """The node under `key`, or at that index of a list; None if there is none."""
        if isinstance(self.value, dict):
            return self.value.get(key)
        if isinstance(self.value, list) and key.isdecimal() and int(key) < len(self.value):
            return self.value[int(key)]
        return None

    def at(self, keys: tuple[str, ...]) -> "Node | None":
        """The node under a path of keys; None if there is none."""
        node: Node | None = self
        for key in keys:
            node = node.child(key) if node is not None else None
        return node

    def plain(self) -> Plain:
        """The value without places; lists become tuples."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return tuple(child.plain() for child in self.value)
        return self.value

    def place_of(self, keys: tuple[str | int, ...]) -> Place:
        """The place of `keys`; if missing, that of the nearest enclosing section."""
        node = self
        for key in keys:
            inside = node.child(str(key))
            if inside is None:
                break
            node = inside
        return node.place


def read_file(path: Path) -> tuple[Node | None, list[Mistake]]:
    """Read a settings file; returns its tree, or None if it cannot be read, and the mistakes in it."""
    whole = Place(str(path), 0)
    try:
        status = path.stat()
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):  # reading a FIFO may block forever
            return None, [Mistake(whole, "", "not a regular file; write the settings into one")]
        if status.st_size > _MOST_BYTES:
            return None, [Mistake(whole, "", f"has {status.st_size:,} bytes, too many for a file of settings")]
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return None, [Mistake(whole, "", "no such file")]
    except UnicodeDecodeError as error:
        return None, [Mistake(whole, "", f"not UTF-8 text (byte {error.start}); save the file as UTF-8")]
    except OSError as error:
        return None, [Mistake(whole, "", f"cannot be read ({error.strerror})")]
    mistakes: list[Mistake] = []
    node = _read_text(text, Place(str(path), 1), mistakes)
    if node is not None and not isinstance(node.value, dict):
        mistakes.append(Mistake(node.place, "", "expected sections such as 'model:' and 'train:' at the top level"))
    return (node if node is not None and isinstance(node.value, dict) else None), mistakes


def apply_overrides(root: Node, assignments: Sequence[str], mistakes: list[Mistake]) -> None:
    """Apply `section.key=value` assignments to the tree; values are YAML, list items are numbered from 0.

    The last of several assignments to the same key counts.
    """
    last: dict[str, str] = {}
    for assignment in assignments:
        key = assignment.partition("=")[0].strip()
        last.pop(key, None)  # so that it is also applied in the order of its last occurrence
        last[key] = assignment
    for assignment in last.values():
        _apply_override(root, assignment, mistakes)


def leave_out(plain: dict[str, Plain], keys: tuple[str | int, ...]) -> None:
    """Delete the value at `keys`; for an item of a list, the whole list."""
    inside = plain
    for key in keys:
        assert isinstance(key, str)
        child = inside.get(key)
        if not isinstance(child, dict) or key == keys[-1]:
            inside.pop(key, None)
            return
        inside = child


def touches(key: str, other: str) -> bool:
    """Whether one of two dotted keys contains the other."""
    return key == other or key.startswith(f"{other}.") or other.startswith(f"{key}.")


def write(values: dict[str, Any]) -> str:
    """Values as YAML text; `read_file` of it gives the same values."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # typed as None
    yaml.width = 120
    text = io.StringIO()
    yaml.dump(values, text)
    return text.getvalue()


def scalar(text: str) -> Scalar:
    """The value of an unquoted YAML scalar."""
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if text in _NOT_FINITE:
        return _NOT_FINITE[text]
    if len(text) > _LONGEST_NUMBER:
        return text
    if _INT.fullmatch(text):
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
    return float(text) if _FLOAT.fullmatch(text) else text


def _apply_override(root: Node, assignment: str, mistakes: list[Mistake]) -> None:
    shown = assignment.encode("utf-8", "backslashreplace").decode()
    shown = shown if len(shown) <= _SHOWN_CHARACTERS else f"{shown[:_SHOWN_CHARACTERS]}..."
    place = Place(f"--set {shown}", 0)
    dotted, equals, text = assignment.partition("=")
    dotted = dotted.strip()
    if _NO_TEXT.search(assignment):
        mistakes.append(Mistake(place, "", "is not UTF-8 text"))
        return
    if not equals or not all(dotted.split(".")):
        mistakes.append(Mistake(place, "", "expected key=value, such as optim.lr=1e-4"))
        return
    found_before = len(mistakes)
    value = _read_text(text, place, mistakes, key=dotted)
    if value is None or len(mistakes) > found_before:
        return
    node, walked = root, ""
    for key in dotted.split(".")[:-1]:
        walked = f"{walked}.{key}" if walked else key
        child = node.child(key)
        if child is None and isinstance(node.value, dict):
            child = node.value[key] = Node({}, place)
        elif child is not None and child.value is None:
            child.value, child.place = {}, place
        if child is None or not isinstance(child.value, dict | list):
            mistakes.append(Mistake(place, dotted, f"{walked} has nothing inside it to set"))
            return
        node = child
    last = dotted.rpartition(".")[2]
    if isinstance(node.value, dict):
        node.value[last] = value
    elif isinstance(node.value, list) and node.child(last) is not None:
        node.value[int(last)] = value
    else:
        mistakes.append(Mistake(place, dotted, f"the list has no item {last}; its items are numbered from 0"))


def _read_text(text: str, start: Place, mistakes: list[Mistake], key: str = "") -> Node | None:
    """The tree of YAML text; None, with one more mistake, if it cannot be read."""
    events = YAML(typ="safe", pure=True).parse(text)
    root: Node | None = None
    try:
        for event in events:
            if isinstance(event, DocumentStartEvent):
                place = _place(event, start)
                if root is not None:
                    raise _Unreadable(Mistake(place, key, "a second document starts here; a recipe is one"))
                if event.version or event.tags:
                    raise _Unreadable(Mistake(place, key, "directives (%YAML, %TAG) are not read; delete them"))
                first = next(events)
                root = _compose(events, first, _place(first, start), start, mistakes, (key,) if key else ())
    except _Unreadable as error:
        mistakes.append(error.mistake)
        return None
    except MarkedYAMLError as error:
        line = error.problem_mark.line if error.problem_mark else 0
        mistakes.append(Mistake(_at_line(line, start), key, _what_is_unreadable(text, line, error.problem or "")))
        return None
    except YAMLError:  # a character that YAML forbids; the error gives a character offset, not a line
        mistakes.append(Mistake(start, key, "holds a control character that YAML does not allow; delete it"))
        return None
    if root is None:
        mistakes.append(Mistake(start, key, "is empty"))
    return root


class _Unreadable(Exception):  # noqa: N818  (never leaves this file)
    def __init__(self, mistake: Mistake):
        self.mistake = mistake


def _compose(
    events: Iterator[Event], event: Event, place: Place, start: Place, mistakes: list[Mistake], keys: tuple[str, ...]
) -> Node:
    """The node that starts at `event`; consumes its events from `events`. `place` is that of its key."""
    dotted = ".".join(keys)
    if len(keys) > _DEEPEST:
        raise _Unreadable(Mistake(place, "", f"nested more than {_DEEPEST} levels deep"))
    if isinstance(event, AliasEvent) or (isinstance(event, NodeEvent) and event.anchor is not None):
        mistakes.append(Mistake(place, dotted, "anchors (&) and aliases (*) are not read; write the value out"))
    if isinstance(event, ScalarEvent | SequenceStartEvent | MappingStartEvent) and event.tag is not None:
        mistakes.append(Mistake(place, dotted, "tags (!) are not read; delete it"))
    if isinstance(event, MappingStartEvent):
        return Node(_mapping(events, start, mistakes, keys), place)
    if isinstance(event, SequenceStartEvent):
        items: list[Node] = []
        while not isinstance(event := next(events), SequenceEndEvent):
            items.append(_compose(events, event, _place(event, start), start, mistakes, (*keys, str(len(items)))))
        return Node(items, place)
    if not isinstance(event, ScalarEvent):
        return Node(None, place)  # an alias, reported above
    if _NO_TEXT.search(event.value):
        mistakes.append(Mistake(place, dotted, "holds half of a surrogate pair or a NUL character, which is no text"))
        return Node(None, place)
    if event.style is not None:
        return Node(event.value, place)  # quoted scalars are always text
    if not event.value:
        mistakes.append(Mistake(place, dotted, "has no value; write one (null if nothing is meant) or delete the line"))
    value = scalar(event.value)
    if isinstance(value, int) and abs(value) > _LARGEST:
        mistakes.append(Mistake(place, dotted, f"{event.value} is larger than any setting may be"))
        return Node(None, place)
    return Node(value, place)


def _mapping(events: Iterator[Event], start: Place, mistakes: list[Mistake], keys: tuple[str, ...]) -> dict[str, Node]:
    children: dict[str, Node] = {}
    while not isinstance(event := next(events), MappingEndEvent):
        place = _place(event, start)
        if not isinstance(event, ScalarEvent):
            raise _Unreadable(Mistake(place, ".".join(keys), "a key must be a single word"))
        name = event.value
        if _NO_TEXT.search(name):
            raise _Unreadable(Mistake(place, ".".join(keys), f"the key {name!r} is no text"))
        dotted = ".".join((*keys, name))
        child = _compose(events, next(events), place, start, mistakes, (*keys, name))
        if name == "<<":
            mistakes.append(Mistake(place, dotted, "merge keys are not read; write the settings out"))
        elif name in children:
            mistakes.append(Mistake(place, dotted, f"set before, on line {children[name].place.line}; keep one"))
        else:
            children[name] = child
    return children


def _place(event: Event, start: Place) -> Place:
    return _at_line(event.start_mark.line, start)


def _at_line(line: int, start: Place) -> Place:
    """The place of a line counted from 0; everything in a `--set` argument has the same place."""
    return Place(start.source, start.line + line) if start.line else start


def _what_is_unreadable(text: str, line: int, problem: str) -> str:
    lines = text.splitlines()
    if line < len(lines) and "\t" in lines[line]:
        return "holds a tab; YAML wants spaces"
    return f"not readable as YAML ({problem}); look at the colons, quotes, brackets and indentation here and just above"
