"""Every row comes with its place, every mistake is reported with it, and no file is passed over."""

import gzip
import json
import re
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from data.formats import Completion, Conversation, Text, read_columns, read_contents
from data.sources import BadRows, DataError, RowError, Source, read_rows, source_files

USER, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def contents(*sources: Source, policy: str = "stop") -> tuple[list, BadRows]:
    bad_rows = BadRows(policy)
    found = list(read_contents(sources, bad_rows))
    bad_rows.stop_if_any()
    return found, bad_rows


# --- files ---


ROWS = [{"text": "one"}, {"text": "two\nlines é 🙂"}, {"text": "three"}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", lines(*ROWS)),
        ("a.jsonl", lines(*ROWS).replace("\n", "\r\n\r\n").rstrip()),
        ("a.jsonl.gz", gzip.compress(lines(*ROWS).encode(), mtime=0)),
        ("a.json", json.dumps(ROWS)),
        ("a.json", "\ufeff \n" + json.dumps(ROWS, indent=2, ensure_ascii=False) + "\n"),
        ("a.json", lines(*ROWS)),
        ("a.json", "".join(json.dumps(row, indent=1) for row in ROWS)),
    ],
    ids=["jsonl", "blank-lines", "gzip", "list", "indented", "lines-in-json", "values-in-json"],
)
def test_rows_are_the_same_in_every_container(tmp_path, name, content):
    found = [row.columns for row in read_rows(write(tmp_path / name, content))]
    assert found == ROWS


