"""Regenerates the embedded corpus from the standard library of the interpreter that runs this script.

    python data/corpus/make_corpus.py [--to FOLDER] [--stdlib FOLDER]

The result depends on the Python version alone (same version, same bytes). The split is by file and by the hash of its
path, so a file keeps its side in every version, and a function is held out exactly when its file is.
"""

import argparse
import ast
import gzip
import hashlib
import io
import json
import os
import platform
import sys
import sysconfig
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_FILE_BYTES = 64 * 1024
MAX_FUNCTION_CHARACTERS = 800
# Of a function that is asked for: a small model learns within minutes where a short one ends.
MAX_ANSWER_CHARACTERS = 400
MIN_DOCSTRING_CHARACTERS = 20
TABLE_BYTES = 8 * 1024
HELD_OUT_PERCENT = 7
# Tests and bundled tools say little about library code; encodings and pydoc_data are tables; config-* and
# _sysconfigdata* describe the machine that built the interpreter.
EXCLUDED_FOLDERS = {
    *("__pycache__", "encodings", "ensurepip", "idlelib", "lib-dynload", "lib2to3"),
    *("pydoc_data", "site-packages", "test", "tests", "turtledemo"),
}
EXCLUDED_PREFIXES = ("_sysconfigdata", "config-")
# Literal control tokens would be read back as turn borders by a careless reader of these files.
CONTROL_MARKS = ("<|", "<tool_call>", "<tool_response>", "<think>")


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """One library file: its text as training sees it, and the hash of the file on disk."""

    path: str
    text: str
    whole: str
    sha256: str
    held_out: bool


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--to", type=Path, default=Path(__file__).parent, help="where the corpus is written")
    parser.add_argument("--stdlib", type=Path, default=Path(sysconfig.get_path("stdlib")), help="what is read")
    options = parser.parse_args(arguments)
    make_corpus(stdlib=options.stdlib, to=options.to)


def make_corpus(*, stdlib: Path, to: Path) -> None:
    """Writes the row files, `SOURCES.txt` and `LICENSE.PSF` into `to`.

    Raises:
        SystemExit: the interpreter has no library sources or no licence file beside them.
    """
    files = list(source_files(stdlib))
    if not files:
        raise SystemExit(f"{stdlib}: no Python files; run this with an interpreter that has its library sources")
    licence = next((p for p in (stdlib / "LICENSE.txt", stdlib.parent / "LICENSE.txt") if p.is_file()), None)
    if licence is None:
        raise SystemExit(f"{stdlib}/LICENSE.txt: no such file; the corpus may not be shipped without its licence")
    to.mkdir(parents=True, exist_ok=True)
    pairs = list(unique(pair for file in sorted(files, key=lambda f: f.held_out) for pair in function_pairs(file)))
    pairs.sort(key=lambda pair: (pair["path"], pair["line"]))
    held_out = {file.path for file in files if file.held_out}
    for split, members in (("train", {f.path for f in files} - held_out), ("heldout", held_out)):
        code = [{"text": f.text, "path": f.path} for f in files if f.path in members]
        write_rows(to / f"code-{split}.jsonl.gz", code)
        short = [pair for pair in pairs if pair["path"] in members and is_short(pair)]
        write_rows(to / f"pairs-{split}.jsonl.gz", short)
    descriptions = [described(pair) for pair in pairs if pair["path"] not in held_out]
    write_rows(to / "describe-train.jsonl.gz", descriptions)
    write_bytes(to / "LICENSE.PSF", licence.read_bytes())
    write_bytes(to / "SOURCES.txt", sources_table(files).encode())


def source_files(stdlib: Path) -> Iterator[SourceFile]:
    """The library files that the corpus takes, by path."""
    for path in sorted(stdlib.rglob("*.py"), key=lambda p: p.relative_to(stdlib).as_posix()):
        parts = path.relative_to(stdlib).parts
        if EXCLUDED_FOLDERS & set(parts[:-1]) or any(part.startswith(EXCLUDED_PREFIXES) for part in parts):
            continue
        content = path.read_bytes()
        try:
            whole = content.decode("utf-8")
            tree = ast.parse(whole)
        except (UnicodeDecodeError, SyntaxError):
            continue
        is_table = len(content) > TABLE_BYTES and not any(isinstance(n, ast.FunctionDef) for n in ast.walk(tree))
        if is_table or not whole.strip() or any(mark in whole for mark in CONTROL_MARKS):
            continue
        name = "/".join(parts)
        held_out = int(hashlib.sha1(name.encode()).hexdigest(), 16) % 100 < HELD_OUT_PERCENT
        yield SourceFile(
            path=name,
            text=head(whole, tree),
            whole=whole,
            sha256=hashlib.sha256(content).hexdigest(),
            held_out=held_out,
        )


