"""The attack table: what is wrong, which command meets it, and the verdict. No traceback, no silence, no hang.

A row is refused with exit code 2 and one message that holds its words, or it is harmless and the command goes on, with
its words in what is printed.
"""

import contextlib
import gzip
import io
import json
import os
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.attacks import Ground, Run, outcome
from tests.commands import ROOT, Place, command, run_with_checkpoint, write_base, write_rows

SECONDS = 20
DEEP = "[" * 50_000
DIGITS = "9" * 5000


class Attack(NamedTuple):
    """One row of the table."""

    name: str
    make: Callable[[Ground], Run]
    refused: bool
    words: tuple[str, ...]
    marks: tuple[pytest.MarkDecorator, ...] = ()


def refused(name: str, make: Callable[[Ground], Run], *words: str, slow: bool = False) -> Attack:
    return Attack(name, make, True, words, (pytest.mark.slow,) if slow else ())


def accepted(name: str, make: Callable[[Ground], Run], *words: str) -> Attack:
    return Attack(name, make, False, words)


def then(*changes: Callable[[Ground], Any], go: Callable[[Ground], Run]) -> Callable[[Ground], Run]:
    def make(ground: Ground) -> Run:
        for change in changes:
            change(ground)
        return go(ground)

    return make


def plan(ground: Ground) -> Run:
    return ground.command("plan")


def data(ground: Ground) -> Run:
    return ground.command("data")


def load(ground: Ground) -> Run:
    return ground.load()


# --- config.json: `plan` ---


def config(**changes: Any) -> Callable[[Ground], Run]:
    return then(lambda ground: ground.change("base/config.json", **changes), go=plan)


def config_text(content: str | bytes) -> Callable[[Ground], Run]:
    return then(lambda ground: ground.write("base/config.json", content), go=plan)


def replaced(path: str, by: Callable[[Path], Any]) -> Callable[[Ground], Any]:
    """Put something that is no regular file in the place of one."""

    def change(ground: Ground) -> None:
        (ground.folder / path).unlink(missing_ok=True)
        by(ground.folder / path)

    return change


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
CONFIG = [
    refused("config: deep", config_text(DEEP), "config.json", "nested"),
    refused("config: long integer", config_text(f'{{"model_type": {DIGITS}}}'), "config.json", "5,000 digits"),
    refused("config: not UTF-8", config_text(b'{"a": "\xff"}'), "config.json", "UTF-8"),
    refused("config: UTF-16", config_text('{"a": 1}'.encode("utf-16")), "config.json"),
    refused("config: empty", config_text(""), "config.json"),
    refused("config: half", config_text('{"model_type": "qwen3'), "config.json", "not JSON"),
    refused("config: list at the top", config_text("[]"), "config.json"),
    refused("config: null", config_text("null"), "config.json"),
    refused("config: half a character", config_text('{"model_type": "\\ud800"}'), "config.json"),
    refused("config: other family", config(model_type="llama"), "llama"),
    refused("config: family a list", config(model_type=["qwen3_next"]), "model_type"),
    refused("config: layers as text", config(num_hidden_layers="4"), "num_hidden_layers"),
    refused("config: no layer", config(num_hidden_layers=0), "num_hidden_layers"),
    refused("config: negative layers", config(num_hidden_layers=-4), "num_hidden_layers"),
    refused("config: layers true", config(num_hidden_layers=True), "num_hidden_layers"),
    refused("config: layers 4.5", config(num_hidden_layers=4.5), "num_hidden_layers"),
    refused("config: 1e9 layers", config(num_hidden_layers=10**9), "num_hidden_layers"),
    refused("config: 1e9 experts", config(num_experts=10**9), "num_experts"),
    refused("config: interval 0", config(full_attention_interval=0, layer_types=...), "full_attention_interval"),
    refused("config: interval -1", config(full_attention_interval=-1, layer_types=...), "full_attention_interval"),
    refused("config: kv heads 0", config(num_key_value_heads=0), "num_key_value_heads"),
    refused("config: kv heads 3", config(num_key_value_heads=3), "num_attention_heads"),
    refused("config: hidden size 0", config(hidden_size=0), "hidden_size"),
    refused("config: hidden size NaN", config(hidden_size=float("nan")), "hidden_size"),
    refused("config: vocabulary -1", config(vocab_size=-1), "vocab_size"),
    refused("config: layer types nested", config(layer_types=[["full_attention"]] * 4), "layer_types"),
    refused("config: layer types a string", config(layer_types="full_attention"), "layer_types"),
    refused("config: layer types unknown", config(layer_types=["mamba"] * 4), "layer_types"),
    refused("config: too few layer types", config(layer_types=["full_attention"]), "layer_types"),
    refused("config: rotary factor 2", config(partial_rotary_factor=2, rope_parameters=...), "partial_rotary_factor"),
    refused("config: rotary factor 0", config(partial_rotary_factor=0, rope_parameters=...), "partial_rotary_factor"),
    refused("config: rotary text", config(rope_parameters="default"), "rope_parameters"),
    refused("config: yarn", config(rope_parameters=YARN), "yarn"),
    refused("config: yarn beside default", config(rope_scaling=YARN, rope_parameters={"rope_type": "default"}), "yarn"),
    refused("config: top k 0", config(num_experts_per_tok=0), "num_experts_per_tok"),
    refused("config: top k above experts", config(num_experts_per_tok=99), "num_experts_per_tok"),
    refused("config: epsilon text", config(rms_norm_eps="1e-6"), "rms_norm_eps"),
    refused("config: epsilon negative", config(rms_norm_eps=-1.0), "rms_norm_eps"),
    accepted("config: dense layer -1", config(mlp_only_layers=[-1]), "parameters"),
    refused("config: dense layers a number", config(mlp_only_layers=3), "mlp_only_layers"),
    refused("config: step 0", config(decoder_sparse_step=0), "decoder_sparse_step"),
    refused("config: other activation", config(hidden_act="relu"), "hidden_act"),
    refused("config: float8", config(quantization_config={"quant_method": "fp8"}), "quantization_config"),
    accepted("config: unknown key", config(my_note="x"), "parameters"),
    accepted("config: key twice", lambda ground: twice_in_config(ground), "parameters"),
    refused("config: FIFO", then(replaced("base/config.json", os.mkfifo), go=plan), "config.json", "FIFO"),
    refused("config: folder", then(replaced("base/config.json", Path.mkdir), go=plan), "config.json", "folder"),
    refused(
        "config: device", then(replaced("base/config.json", lambda at: at.symlink_to("/dev/zero")), go=plan), "device"
    ),
    refused(
        "config: link to itself", then(replaced("base/config.json", lambda at: at.symlink_to(at)), go=plan), "config"
    ),
    refused(
        "config: gone", then(replaced("base/config.json", lambda at: None), go=plan), "config.json", "no such file"
    ),
]


