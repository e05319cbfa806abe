"""What data may ask for is bounded: memory by the row, time by the row, and which files are opened at all."""

import glob
import gzip
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from data import chat, json_stream, parquet, sources
from data.chat import ChatTemplate, portions
from data.formats import Conversation, Text, read_contents
from data.sources import BadRows, DataError, RowError, Source, read_rows, source_files
from finetune.run.failure import readable
from monitoring import file_search
from tests.test_chat import AGENT_TEMPLATE, with_template

ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> int:
    """A limit of one MiB, so that a test is quick."""
    for module in (json_stream, sources, parquet):
        monkeypatch.setattr(module, "MOST_ROW_BYTES", MIB)
    return MIB


def refused(path: Path) -> dict[str, str]:
    """Line by line, what is said about a row that is too long; the others are read."""
    found = list(read_rows(path))
    return {str(row).partition(": ")[0]: row.reason for row in found if isinstance(row, RowError)}


LONG, SHORT = {"text": "x" * (MIB + 1)}, {"text": "short"}


def test_a_row_above_the_limit_is_refused_with_its_line_and_the_next_is_read(tmp_path: Path, small: int) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in (SHORT, LONG, SHORT))
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    for name in ("a.jsonl", "a.jsonl.gz"):
        path = tmp_path / name
        assert refused(path) == {f"{path}:2": "too long"}
        assert [row.place for row in read_rows(path) if not isinstance(row, RowError)] == [f"{path}:1", f"{path}:3"]


def test_a_row_of_exactly_the_limit_is_read(tmp_path: Path, small: int) -> None:
    text = json.dumps({"text": ""})
    (tmp_path / "a.jsonl").write_text(text.replace('""', '"' + "x" * (small - len(text)) + '"') + "\n")
    assert refused(tmp_path / "a.jsonl") == {}


def test_other_containers_refuse_a_long_row_too(tmp_path: Path, small: int) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([SHORT, LONG, SHORT]), tmp_path / "a.parquet")
    assert refused(tmp_path / "a.parquet") == {str(tmp_path / "a.parquet"): "too long"}
    assert "row 2" in str(list(read_rows(tmp_path / "a.parquet"))[1])
    (tmp_path / "a.txt").write_text(LONG["text"])
    assert refused(tmp_path / "a.txt") == {str(tmp_path / "a.txt"): "too long"}
    (tmp_path / "a.json").write_text(json.dumps([SHORT, {"text": "x" * 3 * MIB}]))
    with pytest.raises(DataError, match=r"a\.json:1:21: longer than"):
        list(read_rows(tmp_path / "a.json"))