def head(whole: str, tree: ast.Module) -> str:
    """The file up to the last top-level statement or class member that ends within `MAX_FILE_BYTES`."""
    if len(whole.encode()) <= MAX_FILE_BYTES:
        return whole
    # ast counts lines at \n alone, so a form feed (the library has some) must not end one.
    lines = [line + "\n" for line in whole.split("\n")]
    text = ""
    for statement in tree.body:
        for part in (*(statement.body if isinstance(statement, ast.ClassDef) else ()), statement):
            longer = "".join(lines[: part.end_lineno])
            if len(longer.encode()) > MAX_FILE_BYTES:
                return text
            text = longer
    return text


def function_pairs(file: SourceFile) -> Iterator[dict[str, Any]]:
    """Chat rows that ask for one documented function of `file` and answer with its source."""
    lines = file.whole.split("\n")
    module = file.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    for name, node in functions(ast.parse(file.whole), module):
        docstring = (ast.get_docstring(node) or "").strip()
        if len(docstring) < MIN_DOCSTRING_CHARACTERS:
            continue
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        source = textwrap.dedent("\n".join(lines[first - 1 : node.end_lineno]))
        if len(source) > MAX_FUNCTION_CHARACTERS or not stands_alone(source):
            continue
        kind = "method" if name.count(".") > module.count(".") + 1 else "function"
        request = f"Write this {kind} of `{name.rpartition('.')[0]}`.\n\n{signature(node)}\n\n{docstring}"
        messages = [{"role": "user", "content": request}, {"role": "assistant", "content": source}]
        yield {"messages": messages, "path": file.path, "line": first}


def is_short(pair: dict[str, Any]) -> bool:
    """Whether the answer of a row is short enough to be asked for."""
    return len(pair["messages"][1]["content"]) <= MAX_ANSWER_CHARACTERS


def signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """The first line of a function, as the answer to its row has it where the source is on one line."""
    asynchronous = "async " if isinstance(node, ast.AsyncFunctionDef) else ""
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{asynchronous}def {node.name}({ast.unparse(node.args)}){returns}:"


def described(pair: dict[str, Any]) -> dict[str, Any]:
    """The row of `pair` the other way round: its function is given, and its docstring answered.

    The base model is pretrained on these rows, so that it knows the form of a conversation and where a turn ends, but
    not the task of `pairs-train.jsonl.gz`.
    """
    source = pair["messages"][1]["content"]
    request = f"Describe this function.\n\n{source}"
    answer = pair["messages"][0]["content"].split("\n\n", 2)[2]
    messages = [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "path": pair["path"], "line": pair["line"]}


def functions(tree: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function under `tree` with its qualified name, except those local to another function."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{prefix}.{node.name}", node
        elif isinstance(node, ast.ClassDef):
            yield from functions(node, f"{prefix}.{node.name}")
        elif isinstance(node, ast.If | ast.Try | ast.With):
            yield from functions(node, prefix)


def stands_alone(source: str) -> bool:
    """Whether `source` parses by itself, which a string that reaches into the margin prevents: it stops `dedent`."""
    try:
        ast.parse(source)
    except SyntaxError:
        return False
    return True


def unique(pairs: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The first pair of each answer; training files come first, so no held-out answer was seen in training."""
    seen: set[str] = set()
    for pair in pairs:
        answer = pair["messages"][1]["content"]
        if answer not in seen:
            seen.add(answer)
            yield pair


def sources_table(files: list[SourceFile]) -> str:
    """What the corpus was made from: a header, then one line a file."""
    lines = [f"# Python {platform.python_version()}", "# path, bytes taken, sha256 of the whole file, split"]
    for file in files:
        split = "heldout" if file.held_out else "train"
        lines.append(f"{file.path}  {len(file.text.encode())}  {file.sha256}  {split}")
    return "\n".join(lines) + "\n"


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Gzip without a name or a time in its header: the same rows are the same bytes."""
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=buffer, mtime=0) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    write_bytes(path, buffer.getvalue())


def write_bytes(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


if __name__ == "__main__":
    main(sys.argv[1:])