def twice_in_config(ground: Ground) -> Run:
    text = (ground.base / "config.json").read_text()
    ground.write("base/config.json", text.rstrip().rstrip("}") + ', "use_cache": true, "use_cache": false}')
    return plan(ground)


# --- weights: read as a run reads them when it starts ---


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Ground], Run]:
    def apply(ground: Ground) -> None:
        path = ground.base / "model.safetensors"
        found = load_file(path)
        change(found)
        path.unlink()
        save_file(found, path, metadata={"format": "pt"})

    return then(apply, go=load)


def header(text: str | bytes, length: int | None = None) -> Callable[[Ground], Run]:
    content = text.encode() if isinstance(text, str) else text
    written = struct.pack("<Q", len(content) if length is None else length) + content
    return then(lambda ground: ground.write("base/model.safetensors", written), go=load)


def index(weight_map: Any, text: str | None = None) -> Callable[[Ground], Run]:
    def apply(ground: Ground) -> None:
        (ground.base / "model.safetensors").rename(ground.base / "part.safetensors")
        content = text if text is not None else json.dumps({"weight_map": weight_map})
        ground.write("base/model.safetensors.index.json", content)

    return then(apply, go=load)


def to_dtype(dtype: torch.dtype) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda found: found.update({name: tensor.to(dtype) for name, tensor in found.items()})


EMBEDDING = "model.embed_tokens.weight"
WEIGHTS = [
    refused("weights: deep header", header(DEEP), "model.safetensors"),
    refused("weights: long integer", header(f'{{"a": {DIGITS}}}'), "model.safetensors"),
    refused("weights: header is a list", header("[]"), "model.safetensors"),
    refused("weights: header of 2^63 bytes", header("{}", 2**63), "model.safetensors"),
    refused(
        "weights: empty file", then(lambda g: g.write("base/model.safetensors", b""), go=load), "model.safetensors"
    ),
    refused(
        "weights: a picture", then(lambda g: g.write("base/model.safetensors", b"\x89PNG" * 9), go=load), "model.saf"
    ),
    refused("weights: FIFO", then(replaced("base/model.safetensors", os.mkfifo), go=load), "FIFO"),
    refused(
        "weights: device",
        then(replaced("base/model.safetensors", lambda at: at.symlink_to("/dev/zero")), go=load),
        "dev",
    ),
    refused("weights: folder", then(replaced("base/model.safetensors", Path.mkdir), go=load), "model.safetensors"),
    refused(
        "weights: cut short", then(lambda g: os.truncate(g.base / "model.safetensors", 4000), go=load), "model.safetens"
    ),
    refused("weights: a tensor less", tensors(lambda found: found.pop(EMBEDDING)), EMBEDDING, "missing"),
    refused("weights: a tensor more", tensors(lambda found: found.update(x=torch.ones(2))), "x", "unknown"),
    refused(
        "weights: another shape", tensors(lambda found: found.update({EMBEDDING: torch.ones(3, 3)})), EMBEDDING, "shape"
    ),
    refused("weights: NaN in a row", tensors(lambda found: found[EMBEDDING][7].fill_(float("nan"))), EMBEDDING),
    refused("weights: infinity", tensors(lambda found: found[EMBEDDING][7].fill_(float("inf"))), EMBEDDING),
    refused("weights: int8", tensors(to_dtype(torch.int8)), "I8"),
    refused("weights: bool", tensors(to_dtype(torch.bool)), "BOOL"),
    refused("weights: float8", tensors(to_dtype(torch.float8_e4m3fn)), "F8_E4M3"),
    refused("weights: int64", tensors(to_dtype(torch.int64)), "I64"),
    accepted("weights: float64", tensors(to_dtype(torch.float64))),
    accepted("weights: bfloat16", tensors(to_dtype(torch.bfloat16))),
    refused("index: deep", index(None, DEEP), "index.json", "nested"),
    refused("index: long integer", index(None, f'{{"weight_map": {DIGITS}}}'), "index.json"),
    refused("index: a list", index(None, "[]"), "index.json"),
    refused("index: map a list", index(["part.safetensors"]), "index.json"),
    refused("index: empty map", index({}), "index.json"),
    refused("index: file a number", index({EMBEDDING: 3}), "index.json"),
    refused("index: file gone", index({EMBEDDING: "gone.safetensors"}), "gone.safetensors"),
    refused("index: outside the folder", index({EMBEDDING: "../other.safetensors"}), "../other.safetensors"),
    refused("index: absolute", index({EMBEDDING: "/etc/hostname"}), "/etc/hostname"),
    refused("index: the folder itself", index({EMBEDDING: "."}), "index.json"),
    refused("index: a tensor that is not there", index({"nothing": "part.safetensors"}), "part.safetensors"),
    refused("index: NUL in a name", index({EMBEDDING: "a\x00b"}), "index.json"),
]

