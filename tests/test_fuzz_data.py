"""Damaged rows of every format, chat templates and tokenised data: refused with their place, or trained as they are."""

import copy
import gzip
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import strategies as st

from data.chat import ChatTemplate, encode, pieces_of
from data.formats import Conversation, read_columns, read_contents
from data.sources import BadRows, Format, RowError, Source
from data.tokenizer import Tokenizer
from tests.fuzzing import changed_bytes, changed_file, changed_json, few_and_many, fuzz, verdict
from tests.test_chat import AGENT_TEMPLATE, with_template

BASE = Path(__file__).resolve().parent.parent / "recipes/base"
CALL = {"type": "function", "function": {"name": "run", "arguments": {"command": "ls", "n": 1.5}}}
TURNS = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": [{"type": "text", "text": "Q"}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning": "why"},
    {"role": "tool", "content": "out", "name": "run"},
    {"role": "assistant", "content": "A", "weight": 1},
]
TOOLS = [{"type": "function", "function": {"name": "run", "parameters": {"type": "object", "properties": {}}}}]
ROWS: list[dict[str, Any]] = [
    {"messages": TURNS, "tools": TOOLS},
    {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}], "system": "S"},
    {"conversations": [{"from": "human", "value": "Q"}, {"from": "function_call", "value": json.dumps(CALL)}]},
    {"instruction": "Q", "input": "I", "output": "A", "history": [["q", "a"]]},
    {"prompt": "P", "completion": "C"},
    {"prompt": TURNS[:2], "completion": TURNS[4:], "tools": json.dumps(TOOLS)},
    {"text": "T" * 100, "id": 7},
]
FORMATS: list[Format] = ["auto", "chat", "sharegpt", "alpaca", "prompt_completion", "text"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return with_template(AGENT_TEMPLATE)


@pytest.fixture(scope="module")
def template(tokenizer: Tokenizer) -> ChatTemplate:
    return ChatTemplate(tokenizer)


def use(path: Path, kind: Format, tokenizer: Tokenizer, template: ChatTemplate) -> None:
    """Read, render and tokenise a file; a bad row is counted with its place, a damaged file is an error of ours."""
    bad_rows = BadRows("skip")
    found = verdict(lambda: list(read_contents([Source(str(path), kind)], bad_rows)), path)
    if isinstance(found, ValueError):
        return
    assert all(place.startswith(str(path)) for place, _ in found)
    pieces = pieces_of([content for _, content in found], tokenizer, template)
    for document in encode([row for row in pieces if not isinstance(row, RowError)], tokenizer):
        assert len(document.ids) == len(document.trained)
        assert document.ids.max(initial=0) < tokenizer.vocab_size


@few_and_many(50)
def test_rows(tmp_path: Path, tokenizer: Tokenizer, template: ChatTemplate, examples: int) -> None:
    def check(drawn: tuple[bytes, str, Format]) -> None:
        content, name, kind = drawn
        path = tmp_path / name
        path.write_bytes(content)
        use(path, kind, tokenizer, template)
        path.unlink()

    row = st.sampled_from(ROWS).flatmap(changed_file)
    lines = st.lists(row, min_size=1, max_size=2).map(b"\n".join)
    listed = st.lists(row, min_size=1, max_size=2).map(lambda rows: b"[" + b",\n".join(rows) + b"]")
    names = st.sampled_from(["a.jsonl", "a.json", "a.txt"])
    fuzz(check, st.tuples(st.one_of(lines, lines, listed), names, st.sampled_from(FORMATS)), examples)


@few_and_many(30)
@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.parquet"])
def test_packed_rows(tmp_path: Path, tokenizer: Tokenizer, template: ChatTemplate, examples: int, name: str) -> None:
    if name == "a.parquet":
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([ROWS[1], ROWS[1]]), buffer)
        valid = buffer.getvalue()
    else:
        valid = gzip.compress("\n".join(map(json.dumps, ROWS)).encode(), mtime=0)

    def check(content: bytes) -> None:
        (tmp_path / name).write_bytes(content)
        use(tmp_path / name, "auto", tokenizer, template)

    fuzz(check, changed_bytes(valid), examples)


@few_and_many(50)
def test_columns_of_other_types(tokenizer: Tokenizer, template: ChatTemplate, examples: int) -> None:
    """Rows that any container may give, such as one whose values are no JSON."""
    odd = [b"bytes", np.float64("nan"), (1, 2), {1: 2}, 1 + 2j, float("inf"), {"role": b"user"}]

    def check(drawn: tuple[str, Format, Any, str]) -> None:
        text, kind, value, at = drawn
        try:
            row = json.loads(text)
        except (ValueError, RecursionError):
            return
        if isinstance(row, dict):
            row = {**row, at: value} if at else row
            content = verdict(lambda: read_columns(row, kind), None)
            if not isinstance(content, ValueError):
                pieces_of([content], tokenizer, template)

    rows = st.sampled_from(ROWS).flatmap(changed_json)
    columns = st.sampled_from(["", "", "messages", "text", "tools", "system", "prompt", "history", "weight"])
    fuzz(check, st.tuples(rows, st.sampled_from(FORMATS), st.sampled_from(odd), columns), examples)


SNIPPETS = [
    *(
        "{{ 1 / 0 }}",
        "{{ 1 // 0 }}",
        "{{ 'a' + 1 }}",
        "{{ messages[99].x.y }}",
        "{{ undefined.x.y }}",
        "{{ [] | first }}",
    ),
    *(
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ 10**10**3 }}",
        "{{ -1 ** 0.5 }}",
        "{{ '%d' % 'a' }}",
        "{{ {}[[]] }}",
    ),
    *(
        "{% include 'x' %}",
        "{% extends 'x' %}",
        "{% import 'x' as y %}",
        "{{ x | nosuch }}",
        "{% if %}",
        "{{",
        "%}",
        "{#",
    ),
    *("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}"),
    *(
        "{{ raise_exception('no\nsuch') }}",
        "{{ strftime_now('%') }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ 1e308 * 10 }}",
    ),
    *(
        "{{ '\ud800' }}",
        "{{ 9e999 | int }}",
        "{{ '" + "9" * 5000 + "' | int }}",
        "{{ " + "(" * 300 + "1" + ")" * 300 + " }}",
    ),
    *("{% for a in messages recursive %}{{ loop(messages) }}{% endfor %}", "{{ caller() }}", "{{ self.x() }}", "\x00"),
    "{% for a in b %}" * 25 + "{% endfor %}" * 25,
    "{{ messages | tojson(indent=-1) }}{{ namespace() | tojson }}",
]


@few_and_many(12)
def test_chat_template(tokenizer: Tokenizer, examples: int) -> None:
    conversation = read_columns(ROWS[0])
    assert isinstance(conversation, Conversation)

    @st.composite
    def changed(draw: st.DrawFn) -> str:
        lines = AGENT_TEMPLATE.splitlines(keepends=True)
        at = draw(st.integers(0, len(lines) - 1))
        put_in = draw(st.sampled_from([*SNIPPETS, "", lines[at] * 2]))
        lines[at : at + draw(st.integers(0, 1))] = [put_in]
        return "".join(lines)

    def check(source: str) -> None:
        other = copy.copy(tokenizer)
        other.chat_template = source
        found = verdict(lambda: ChatTemplate(other), tokenizer.place)
        if not isinstance(found, ValueError):
            [pieces] = verdict(lambda: found.pieces([conversation]), None)
            assert isinstance(pieces, RowError) or pieces

    fuzz(check, changed(), examples)
