"""The embedded corpus is what its list of sources says, and its two sides share nothing."""

import ast
import gzip
import hashlib
import json
import shutil
import textwrap
from pathlib import Path

import pytest

from data.corpus.make_corpus import MAX_ANSWER_CHARACTERS, MAX_FILE_BYTES, make_corpus
from data.tokenizer import OTHER_CONTROL_TOKENS, SPECIAL_TOKENS

CORPUS = Path(__file__).parent.parent / "data" / "corpus"


def rows(path: Path) -> list[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def sources(folder: Path) -> dict[str, tuple[int, str, str]]:
    lines = (folder / "SOURCES.txt").read_text().splitlines()
    fields = [line.split("  ") for line in lines if not line.startswith("#")]
    return {path: (int(size), digest, split) for path, size, digest, split in fields}


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_code_rows_are_the_listed_sources(split):
    listed = {path: entry for path, entry in sources(CORPUS).items() if entry[2] == split}
    found = {row["path"]: row["text"] for row in rows(CORPUS / f"code-{split}.jsonl.gz")}
    assert found.keys() == listed.keys()
    for path, (size, digest, _) in listed.items():
        content = found[path].encode()
        assert len(content) == size <= MAX_FILE_BYTES
        if hashlib.sha256(content).hexdigest() != digest:  # only a file that was cut differs from the one on disk
            assert size > MAX_FILE_BYTES / 4
            ast.parse(found[path])


def test_pairs_are_functions_of_the_files_on_their_own_side():
    split_of = {path: entry[2] for path, entry in sources(CORPUS).items()}
    answers: dict[str, set[str]] = {}
    for split in ("train", "heldout"):
        texts = {row["path"]: row["text"] for row in rows(CORPUS / f"code-{split}.jsonl.gz")}
        pairs = rows(CORPUS / f"pairs-{split}.jsonl.gz")
        answers[split] = {pair["messages"][1]["content"] for pair in pairs}
        assert len(answers[split]) == len(pairs)
        for pair in pairs:
            request, answer = (message["content"] for message in pair["messages"])
            assert split_of[pair["path"]] == split
            node = ast.parse(answer).body[0]
            assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            assert len(answer) <= MAX_ANSWER_CHARACTERS
            first = request.split("\n\n")[1]
            assert f"def {node.name}({ast.unparse(node.args)})" in first
            assert first.startswith("async ") == isinstance(node, ast.AsyncFunctionDef)
            docstring = ast.get_docstring(node) or ""
            assert "".join(request.split()).endswith("".join(docstring.split()))
            below = texts[pair["path"]].split("\n")[pair["line"] - 1 :]
            if len(below) > answer.count("\n") + 1:  # not in the part that was cut off
                assert textwrap.dedent("\n".join(below[: answer.count("\n") + 1])) == answer
    assert not answers["train"] & answers["heldout"]


def test_descriptions_are_the_pairs_of_training_files_the_other_way_round():
    split_of = {path: entry[2] for path, entry in sources(CORPUS).items()}
    pairs = {
        (row["path"], row["line"]): [message["content"] for message in row["messages"]]
        for row in rows(CORPUS / "pairs-train.jsonl.gz")
    }
    described = rows(CORPUS / "describe-train.jsonl.gz")
    assert {split_of[row["path"]] for row in described} == {"train"}
    found = 0
    for row in described:
        request, answer = (message["content"] for message in row["messages"])
        source = request.removeprefix("Describe this function.\n\n")
        assert "".join((ast.get_docstring(ast.parse(source).body[0]) or "").split()) == "".join(answer.split())
        if (row["path"], row["line"]) in pairs:
            found += 1
            asked, function = pairs[row["path"], row["line"]]
            assert (source, asked.endswith(f"\n\n{answer}")) == (function, True)
    assert found == len(pairs)


def test_the_split_is_the_hash_of_the_path_and_bytes_carry_no_time():
    listed = sources(CORPUS)
    for path, (_, _, split) in listed.items():
        assert (split == "heldout") == (int(hashlib.sha1(path.encode()).hexdigest(), 16) % 100 < 7)
    for file in CORPUS.glob("*.gz"):
        assert file.read_bytes()[:8] == b"\x1f\x8b\x08\0" + bytes(4)  # gzip, deflate, no name, no time


def test_corpus_is_small_licensed_and_free_of_control_tokens():
    files = sorted(CORPUS.glob("*.gz"))
    assert len(files) == 5
    assert sum(file.stat().st_size for file in files) < 3_000_000
    assert "PYTHON SOFTWARE FOUNDATION LICENSE" in (CORPUS / "LICENSE.PSF").read_text()
    for file in files:
        text = gzip.decompress(file.read_bytes()).decode()
        assert not [token for token in SPECIAL_TOKENS + OTHER_CONTROL_TOKENS if token in text]


def library(root: Path) -> Path:
    function = 'def {name}(x):\n    """Adds {n} to x, as promised."""\n    return x + {n}\n'
    root.mkdir()
    (root / "LICENSE.txt").write_text("licence")
    for n in range(60):
        (root / f"part{n:02}.py").write_text(function.format(name=f"add{n}", n=n) + function.format(name="same", n=-1))
    (root / "large.py").write_text("".join(function.format(name=f"large{n}", n=n) for n in range(1500)))
    (root / "table.py").write_text("TABLE = [\n" + "    1,\n" * 2000 + "]\n")
    (root / "turns.py").write_text("END = '<|im_end|>'\n")
    (root / "_sysconfigdata_x.py").write_text("PREFIX = '/usr'\n")
    (root / "latin.py").write_bytes(b"# coding: latin-1\nNAME = '\xe9'\n")
    (root / "test").mkdir()
    (root / "test" / "test_part.py").write_text("x = 1\n")
    return root


def test_making_the_corpus_twice_gives_the_same_bytes(tmp_path):
    stdlib = library(tmp_path / "first")
    moved = shutil.copytree(stdlib, tmp_path / "second")
    make_corpus(stdlib=stdlib, to=tmp_path / "a")
    make_corpus(stdlib=moved, to=tmp_path / "b")
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        assert not name.endswith(".gz") or (tmp_path / "a" / name).read_bytes()[3:8] == bytes(5)  # no name, no time


def test_making_the_corpus_selects_cuts_and_splits(tmp_path):
    make_corpus(stdlib=library(tmp_path / "lib"), to=tmp_path / "out")
    listed = sources(tmp_path / "out")
    assert set(listed) == {"large.py", *(f"part{n:02}.py" for n in range(60))}
    size, _, split = listed["large.py"]
    text = next(row["text"] for row in rows(tmp_path / "out" / f"code-{split}.jsonl.gz") if row["path"] == "large.py")
    assert MAX_FILE_BYTES - 200 < size <= MAX_FILE_BYTES
    assert text.endswith("\n")
    ast.parse(text)
    for path, (_, _, side) in listed.items():
        assert (side == "heldout") == (int(hashlib.sha1(path.encode()).hexdigest(), 16) % 100 < 7)
    same = [
        (split, pair["path"])
        for split in ("train", "heldout")
        for pair in rows(tmp_path / "out" / f"pairs-{split}.jsonl.gz")
        if "same(" in pair["messages"][0]["content"]
    ]
    assert [split for split, _ in same] == ["train"]


def test_an_interpreter_without_its_licence_is_refused(tmp_path):
    stdlib = library(tmp_path / "lib")
    (stdlib / "LICENSE.txt").unlink()
    with pytest.raises(SystemExit, match=r"LICENSE\.txt: no such file"):
        make_corpus(stdlib=stdlib, to=tmp_path / "out")
    assert not (tmp_path / "out").exists()