# --- tokenizer: `data` ---


def tokenizer(name: str, content: str | bytes) -> Callable[[Ground], Run]:
    return then(lambda ground: ground.write(f"base/{name}", content), go=data)


def tokenizer_key(name: str, **changes: Any) -> Callable[[Ground], Run]:
    return then(lambda ground: ground.change(f"base/{name}", **changes), go=data)


TOKENIZER = [
    refused("tokenizer: empty object", tokenizer("tokenizer.json", "{}"), "tokenizer"),
    refused("tokenizer: null", tokenizer("tokenizer.json", "null"), "tokenizer.json"),
    refused("tokenizer: deep", tokenizer("tokenizer.json", DEEP), "tokenizer.json"),
    refused("tokenizer: not UTF-8", tokenizer("tokenizer.json", b'"\xff"'), "tokenizer.json"),
    refused("tokenizer: empty file", tokenizer("tokenizer.json", ""), "tokenizer.json"),
    refused("tokenizer: model a number", tokenizer_key("tokenizer.json", model=3), "tokenizer"),
    accepted("tokenizer: added tokens text", tokenizer_key("tokenizer.json", added_tokens="x"), "24 rows"),
    accepted("tokenizer: control tokens in its config", tokenizer_key("tokenizer.json", added_tokens=[]), "24 rows"),
    refused("tokenizer config: a list", tokenizer("tokenizer_config.json", "[]"), "tokenizer_config.json"),
    refused("tokenizer config: deep", tokenizer("tokenizer_config.json", DEEP), "tokenizer_config.json"),
    accepted("tokenizer config: no end", tokenizer_key("tokenizer_config.json", eos_token=...), "24 rows"),
    refused("tokenizer config: end a number", tokenizer_key("tokenizer_config.json", eos_token=3), "tokenizer"),
    refused(
        "tokenizer config: end unknown", tokenizer_key("tokenizer_config.json", eos_token="<nothing>"), "<nothing>"
    ),
    accepted("tokenizer config: class unknown", tokenizer_key("tokenizer_config.json", tokenizer_class="X"), "24 rows"),
    refused("tokenizer: FIFO", then(replaced("base/tokenizer.json", os.mkfifo), go=data), "tokenizer.json"),
    refused("tokenizer: gone", then(replaced("base/tokenizer.json", lambda at: None), go=data), "tokenizer.json"),
    refused("tokenizer: more tokens than rows", lambda ground: smaller_embedding(ground), "embedding", "3,000 rows"),
]


def smaller_embedding(ground: Ground) -> Run:
    ground.change("base/config.json", vocab_size=3000)
    return data(ground)


# --- rows: `data` ---

TALK = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]


def row(content: str | bytes | dict[str, Any], name: str = "rows.jsonl") -> Callable[[Ground], Run]:
    """Two good rows, the second line this one."""

    def make(ground: Ground) -> Run:
        line = json.dumps(content) if isinstance(content, dict) else content
        good = json.dumps({"messages": TALK}).encode()
        whole = b"\n".join([good, line.encode("utf-8", "surrogatepass") if isinstance(line, str) else line, good, b""])
        whole = gzip.compress(whole) if name.endswith(".gz") else whole
        ground.write(name, whole)
        return ground.command("data", data__train=f"[{{path: {ground.folder / name}}}]")

    return make


def file(name: str, content: str | bytes) -> Callable[[Ground], Run]:
    def make(ground: Ground) -> Run:
        ground.write(name, content)
        return ground.command("data", data__train=f"[{{path: {ground.folder / name}}}]")

    return make


def talk(turn: dict[str, Any], **columns: Any) -> dict[str, Any]:
    return {"messages": [TALK[0], turn], **columns}


def call(arguments: str) -> str:
    """An assistant turn that calls a tool, its arguments written as they are."""
    return (
        '{"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "", "tool_calls": '
        f'[{{"type": "function", "function": {{"name": "f", "arguments": {arguments}}}}}]}}]}}'
    )


