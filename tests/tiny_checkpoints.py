"""Tiny checkpoint folders as transformers writes them, with what released ones hold beside the weights."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

from tests.configs import randomise

COMPANIONS = {
    "tokenizer.json": b'{"version": "1.0",  "odd": "spacing \xc3\xa9"}\r\n',
    "tokenizer_config.json": b'{"tokenizer_class": "Qwen2Tokenizer"}',
    "chat_template.jinja": b"{% for m in messages %}{{ m.content }}{% endfor %}\n\n",
    "generation_config.json": b'{"temperature":0.7, "eos_token_id":[1, 2]}',
    "LICENSE": b"as it was\n",
}
MTP = {"mtp.fc.weight": (6, 12), "mtp.norm.weight": (6,), "mtp.layers.0.mlp.experts.0.up_proj.weight": (3, 6)}


def transformers_model(values: dict[str, Any], dtype: torch.dtype = torch.float32) -> Qwen3NextForCausalLM:
    model = Qwen3NextForCausalLM(Qwen3NextConfig(**values))
    randomise(model, seed=1)
    return model.to(dtype).eval()


def save_released(model: Qwen3NextForCausalLM, folder: Path, *, shard: str = "40KB", mtp: bool = True) -> Path:
    """Write `model` in the released form: numbered files, companions, and (where sharded) a file of `mtp.*` tensors."""
    model.save_pretrained(folder, max_shard_size=shard)
    for name, content in COMPANIONS.items():
        (folder / name).write_bytes(content)
    index = folder / "model.safetensors.index.json"
    if mtp:
        extra = {name: torch.randn(shape).to(torch.bfloat16) for name, shape in MTP.items()}
        save_file(extra, folder / "model-mtp.safetensors", metadata={"format": "pt"})
        values = json.loads(index.read_text())
        values["weight_map"] |= dict.fromkeys(extra, "model-mtp.safetensors")
        index.write_text(json.dumps(values))
    return folder


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor in the weight files of a folder, read by safetensors itself."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bitwise equal: dtype, shape, values."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def assert_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name in expected if not same(found[name], expected[name])]
    assert not different, f"differ: {different[:5]}"
