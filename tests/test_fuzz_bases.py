"""Damaged files of a checkpoint folder: they are refused in a sentence that names the file, or they are right."""

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from tokenizers import Tokenizer as Backend

from data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from finetune.checkpoint.fingerprint import fingerprint
from finetune.checkpoint.shards import INDEX, SINGLE, open_checkpoint, read_header
from finetune.model.config import ModelConfig
from tests.configs import CONFIGS
from tests.fuzzing import changed_bytes, changed_file, changed_json, few_and_many, fuzz, verdict

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b.c": torch.ones(4, dtype=torch.bfloat16), "empty": torch.zeros(0)}


@few_and_many(40)
@pytest.mark.parametrize("name", ["base", "layer-types-top-1"])
def test_config(tmp_path: Path, examples: int, name: str) -> None:
    path = tmp_path / "config.json"

    def check(content: bytes) -> None:
        path.write_bytes(content)
        config = verdict(lambda: ModelConfig.from_folder(tmp_path), tmp_path)
        if isinstance(config, ModelConfig):
            counts = config.parameter_counts()
            assert all(isinstance(count, int) and count >= 0 for count in counts.values())
            assert len(config.moe_layers) <= config.num_hidden_layers < 10_000
            assert 0 < config.rotary_dim <= config.head_dim

    fuzz(check, changed_file(CONFIGS[name]), examples)


@few_and_many(40)
def test_index_of_weights(tmp_path: Path, examples: int) -> None:
    for number, (name, tensor) in enumerate(TENSORS.items()):
        save_file({name: tensor}, tmp_path / f"part-{number}.safetensors")
    index = {
        "metadata": {"total_size": 32},
        "weight_map": {name: f"part-{number}.safetensors" for number, name in enumerate(TENSORS)},
    }

    def check(content: bytes) -> None:
        (tmp_path / INDEX).write_bytes(content)
        found = verdict(lambda: open_checkpoint(tmp_path), tmp_path)
        if not isinstance(found, ValueError):
            for name in found.tensors:
                assert torch.equal(verdict(lambda name=name: found.read(name), tmp_path), TENSORS[name])

    fuzz(check, changed_file(index), examples)


@few_and_many(50)
def test_header_of_weights(tmp_path: Path, examples: int) -> None:
    valid = save(TENSORS, metadata={"format": "pt"})
    length = struct.unpack("<Q", valid[:8])[0]
    header, data = json.loads(valid[8 : 8 + length]), valid[8 + length :]
    changed = changed_json(header).map(lambda text: text.encode("utf-8", "surrogatepass"))
    files = st.one_of(
        changed.map(lambda text: struct.pack("<Q", len(text)) + text + data), changed_bytes(valid), changed_bytes(valid)
    )
    (tmp_path / "config.json").write_text("{}")

    def check(content: bytes) -> None:
        path = tmp_path / SINGLE
        path.write_bytes(content)
        tensors = verdict(lambda: read_header(path), path)
        verdict(lambda: fingerprint(tmp_path), tmp_path)
        if not isinstance(tensors, ValueError):
            checkpoint = open_checkpoint(tmp_path)
            for name in tensors:
                verdict(lambda name=name: checkpoint.read(name), None)

    fuzz(check, files, examples)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    backend: Backend = train_tokenizer(["def f(x):\n    return x + 1\n"] * 3, vocabulary=310)
    save_tokenizer(backend, folder)
    return folder


@few_and_many(15)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_tokenizer(tmp_path: Path, tokenizer: Path, examples: int, name: str) -> None:
    shutil.copytree(tokenizer, tmp_path / "base")
    path = tmp_path / "base" / name
    valid = json.loads(path.read_text())

    def check(content: bytes) -> None:
        path.write_bytes(content)
        found = verdict(lambda: load_tokenizer(tmp_path / "base"), tmp_path)
        if not isinstance(found, ValueError):
            ids = found.encode_plain("def f(x): 1<|im_end|>")
            assert all(0 <= number < found.vocab_size for number in ids)
            assert found.eos_id not in ids
            found.decode([*ids, found.eos_id])

    fuzz(check, changed_file(valid), examples)