SECOND = "rows.jsonl:2"
ROWS = [
    refused("row: deep", row(DEEP), SECOND, "nested"),
    refused("row: 900 deep", row('{"text": ' + "[" * 900 + "]" * 900 + "}"), SECOND, "nested"),
    refused("row: deep arguments", row(call(json.dumps("[" * 5000))), SECOND, "nested"),
    refused("row: long integer", row(f'{{"messages": [], "n": {DIGITS}}}'), SECOND, "5,000 digits"),
    refused("row: key twice", row('{"text": "a", "text": "b"}'), SECOND, "twice"),
    refused("row: argument twice", row(call('{"x": 1, "x": 2}')), SECOND, "twice"),
    refused("row: NaN in arguments", row(call('{"x": NaN}')), SECOND, "nan"),
    refused("row: infinity in arguments", row(call('{"x": 1e999}')), SECOND, "inf"),
    refused(
        "row: half a character",
        row('{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "A"}]}'),
        SECOND,
        "surrogate",
    ),
    refused("row: NUL byte", row(b'{"text": "a\x00"}'), SECOND, "not JSON"),
    refused("row: Latin-1", row('{"text": "é"}'.encode("latin-1")), SECOND, "UTF-8"),
    refused("row: a list", row("[1]"), SECOND, "a list"),
    refused("row: a number", row("1"), SECOND, "a number"),
    refused("row: nothing known", row({"body": "x"}), SECOND, "body"),
    refused("row: messages text", row({"messages": "hello"}), SECOND, "messages"),
    refused("row: messages null", row({"messages": None}), SECOND, "messages"),
    refused("row: messages of numbers", row({"messages": [1, 2]}), SECOND, "messages[0]"),
    refused("row: role a list", row({"messages": [{"role": ["user"], "content": "Q"}, TALK[1]]}), SECOND, "role"),
    refused(
        "row: role unknown", row({"messages": [{"role": "narrator", "content": "Q"}, TALK[1]]}), SECOND, "narrator"
    ),
    refused(
        "row: role with control characters", row({"messages": [{"role": "\x1b[2J", "content": "Q"}, TALK[1]]}), SECOND
    ),
    refused("row: content a number", row(talk({"role": "assistant", "content": 3})), SECOND, "content"),
    refused("row: content an object", row(talk({"role": "assistant", "content": {"a": 1}})), SECOND, "content"),
    refused("row: a picture", row(talk({"role": "assistant", "content": [{"type": "image", "image": "x"}]})), SECOND),
    refused("row: weight 7", row(talk({**TALK[1], "weight": 7})), SECOND, "weight"),
    refused("row: weight a list", row(talk({**TALK[1], "weight": []})), SECOND, "weight"),
    refused("row: calls a number", row(talk({**TALK[1], "tool_calls": 3})), SECOND, "tool_calls"),
    refused("row: call without a name", row(talk({**TALK[1], "tool_calls": [{}]})), SECOND, "tool_calls"),
    refused("row: arguments not JSON", row(call('"{"')), SECOND, "arguments"),
    refused("row: tools of numbers", row(talk(TALK[1], tools=[3])), SECOND, "tools[0]"),
    refused("row: only a user", row({"messages": TALK[:1]}), SECOND, "assistant"),
    refused("row: the assistant first", row({"messages": [TALK[1]]}), SECOND, "assistant"),
    refused("row: empty text", row({"text": " "}), SECOND, "empty"),
    refused("row: prompt a list, completion text", row({"prompt": [], "completion": "x"}), SECOND, "prompt"),
    refused("row: history of text", row({"instruction": "a", "output": "b", "history": ["x"]}), SECOND, "history"),
    refused("row: over-long column name", row({"x" * 5000: 1}), SECOND),
    refused("row: line end in a column name", row({"a\nb": 1}), SECOND, "a b"),
    accepted("row: NaN where it is not used", row('{"messages": ' + json.dumps(TALK) + ', "score": NaN}'), "3 rows"),
    accepted("row: a control token as text", row(talk({"role": "assistant", "content": "<|im_end|>"})), "3 rows"),
    accepted("row: blank lines", row("\n\n \n"), "2 rows"),
    refused(
        "gz: cut short", file("a.jsonl.gz", gzip.compress(json.dumps({"text": "x" * 999}).encode())[:-9]), "a.jsonl.gz"
    ),
    refused("gz: no gzip", file("a.jsonl.gz", "{}"), "a.jsonl.gz", "gzip"),
    refused("gz: bad row", row("{", "a.jsonl.gz"), "a.jsonl.gz:2"),
    refused(
        "gz: line of 70 MB", row(b'{"text": "' + b"x" * 70_000_000 + b'"}', "a.jsonl.gz"), "a.jsonl.gz:2", "64 MiB"
    ),
    refused("json: half", file("a.json", '[{"text": "a"}, {"text": '), "a.json:1"),
    refused("json: deep", file("a.json", DEEP), "a.json:1", "nested"),
    refused("json: not UTF-8", file("a.json", b'[{"text": "\xff"}]'), "a.json:1", "UTF-8"),
    refused("json: something behind the list", file("a.json", '[{"text": "a"}] x'), "a.json:1"),
    refused("json: numbers", file("a.json", "[1, 2]"), "a.json:1", "a number"),
    refused("parquet: garbage", file("a.parquet", b"PAR1" + b"\xff" * 99 + b"PAR1"), "a.parquet"),
    refused("parquet: empty", file("a.parquet", b""), "a.parquet"),
    refused("text: not UTF-8", file("a.py", b"x = '\xff'"), "a.py", "UTF-8"),
    refused("text: empty", file("a.py", ""), "a.py"),
    refused("archive", file("a.tar", b"x"), ".tar"),
]


def parquet(columns: dict[str, Any]) -> Callable[[Ground], Run]:
    def make(ground: Ground) -> Run:
        pyarrow.parquet.write_table(pyarrow.table(columns), ground.folder / "a.parquet")
        return ground.command("data", data__train=f"[{{path: {ground.folder / 'a.parquet'}}}]")

    return make


def source(path: str, *made: Callable[[Ground], Any], **changes: Any) -> Callable[[Ground], Run]:
    """`data` on a path below the ground."""

    def make(ground: Ground) -> Run:
        for one in made:
            one(ground)
        where = path if path.startswith("/") else f"{ground.folder}/{path}"
        return ground.command("data", data__train=f"[{{path: '{where}'}}]", **changes)

    return make