def test_parquet_rows_lose_the_nulls_that_its_schema_invents(tmp_path):
    rows = [
        {
            "messages": [
                USER,
                {"role": "assistant", "content": "A", "tool_calls": [{"name": "f", "arguments": {"a": 1}}]},
            ]
        },
        {
            "messages": [
                USER,
                {"role": "assistant", "content": "A", "tool_calls": [{"name": "g", "arguments": {"b": [1]}}]},
            ]
        },
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = list(read_rows(tmp_path / "a.parquet"))
    assert [row.columns for row in found] == rows
    assert found[1].place == f"{tmp_path / 'a.parquet'}: row 2"


def test_parquet_written_by_datasets_gives_back_what_its_json_columns_held(tmp_path):
    call = {"name": "f", "arguments": {"b": [1], "c": None}}
    rows = [
        {"messages": [USER, {"role": "assistant", "content": "A", "tool_calls": [call]}], "n": 1},
        {"messages": [USER, {"role": "assistant", "content": "A", "extra": [3, {"x": "y"}]}], "n": 2},
        {"messages": [USER, {"role": "assistant", "content": "A", "extra": "text"}], "n": 3},
    ]
    written = write(tmp_path / "a.jsonl", lines(*rows))
    table = datasets.load_dataset("json", data_files=str(written), split="train", cache_dir=str(tmp_path / "cache"))
    table.to_parquet(tmp_path / "a.parquet")
    assert [row.columns for row in read_rows(tmp_path / "a.parquet")] == rows


def test_places_are_the_lines_where_rows_begin(tmp_path):
    indented = write(tmp_path / "a.json", json.dumps(ROWS, indent=2))
    assert [row.place.rpartition(":")[2] for row in read_rows(indented)] == ["2", "5", "8"]
    spaced = write(tmp_path / "a.jsonl", "\n\n" + lines(*ROWS))
    assert [row.place.rpartition(":")[2] for row in read_rows(spaced)] == ["3", "4", "5"]


def test_folders_and_globs_give_all_files_in_order(tmp_path):
    names = ["b.jsonl", "a.jsonl.gz", "deep/er/c.json", "z.parquet"]
    for name in names:
        write(tmp_path / name, b"")
    write(tmp_path / ".cache" / "x.bin", b"")
    assert source_files(Source(str(tmp_path))) == sorted(tmp_path / name for name in names)
    assert source_files(Source(f"{tmp_path}/**/*.json*")) == sorted(tmp_path / name for name in names[:3])
    odd = write(tmp_path / "odd[1].jsonl", b"")
    assert source_files(Source(str(odd))) == [odd]


def test_code_is_read_whole(tmp_path):
    write(tmp_path / "pkg" / "a.py", "x = 1\n")
    write(tmp_path / "pkg" / "b.py", "y = '\t'\r\n")
    for source in (Source(f"{tmp_path}/**/*.py"), Source(str(tmp_path)), Source(str(tmp_path), "text")):
        assert [content for _, content in contents(source)[0]] == [Text("x = 1\n"), Text("y = '\t'\r\n")]


def test_format_text_reads_rows_and_other_files_of_one_folder(tmp_path):
    write(tmp_path / "a.jsonl", lines(ROWS[0]))
    write(tmp_path / "b.md", "# b")
    assert [content.text for _, content in contents(Source(str(tmp_path), "text"))[0]] == ["one", "# b"]


@pytest.mark.parametrize(
    ("names", "kind", "message"),
    [
        (
            ["a.jsonl", "b.py", "README"],
            "auto",
            r"rows \(a\.jsonl\) are mixed with other files \(\.py, README\); name the",
        ),
        (["a.jsonl", "b.csv"], "auto", r"\.csv is not read here; convert to \.jsonl or \.parquet"),
        (["a.py", "model.safetensors"], "text", r"\.safetensors is not read here"),
        (["a.txt.gz"], "text", r"\.gz is not read here"),
        (["a.py"], "chat", r"a\.py: format chat needs rows"),
        ([], "auto", r"holds no files"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, names, kind, message):
    for name in names:
        write(tmp_path / name, b"")
    with pytest.raises(DataError, match=message):
        source_files(Source(str(tmp_path), kind))


@pytest.mark.parametrize(
    ("path", "message"), [("nothing.jsonl", "no such file or folder"), ("*.jsonl", "holds no files")]
)
def test_missing_sources_are_named(tmp_path, path, message):
    with pytest.raises(DataError, match=message):
        source_files(Source(str(tmp_path / path)))


# --- rows that are not rows ---


def test_mistakes_in_lines_are_reported_together_with_line_and_column(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        lines(ROWS[0]).encode()
        + b'{"text": "x" 1}\n'
        + b'{"text": "caf\xe9"}\n'
        + b"[1]\n"
        + lines(
            {"txt": "x"}, {"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{x"}]}]}
        ).encode()
        + b"[" * 100_000
        + b"\n",
    )
    with pytest.raises(DataError) as caught:
        contents(Source(str(path)))
    assert str(caught.value).splitlines() == [
        f"{path}:2:14: not JSON (Expecting ',' delimiter)",
        f"{path}:3:14: not UTF-8 (invalid continuation byte)",
        f"{path}:4: expected an object with columns, found a list",
        f"{path}:5: columns txt are no known format; known: messages, conversations, instruction + output, "
        "prompt + completion, text",
        f"{path}:6: messages[1].tool_calls[0].function.arguments: not JSON "
        "(Expecting property name enclosed in double quotes) at character 2",
        f"{path}:7: nested more than 100 deep",
        "correct these rows, or set data.on_bad_row: skip to train without them",
    ]


def test_skipped_rows_are_counted_by_reason(tmp_path):
    path = write(tmp_path / "a.jsonl", "{\n" + lines(ROWS[0], {"text": " "}, {"messages": [USER]}, {"text": ""}))
    found, bad_rows = contents(Source(str(path)), policy="skip")
    assert [content for _, content in found] == [Text("one")]
    assert bad_rows.counts == {"not JSON": 1, "empty": 2, "no assistant turn": 1}


def test_no_more_than_ten_mistakes_are_collected(tmp_path):
    path = write(tmp_path / "a.jsonl", "{\n" * 25)
    with pytest.raises(DataError) as caught:
        contents(Source(str(path)))
    assert str(caught.value).count("not JSON") == 10