def test_a_json_file_is_read_row_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of many sizes, in portions of few bytes; the lines are those of the file."""
    monkeypatch.setattr(json_stream, "_CHUNK_BYTES", 7)
    rows = [{"text": "é🙂" * n, "n": n * 10**n} for n in range(9)]
    for indent in (None, 1):
        (tmp_path / "a.json").write_text(json.dumps(rows, indent=indent, ensure_ascii=False))
        found = list(read_rows(tmp_path / "a.json"))
        assert [row.columns for row in found] == rows  # type: ignore[union-attr]
        lines = [int(row.place.rpartition(":")[2]) for row in found]  # type: ignore[union-attr]
        assert lines == ([2 + 4 * n for n in range(9)] if indent else [1] * 9)
    (tmp_path / "a.json").write_text('[{"a": 1},\n {"b" 2}]')
    with pytest.raises(DataError, match=r"a\.json:2:7: not JSON \(Expecting ':' delimiter\)"):
        list(read_rows(tmp_path / "a.json"))


def test_a_line_without_an_end_and_blank_lines_without_an_end_stop(
    tmp_path: Path, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_stream, "_MOST_SKIPPED_BYTES", 4 * MIB)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"\x00" * 9 * MIB))
    with pytest.raises(DataError, match=r"a\.jsonl\.gz:1: has no end within"):
        list(read_rows(tmp_path / "a.jsonl.gz"))
    (tmp_path / "b.jsonl").write_bytes(b"\n" * 1_000_002)
    with pytest.raises(DataError, match=r"b\.jsonl:1000001: holds 1,000,001 blank lines"):
        list(read_rows(tmp_path / "b.jsonl"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bomb.jsonl.gz", "long.jsonl", "long.json", "long.parquet", "long.txt"])
def test_a_row_of_500_megabytes_takes_little_memory(tmp_path: Path, name: str) -> None:
    """Measured in a process of its own: the largest that it ever was."""
    path = tmp_path / name
    size = 500_000_000
    if name == "bomb.jsonl.gz":
        with gzip.open(path, "wb", 9) as file:
            for _ in range(size // MIB):
                file.write(b"x" * MIB)
    elif name == "long.parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"text": "x" * size}]), path)
    else:
        path.write_bytes(b'{"text": "' + b"x" * size + b'"}\n')
    code = (
        "import sys; from data.sources import *\nfrom pathlib import Path\n"
        "try: found = [str(row) for row in read_rows(Path(sys.argv[1]))]\n"
        "except DataError as error: found = [str(error)]\n"
        "[peak] = [line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')]\n"
        "print(int(peak) // 1024, *found)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True, check=True)
    peak, _, message = done.stdout.partition(" ")
    assert str(path) in message
    assert "longer than 64 MiB" in message
    assert int(peak) < 600, f"{peak} MiB"


# --- tokenising a long text ---


def test_a_long_text_has_the_tokens_that_it_has_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = with_template(None)
    with gzip.open(ROOT / "data/corpus/code-train.jsonl.gz", "rt", encoding="utf-8") as rows:
        text = "".join(json.loads(next(rows))["text"] for _ in range(40))
    text += "\r\n\r\n  x\n\n\t日本\n語\u0301\n\u0301e\n 'll\n'll\n\u3000a\n1\n2\n\x1c\n\ufeffb\n<|im_end|>\n" * 20
    monkeypatch.setattr(chat, "PORTION", 300)
    parts = portions(text, tokenizer)
    assert "".join(parts) == text
    assert len(parts) > 200
    assert [n for part in parts for n in tokenizer.encode_plain(part)] == tokenizer.encode_plain(text)


def test_a_line_that_cannot_be_cut_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "PORTION", 100)
    monkeypatch.setattr(chat, "LONGEST_LINE", 1000)
    [row] = chat.pieces_of([Text("a" * 1101)], with_template(None), None)
    assert isinstance(row, RowError)
    assert row.detail == "holds a line of more than 1,000 characters; break it"


# --- which files are opened ---


def test_what_is_no_regular_file_is_named(tmp_path: Path) -> None:
    for name in ("fifo", "gone", "self"):
        (tmp_path / name).mkdir()
    os.mkfifo(tmp_path / "fifo/fifo.jsonl")
    (tmp_path / "gone/gone.jsonl").symlink_to(tmp_path / "nothing")
    (tmp_path / "self/self.jsonl").symlink_to("self.jsonl")
    for name, kind in (("fifo", "is a FIFO"), ("gone", "no such file"), ("self", "cannot be read")):
        alone = tmp_path / name
        for path in (alone / f"{name}.jsonl", alone, alone / "*.jsonl", alone / "**"):
            with pytest.raises(DataError, match=rf"{name}\.jsonl: {kind}"):
                source_files(Source(str(path)))
    with pytest.raises(DataError, match=r"/dev/zero: is a device, not a regular file"):
        source_files(Source("/dev/zero"))
    with pytest.raises(DataError, match=r"is no path"):
        source_files(Source("x" * 5000))


def test_a_link_to_a_folder_above_is_followed_once(tmp_path: Path) -> None:
    (tmp_path / "in/deep").mkdir(parents=True)
    (tmp_path / "in/deep/up").symlink_to(tmp_path)
    (tmp_path / "in/a.jsonl").write_text(json.dumps(SHORT))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/b.jsonl").write_text(json.dumps(SHORT))
    (tmp_path / "in/linked").symlink_to(tmp_path / "elsewhere")
    for pattern in (str(tmp_path / "in"), f"{tmp_path}/in/**/*.jsonl", f"{tmp_path}/in/**"):
        names = [path.name for path in source_files(Source(pattern))]
        assert sorted(names) == ["a.jsonl", "b.jsonl"], pattern


def test_a_pattern_matches_what_glob_matches(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.json", ".h.jsonl", "x/a.jsonl", "x/y/c.jsonl", ".hidden/d.jsonl", "x/[1].jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    for pattern in (
        "*",
        "**",
        "**/*",
        "*.jsonl",
        "**/*.jsonl",
        "x/**",
        "*/*.jsonl",
        "**/y/**",
        "[ab].json*",
        ".*",
        "**/[[]1].jsonl",
    ):
        there = glob.glob(f"{tmp_path}/{pattern}", recursive=True)
        expected = {Path(name) for name in there if os.path.isfile(name)}
        assert set(file_search.matches(f"{tmp_path}/{pattern}")) == expected, pattern


@pytest.mark.parametrize("pattern", ["/**", "/", "/**/*.jsonl", "/usr/../**", "//**/x"])
def test_a_pattern_for_the_whole_machine_is_refused_at_once(pattern: str) -> None:
    began = time.monotonic()
    with pytest.raises(DataError, match=r"means every file of this machine; name a folder"):
        source_files(Source(pattern))
    assert time.monotonic() - began < 1


def test_a_search_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_search, "MOST_ENTRIES", 10)
    for number in range(11):
        (tmp_path / f"{number}.txt").touch()
    for pattern in (str(tmp_path), f"{tmp_path}/*", f"{tmp_path}/**/none"):
        with pytest.raises(DataError, match=r"means more than 10 files and folders"):
            source_files(Source(pattern))


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.jsonl").write_text(json.dumps(SHORT))
    scan = os.scandir

    def closed(path: Path) -> object:
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(DataError, match=r"closed: cannot be read \(Permission denied\)"):
        source_files(Source(str(tmp_path)))


# --- what a row may not hold ---


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a", "text": "b"}', "has the key 'text' twice"),
        (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "holds a number of 5,000 digits"),
        (b'{"text": ' + b"[" * 5000, "nested more than 100 deep"),
        (b'{"text": "a\x00"}', "not JSON \\(Invalid control character"),
        (b"\xff\xfe{\x00}\x00", "not UTF-8"),
        (b'{"prompt": "a\\n", "a\\nb": 1}', "columns a b, prompt are no known format"),
        (
            b'{"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "tool_calls": '
            b'[{"name": "f", "arguments": {"x": NaN}}]}]}',
            "holds the number nan, which JSON has no word for",
        ),
    ],
)
def test_a_row_is_refused_in_one_line(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "first"}\n' + line + b"\n")
    bad_rows = BadRows("stop")
    list(read_contents([Source(str(tmp_path / "a.jsonl"))], bad_rows))
    with pytest.raises(DataError) as caught:
        bad_rows.stop_if_any()
    first, remedy = readable(caught.value).split("\n")
    assert first.startswith(f"{tmp_path / 'a.jsonl'}:2")
    assert remedy.startswith("correct these rows")
    assert re.search(message, first), first


def test_what_is_not_used_may_be_odd(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a", "score": NaN, "title": "\\ud83d", "n": 1e999}\n')
    assert [content for _, content in read_contents([Source(str(tmp_path))], BadRows("stop"))] == [Text("a")]


# --- templates ---


ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "power": "{{ 9 ** 9999999999 }}",
    "doubled": "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "nested": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "multiplied": "{{ 'a' * 10 ** 11 }}",
    "padded": "{{ 'a'.ljust(10 ** 11) }}",
    "printed": "{% for a in range(99999) %}{{ 'x' * 100000 }}{% endfor %}",
}


@pytest.mark.parametrize("name", ENDLESS)
@pytest.mark.parametrize("where", ["always", pytest.param("in one row", marks=pytest.mark.slow)])
def test_a_template_that_never_ends_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, where: str) -> None:
    monkeypatch.setattr("data.template_process.SECONDS_A_ROW", 0.4)
    source = (
        ENDLESS[name] if where == "always" else f"{{% if messages[0].content == 'bad' %}}{ENDLESS[name]}{{% endif %}}"
    )
    tokenizer = with_template(source + AGENT_TEMPLATE)
    began = time.monotonic()
    turns = [
        [{"role": "user", "content": word}, {"role": "assistant", "content": "A"}] for word in ("good", "bad", "good")
    ]
    error = None
    try:
        found = ChatTemplate(tokenizer).pieces(
            [Conversation(messages) for messages in turns[: 1 if where == "always" else 3]]
        )
    except DataError as raised:  # what has no variable is computed when the template is compiled
        error = raised
    if error is not None:
        assert str(error).startswith(("model: the chat template takes more than 0.4 s", "model: chat template")), error
    else:
        assert [isinstance(row, RowError) for row in found] == ([True] if where == "always" else [False, True, False])
        [error] = [row for row in found if isinstance(row, RowError)]
        assert error.reason == "chat template"
        assert error.detail.startswith("the chat template ")
    assert time.monotonic() - began < 20