FILES = [
    refused("parquet: bytes", parquet({"text": pyarrow.array([b"\xff"], pyarrow.binary())}), "a.parquet: row 1"),
    refused("parquet: dates", parquet({"text": pyarrow.array([1], pyarrow.timestamp("s"))}), "a.parquet: row 1"),
    refused("parquet: no rows", parquet({"text": pyarrow.array([], pyarrow.string())}), "no rows"),
    refused("file: FIFO", source("a.jsonl", replaced("a.jsonl", os.mkfifo)), "a.jsonl", "FIFO"),
    refused("file: device", source("/dev/zero"), "/dev/zero", "device"),
    refused("file: endless device", source("/dev/urandom"), "/dev/urandom", "device"),
    refused("file: dangling link", source("a.jsonl", replaced("a.jsonl", lambda at: at.symlink_to("gone"))), "a.jsonl"),
    refused("file: link to itself", source("a.jsonl", replaced("a.jsonl", lambda at: at.symlink_to(at))), "a.jsonl"),
    refused(
        "folder: FIFO inside",
        source("in", lambda g: (g.folder / "in").mkdir(), replaced("in/a.jsonl", os.mkfifo)),
        "FIFO",
    ),
    refused("folder: empty", source("in", lambda g: (g.folder / "in").mkdir()), "no files"),
    refused("glob: the whole machine", source("/**"), "every file of this machine"),
    refused("glob: the whole machine by type", source("/**/*.jsonl"), "every file of this machine"),
    refused("folder: the whole machine", source("/"), "every file of this machine"),
    refused("glob: nothing", source("*.nothing"), "*.nothing"),
    refused("path: NUL", source("a\\0b"), "a"),
    refused("path: too long", source("x" * 5000), "path"),
    accepted("folder: linked into itself", source("in", lambda g: looped(g)), "1 rows"),
]


def looped(ground: Ground) -> None:
    ground.write("in/a.jsonl", json.dumps({"messages": TALK}))
    (ground.folder / "in/again").symlink_to(ground.folder / "in")


# --- chat templates: `data` ---


def template(text: str) -> Callable[[Ground], Run]:
    """This before the base's own template."""

    def apply(ground: Ground) -> None:
        whole = (ground.base / "chat_template.jinja").read_text()
        ground.write("base/chat_template.jinja", text + whole)

    return then(apply, go=data)


TEMPLATES = [
    refused("template: division by zero", template("{{ 1 / 0 }}"), "chat template", "division by zero"),
    refused(
        "template: long range", template("{% for i in range(10**9) %}x{% endfor %}"), "chat template", "Range too big"
    ),
    refused("template: unknown filter", template("{{ x | nosuch }}"), "chat template", "nosuch"),
    refused("template: unfinished", template("{% if x %}"), "chat template"),
    refused("template: include", template("{% include 'x' %}"), "chat template"),
    refused("template: endless macro", template("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"), "chat template"),
    refused("template: private attribute", template("{{ ''.__class__.__mro__[1].__subclasses__() }}"), "chat template"),
    refused("template: too many blocks", template("{% for a in b %}" * 30 + "{% endfor %}" * 30), "chat template"),
    refused("template: half a character", template("{{ '\ud800' }}"), "base"),
    refused(
        "template: raises with lines", template("{{ raise_exception('no\\n\\x1b[2Jsuch') }}"), "chat template", "no"
    ),
    refused("template: 1e11 characters", template("{{ 'a' * 10**11 }}"), "chat template"),
    refused("template: padded", template("{{ 'a'.ljust(10**11) }}"), "chat template"),
    refused("template: power", template("{{ 9 ** 9999999999 }}"), "chat template", "4 s", slow=True),
    refused(
        "template: loops",
        template("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"),
        "chat template",
        "4 s",
        slow=True,
    ),
    refused(
        "template: no prompt",
        then(lambda g: g.write("base/chat_template.jinja", "x"), go=data),
        "add_generation_prompt",
    ),
    refused("template: FIFO", then(replaced("base/chat_template.jinja", os.mkfifo), go=data), "chat_template.jinja"),
]

# --- recipes and overrides: `plan` ---


def recipe(text: str | bytes) -> Callable[[Ground], Run]:
    def make(ground: Ground) -> Run:
        ground.write("my.yaml", text)
        return ["plan", "--recipe", str(ground.folder / "my.yaml"), *ground.settings()]

    return make


def override(**changes: Any) -> Callable[[Ground], Run]:
    return lambda ground: ground.command("plan", **changes)