def test_the_search_for_further_mistakes_ends(tmp_path, monkeypatch):
    monkeypatch.setattr("data.sources.LOOK_AHEAD_ROWS", 3)
    path = write(tmp_path / "a.jsonl", lines(ROWS[0]) + "{\n" + lines(*ROWS) * 5)
    rows = read_contents([Source(str(path))], BadRows("stop"))
    assert [next(rows)[0].rpartition(":")[2] for _ in range(4)] == ["1", "3", "4", "5"]
    with pytest.raises(DataError, match=":2:2: not JSON"):
        next(rows)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[{"text": "x"},\n {"text" 1}]', r"a\.json:2:10: not JSON \(Expecting ':' delimiter\)"),
        ("a.json", '[{"text": "x"},\n', r"a\.json:2:1: not JSON \(the list of rows does not end with the file\)"),
        ("a.json", '[{"text": "x"}] 7', r"the list of rows does not end with the file"),
        ("a.json", b'["\xff"]', r"a\.json:1: not UTF-8 \(invalid start byte\)"),
        ("a.jsonl.gz", gzip.compress(lines(*ROWS).encode(), mtime=0)[:-12], r"a\.jsonl\.gz: damaged gzip file"),
        ("a.jsonl.gz", b"plain", r"a\.jsonl\.gz: damaged gzip file"),
        ("a.parquet", b"PAR1 not", r"a\.parquet: cannot be read as parquet"),
    ],
)
def test_a_damaged_file_stops_even_where_bad_rows_are_skipped(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message) as caught:
        contents(Source(str(write(tmp_path / name, content))), policy="skip")
    assert "\n" not in str(caught.value)


def test_a_binary_file_among_texts_is_a_bad_row(tmp_path):
    write(tmp_path / "a.py", "x")
    write(tmp_path / "b.png", b"\x89PNG")
    found, bad_rows = contents(Source(str(tmp_path)), policy="skip")
    assert len(found) == 1
    assert bad_rows.counts == {"not UTF-8": 1}


# --- formats ---

SYSTEM = {"role": "system", "content": "S"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": [1, None], "b": "é"}}}


def assistant(content: object, *calls: object) -> dict:
    return {"role": "assistant", "content": content, "tool_calls": list(calls)}


AGENT = Conversation([USER, assistant("", CALL), {"role": "tool", "content": "R"}, ANSWER], [TOOL])
CALL_TEXT = json.dumps(CALL["function"]["arguments"])


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"messages": [USER, ANSWER]}, Conversation([USER, ANSWER])),
        ({"messages": json.dumps([USER, ANSWER]), "text": None}, Conversation([USER, ANSWER])),
        ({"messages": AGENT.messages, "tools": [TOOL]}, AGENT),
        ({"messages": json.dumps(AGENT.messages), "tools": json.dumps([TOOL])}, AGENT),
        (
            {
                "messages": [
                    {**USER, "tool_calls": None, "name": None},
                    assistant(None, {"function": {"name": "f", "arguments": CALL_TEXT}}),
                    {"role": "tool", "content": [{"type": "text", "text": "R"}], "tool_calls": []},
                    ANSWER,
                ],
                "tools": [TOOL],
            },
            AGENT,
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "Q"},
                    {"from": "function_call", "value": json.dumps(CALL["function"])},
                    {"from": "observation", "value": "R"},
                    {"from": "gpt", "value": "A"},
                ],
                "tools": json.dumps([TOOL]),
            },
            AGENT,
        ),
        (
            {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}], "system": "S"},
            Conversation([SYSTEM, USER, ANSWER]),
        ),
        ({"instruction": "Q", "input": "", "output": "A"}, Conversation([USER, ANSWER])),
        (
            {"instruction": "Q", "input": "I", "output": "A", "system": "S", "history": [["Q", "A"]]},
            Conversation([SYSTEM, USER, ANSWER, {"role": "user", "content": "Q\n\nI"}, ANSWER]),
        ),
        ({"prompt": "P", "completion": "C"}, Completion("P", "C")),
        ({"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}, Conversation([USER, ANSWER, USER, ANSWER], None, 3)),
        ({"text": "T", "meta": 1}, Text("T")),
        ({"content": "T"}, Text("T")),
    ],
)
def test_formats_are_recognised_by_their_columns(columns, expected):
    assert read_columns(columns) == expected