RECIPES = [
    refused("recipe: empty", recipe(""), "my.yaml"),
    refused("recipe: deep", recipe("a: " + "[" * 5000), "my.yaml"),
    refused("recipe: not UTF-8", recipe(b"model: \xff"), "my.yaml", "UTF-8"),
    refused("recipe: NUL", recipe("model: \x00"), "my.yaml"),
    refused("recipe: a list", recipe("- model"), "my.yaml"),
    refused("recipe: key twice", recipe("model: {path: a}\nmodel: {path: b}"), "my.yaml:2", "model"),
    refused("recipe: anchors", recipe("model: &a {path: x}\ntrain: *a"), "my.yaml"),
    refused("recipe: tag", recipe("model: !!python/object:os.system {path: x}"), "my.yaml:1"),
    refused("recipe: unknown key", recipe("modl: {path: x}"), "my.yaml:1", "modl"),
    refused("recipe: folder", lambda ground: ["plan", "--recipe", str(ground.folder)], "ground"),
    refused("recipe: gone", lambda ground: ["plan", "--recipe", str(ground.folder / "none.yaml")], "none.yaml"),
    refused("recipe: device", lambda ground: ["plan", "--recipe", "/dev/zero"], "/dev/zero"),
    refused(
        "recipe: FIFO",
        then(lambda g: os.mkfifo(g.folder / "f.yaml"), go=lambda g: ["plan", "--recipe", f"{g.folder}/f.yaml"]),
        "f.yaml",
    ),
    refused("recipe: -x.yaml", lambda ground: ["plan", "--recipe", "-x.yaml"], "--recipe"),
    refused("set: no value", lambda g: [*g.command("plan"), "--set", "optim.lr"], "optim.lr"),
    refused("set: unknown", lambda g: [*g.command("plan"), "--set", "optim.rate=1"], "optim.rate"),
    refused("set: control characters", lambda g: [*g.command("plan"), "--set", "name=\x1b[2J"], "name"),
    refused("set: long integer", lambda g: [*g.command("plan"), "--set", f"train.steps={DIGITS}"], "train.steps"),
    refused("steps 0", override(train__steps=0), "train.steps"),
    refused("steps -1", override(train__steps=-1), "train.steps"),
    refused("steps 1e9 as text", override(train__steps="'1e9'"), "train.steps"),
    refused("steps true", override(train__steps="true"), "train.steps"),
    refused("sequence of 1", override(train__sequence_tokens=1, train__micro_batch_tokens=1), "train.sequence_tokens"),
    refused("rate NaN", override(optim__lr=".nan"), "optim.lr"),
    refused("rate infinite", override(optim__lr=".inf"), "optim.lr"),
    refused("rate negative", override(optim__lr=-1), "optim.lr"),
    refused("name with a slash", override(name="a/b"), "name"),
    refused("name ..", override(name=".."), "name"),
    refused("name of 300 characters", override(name="x" * 300), "name"),
    refused("name half a character", override(name='"\\ud800"'), "name"),
    refused("output a file", lambda g: g.command("finished", output__dir=g.rows), "output.dir"),
    refused("output too long", override(output__dir="/x" * 3000), "output.dir"),
    refused("model a file", lambda g: g.command("plan", model__path=g.rows), "model.path"),
    refused("model gone", override(model__path="/nowhere/at/all"), "model.path"),
    refused("model NUL", override(model__path='"a\\0b"'), "model.path"),
    refused("expert 3", override(parallel__expert=3), "parallel"),
    refused("targets unknown", override(lora__targets="[nothing]"), "lora.targets"),
    refused("targets empty", override(lora__targets="[]"), "lora.targets"),
    refused("rank 0", override(lora__rank=0), "lora.rank"),
    refused("a secret", override(name="hf_abcdefghijklmnopqrstuvwxyzABCDEFGH"), "token"),
]

# --- a run's folder ---


def in_run(path: str, content: str | bytes, command: str) -> Callable[[Ground], Run]:
    def make(ground: Ground) -> Run:
        made_run(ground)
        ground.write(f"runs/tiny/{path}", content)
        return commanded(ground, command)

    return make


def without_checkpoints(recipe: str | bytes) -> Callable[[Ground], Run]:
    def make(ground: Ground) -> Run:
        what = in_run("recipe.yaml", recipe, "summary")(ground)
        shutil.rmtree(ground.run / "checkpoints")
        return what

    return make


def on_run(change: Callable[[Path], Any], command: str) -> Callable[[Ground], Run]:
    def make(ground: Ground) -> Run:
        made_run(ground)
        change(ground.run)
        return commanded(ground, command)

    return make


def made_run(ground: Ground) -> None:
    run_with_checkpoint(Place(ground.folder), "tiny")
    ground.write("runs/tiny/metrics.jsonl", '{"kind": "start", "step": 0}\n{"kind": "end", "step": 1}\n')


def commanded(ground: Ground, command: str) -> Run:
    if command == "finished":
        return [
            "finished",
            "--recipe",
            str(ROOT / "recipes/tiny.yaml"),
            *Place(ground.folder).settings(name="tiny"),
        ]
    if command == "replay":
        return ["replay", str(ground.run / "crash/step-1")]
    if command == "summary":
        return ["summary", str(ground.run)]
    return ["export", str(ground.run), "--to", str(ground.folder / "out"), "--format", command]


STEP = "checkpoints/step-1"
RUNS = [
    refused("finished: garbage", in_run("finished.json", "{", "finished"), "finished.json"),
    refused("finished: no step", in_run("finished.json", "{}", "finished"), "finished.json"),
    refused("finished: step text", in_run("finished.json", '{"step": "all"}', "finished"), "finished.json"),
    refused("finished: step NaN", in_run("finished.json", '{"step": NaN}', "finished"), "finished.json"),
    refused("finished: step true", in_run("finished.json", '{"step": true}', "finished"), "finished.json"),
    refused("finished: deep", in_run("finished.json", DEEP, "finished"), "finished.json"),
    refused("finished: not UTF-8", in_run("finished.json", b"\xff", "finished"), "finished.json"),
    refused("finished: folder", on_run(lambda run: (run / "finished.json").mkdir(), "finished"), "finished.json"),
    refused("finished: FIFO", on_run(lambda run: os.mkfifo(run / "finished.json"), "finished"), "finished.json"),
    refused("stopped: garbage", in_run("stopped.json", "[]", "finished"), "stopped.json"),
    # The recipe that counts is in the checkpoint; the file is for people.
    accepted("run recipe: garbage", in_run("recipe.yaml", "[[[", "summary"), "findings"),
    accepted("run recipe: not UTF-8", in_run("recipe.yaml", b"\xff", "summary"), "findings"),
    accepted(
        "run recipe: folder",
        on_run(lambda run: ((run / "recipe.yaml").unlink(), (run / "recipe.yaml").mkdir()), "summary"),
        "findings",
    ),
    refused("run recipe: garbage, no checkpoint", without_checkpoints("[[["), "recipe.yaml"),
    refused("run recipe: not UTF-8, no checkpoint", without_checkpoints(b"\xff"), "recipe.yaml"),
    refused("run recipe: deep, no checkpoint", without_checkpoints("a: " + DEEP), "recipe.yaml"),
    refused("metrics: deep", in_run("metrics.jsonl", DEEP + "\n", "summary"), "metrics.jsonl"),
    refused("metrics: a number", in_run("metrics.jsonl", "1\n", "summary"), "metrics.jsonl"),
    refused(
        "metrics: step text", in_run("metrics.jsonl", '{"kind": "start", "step": "x"}\n', "summary"), "metrics.jsonl"
    ),
    refused(
        "metrics: loss a list",
        in_run("metrics.jsonl", '{"kind": "eval", "step": 0, "loss": []}\n' * 2, "summary"),
        "metrics.jsonl",
    ),
    refused("metrics: not UTF-8", in_run("metrics.jsonl", b"\xff\n", "summary"), "metrics.jsonl"),
    refused("metrics: gone", on_run(lambda run: (run / "metrics.jsonl").unlink(), "summary"), "metrics.jsonl"),
    refused(
        "routing: garbage",
        in_run("routing/step-00000001.npz", b"PK\x03\x04" + b"x" * 99, "summary"),
        "step-00000001.npz",
    ),
    refused("routing: empty", in_run("routing/step-00000001.npz", b"", "summary"), "step-00000001.npz"),
    refused("manifest: garbage", in_run(f"{STEP}/manifest.json", "{", "adapter"), "none of its checkpoints is whole"),
    refused("manifest: deep", in_run(f"{STEP}/manifest.json", DEEP, "adapter"), "none of its checkpoints is whole"),
    refused(
        "manifest: long integer", in_run(f"{STEP}/manifest.json", DIGITS, "adapter"), "none of its checkpoints is whole"
    ),
    refused("manifest: a list", in_run(f"{STEP}/manifest.json", "[]", "adapter"), "none of its checkpoints is whole"),
    refused(
        "manifest: gone",
        on_run(lambda run: (run / STEP / "manifest.json").unlink(), "adapter"),
        "none of its checkpoints is whole",
    ),
    refused(
        "part: empty",
        on_run(lambda run: next((run / STEP).glob("*.safetensors")).write_bytes(b""), "adapter"),
        "none of its checkpoints is whole",
    ),
    refused("checkpoints: none", on_run(lambda run: shutil.rmtree(run / "checkpoints"), "adapter"), "tiny"),
    refused(
        "checkpoints: a file",
        on_run(lambda run: (shutil.rmtree(run / "checkpoints"), (run / "checkpoints").touch()), "adapter"),
        "tiny",
    ),
    refused(
        "export: onto a file", on_run(lambda run: (run.parent.parent / "out").write_text("mine"), "adapter"), "out"
    ),
    refused(
        "export: into a folder in use",
        on_run(lambda run: ((run.parent.parent / "out").mkdir(), (run.parent.parent / "out/mine").touch()), "adapter"),
        "out",
    ),
    refused(
        "export: to .",
        lambda g: (made_run(g), ["export", str(g.run), "--to", ".", "--format", "adapter"])[1],
        "already exists",
    ),
    refused(
        "export: to nothing",
        lambda g: (made_run(g), ["export", str(g.run), "--to", "", "--format", "adapter"])[1],
        "--to",
    ),
    refused(
        "export: to /", lambda g: (made_run(g), ["export", str(g.run), "--to", "/", "--format", "adapter"])[1], "/"
    ),
    refused(
        "export: no run",
        lambda g: ["export", str(g.folder), "--to", str(g.folder / "o"), "--format", "merged"],
        "recipe.yaml",
    ),
    refused(
        "export: unknown step",
        lambda g: (made_run(g), [*commanded(g, "adapter"), "--checkpoint", "step-9"])[1],
        "step-9",
    ),
    refused(
        "export: step with a path",
        lambda g: (made_run(g), [*commanded(g, "adapter"), "--checkpoint", "../x"])[1],
        "../x",
    ),
    refused("replay: no step", lambda g: (made_run(g), ["replay", str(g.run / "crash/step-1")])[1], "step-1"),
    refused("replay: garbage", in_run("crash/step-1/step.json", DEEP, "replay"), "step-1"),
    accepted("export: an adapter", on_run(lambda run: None, "adapter"), "read back from the disk"),
]


# --- hostfiles ---


def hostfile(text: str | bytes) -> Callable[[Ground], Run]:
    return then(lambda ground: ground.write("hosts", text), go=lambda ground: ["hosts", str(ground.folder / "hosts")])


HOSTS = [
    refused("hosts: empty", hostfile(""), "hosts"),
    refused("hosts: no slots", hostfile("node1\n"), "hosts:1"),
    refused("hosts: slots 0", hostfile("node1 slots=0\n"), "hosts:1"),
    refused("hosts: long integer", hostfile(f"node1 slots={DIGITS}\n"), "hosts:1"),
    refused("hosts: an option of ssh", hostfile("-oProxyCommand=ls slots=1\n"), "hosts:1"),
    refused("hosts: twice", hostfile("a slots=1\na slots=1\n"), "hosts:2", "twice"),
    refused("hosts: not UTF-8", hostfile(b"\xff"), "hosts"),
    refused("hosts: control characters", hostfile("\x1b[2J slots=x\n"), "hosts:1"),
    refused(
        "hosts: FIFO",
        then(lambda g: os.mkfifo(g.folder / "hosts"), go=lambda g: ["hosts", f"{g.folder}/hosts"]),
        "hosts",
    ),
    refused("hosts: device", lambda ground: ["hosts", "/dev/zero"], "/dev/zero"),
    accepted("hosts: comments", hostfile("# mine\n\nnode1 slots=2 # x\n"), "2 1 2 node1"),
]