def test_only_assistant_turns_that_are_not_given_or_weighted_out_are_trained():
    turns = [USER, ANSWER, USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 1}]
    conversation = read_columns({"messages": turns})
    assert [conversation.trained(i) for i in range(6)] == [False, True, False, False, False, True]
    given = read_columns({"prompt": turns[:2], "completion": turns[4:], "system": "S"})
    assert [given.trained(i) for i in range(5)] == [False] * 4 + [True]


def test_reasoning_has_one_name():
    row = {"messages": [USER, {**ANSWER, "thinking": "T", "reasoning": None}]}
    assert read_columns(row).messages[1] == {**ANSWER, "reasoning_content": "T"}


@pytest.mark.parametrize(
    ("turn", "reason", "message"),
    [
        ("A", "bad message", ": expected an object"),
        ({"role": "robot", "content": "x"}, "bad message", ".role: 'robot' is not one of"),
        ({"role": ["user"], "content": "x"}, "bad message", ".role: ['user'] is not one of"),
        ({"role": "assistant"}, "bad message", ".content: expected text, found NoneType"),
        ({"role": "user", "content": [{"type": "image"}]}, "bad message", ".content: only parts of type text"),
        ({**USER, "tool_calls": [CALL]}, "bad message", ".tool_calls: only an assistant calls tools"),
        ({**ANSWER, "weight": 0.5}, "bad message", ".weight: 0.5 is not 0 or 1"),
        ({**ANSWER, "tool_calls": 3}, "bad message", ".tool_calls: expected a list, found int"),
        (assistant("", 3), "bad tool call", ".tool_calls[0]: expected a function"),
        (
            assistant("", {"name": "f", "arguments": "[1]"}),
            "bad tool call",
            "[0].function.arguments: expected an object",
        ),
        (assistant("", {"name": "f", "arguments": "{"}), "not JSON", "[0].function.arguments: not JSON"),
    ],
)
def test_a_bad_message_says_which_and_why(turn, reason, message):
    with pytest.raises(RowError, match=r"^messages\[1\].*" + re.escape(message)) as caught:
        read_columns({"messages": [USER, turn]})
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("columns", "kind", "reason", "message"),
    [
        ({"a": 1, "b": 2}, "auto", "unknown columns", "columns a, b are no known format"),
        ({"messages": [USER]}, "auto", "no assistant turn", "messages: no assistant turn"),
        ({"messages": [USER, {**ANSWER, "weight": 0}]}, "auto", "no assistant turn", "no assistant turn"),
        ({"messages": "[{]"}, "auto", "not JSON", "messages: not JSON"),
        ({"messages": {"role": "user"}}, "auto", "bad message", "messages: expected a list, found dict"),
        ({"messages": [USER, ANSWER], "tools": [{"x": 1}]}, "auto", "bad tool", r"tools\[0\]: expected an object with"),
        ({"instruction": "Q", "output": None}, "alpaca", "bad column", "output: expected text, found NoneType"),
        ({"instruction": "Q", "output": "A", "history": ["x"]}, "auto", "bad message", "history: expected pairs"),
        ({"prompt": "P", "completion": [ANSWER]}, "auto", "bad message", "must both be text or both be lists"),
        ({"prompt": "P", "completion": " "}, "auto", "empty", "completion: empty"),
        ({"text": "T"}, "chat", "bad message", "messages: expected a list, found NoneType"),
        ({"body": "T"}, "text", "bad column", "text: expected text, found NoneType"),
    ],
)
def test_rows_that_cannot_be_used_say_why(columns, kind, reason, message):
    with pytest.raises(RowError, match=message) as caught:
        read_columns(columns, kind)
    assert caught.value.reason == reason