# --- tokenised data ---


def cached(name: str, change: Callable[[Path], Any]) -> Callable[[Ground], Run]:
    """`data` a second time, after the tokenised data was changed: it is made again, or was right."""

    def make(ground: Ground) -> Run:
        first = shown(data(ground))
        folder = next(path for path in (ground.folder / "runs/.cache").iterdir() if path.is_dir())
        change(folder / name)

        def again() -> None:
            assert shown(data(ground)) == first
            print(first)

        return again

    return make


def shown(what: Run) -> str:
    """The sequence that `data` prints; what it says about the cache is left out."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert outcome(what) == 0
    return "pack 0" + printed.getvalue().partition("pack 0")[2]


ONCE_MORE = "pack 0: "
CACHE = [
    accepted(
        "cache: tokens changed", cached("tokens.bin", lambda at: at.write_bytes(bytes(at.stat().st_size))), ONCE_MORE
    ),
    accepted(
        "cache: nothing trained", cached("trained.bin", lambda at: at.write_bytes(bytes(at.stat().st_size))), ONCE_MORE
    ),
    accepted("cache: offsets cut", cached("pack_offsets.npy", lambda at: os.truncate(at, 9)), ONCE_MORE),
    accepted("cache: offsets empty", cached("offsets.npy", lambda at: at.write_bytes(b"")), ONCE_MORE),
    accepted("cache: manifest garbage", cached("manifest.json", lambda at: at.write_text("[")), ONCE_MORE),
    accepted("cache: manifest deep", cached("manifest.json", lambda at: at.write_text(DEEP)), ONCE_MORE),
    accepted("cache: manifest gone", cached("manifest.json", Path.unlink), ONCE_MORE),
    accepted("cache: tokens gone", cached("tokens.bin", Path.unlink), ONCE_MORE),
]

TABLE = [*CONFIG, *WEIGHTS, *TOKENIZER, *ROWS, *FILES, *TEMPLATES, *RECIPES, *RUNS, *HOSTS, *CACHE]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    write_base(folder / "base")
    write_rows(folder / "train.jsonl", range(24))
    write_rows(folder / "heldout.jsonl", range(200, 206))
    return folder


@pytest.fixture
def ground(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ground:
    for name in ("RANK", "LOCAL_SIZE", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    there = Ground(tmp_path / "ground")
    there.copy_from(original)
    return there


def rows() -> Iterator[Any]:
    """Every second row always, the others when slow tests run."""
    for number, row in enumerate(TABLE):
        marks = (pytest.mark.slow,) if number % 2 and row.refused else ()
        yield pytest.param(row, id=row.name, marks=row.marks or marks)


def processor_seconds() -> float:
    """Of this process and of those that it started and that have ended."""
    return sum(os.times()[:4])


@pytest.mark.parametrize("attack", list(rows()))
def test_attack(attack: Attack, ground: Ground, capsys: pytest.CaptureFixture[str]) -> None:
    what = attack.make(ground)
    capsys.readouterr()
    began, worked = time.monotonic(), processor_seconds()
    code = outcome(what)
    seconds, work = time.monotonic() - began, processor_seconds() - worked
    printed = capsys.readouterr()
    everything = printed.out + printed.err
    assert work < SECONDS, f"{work:.0f} s of processor time"
    assert seconds < 6 * SECONDS, f"{seconds:.0f} s"  # other tests may take most of the machine meanwhile
    assert "Traceback" not in everything, everything
    assert all(character.isprintable() or character == "\n" for character in printed.err), printed.err[:500]
    assert code == (2 if attack.refused else 0), everything[-2000:]
    if attack.refused:
        assert printed.err.count("nextune: ") == 1, printed.err
        everything = printed.err.partition("nextune: ")[2]
        assert len(everything.strip()) > 20
    missing = [word for word in attack.words if isinstance(word, str) and word not in everything]
    assert not missing, f"{missing} not in: {everything[-2000:]}"


def test_the_table_is_large_and_its_names_differ() -> None:
    names = [attack.name for attack in TABLE]
    assert len(names) == len(set(names)) >= 120


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["config: FIFO", "row: deep", "template: loops", "glob: the whole machine", "set: unknown"]
)
def test_a_command_of_its_own_gives_the_same_verdict(name: str, ground: Ground) -> None:
    attack = next(row for row in TABLE if row.name == name)
    arguments = attack.make(ground)
    assert not callable(arguments)
    done = command(*arguments)
    assert done.code == 2, done.out + done.err
    assert "Traceback" not in done.out + done.err
    assert all(word in done.err for word in attack.words), done.err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["weights: int8", "weights: NaN in a row", "index: outside the folder"])
def test_training_refuses_what_a_check_of_the_weights_refuses(name: str, ground: Ground) -> None:
    attack = next(row for row in TABLE if row.name == name)
    attack.make(ground)
    done = Place(ground.folder).by_hand(name="attack")
    assert done.code == 2, done.out + done.err
    assert "Traceback" not in done.out + done.err
    assert all(word in done.err for word in attack.words), done.err
