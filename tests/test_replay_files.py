"""What `crash/step-N` holds is read as `keep_batch` writes it, or one sentence."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.checkpoint.layout import CheckpointError
from finetune.commands.replay import read_step


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    shape = (2, 1, 2, 8)
    tensors = {name: torch.ones(shape, dtype=torch.int64) for name in ("input_ids", "labels", "segment_ids")}
    tensors |= {"packs": torch.ones(shape[:3], dtype=torch.int64), "loss_sums": torch.ones(shape[:3])}
    save_file(tensors, tmp_path / "batches.safetensors")
    (tmp_path / "step.json").write_text(json.dumps({"step": 3, "base": "2-abc"}))
    return tmp_path


def put(name: str, tensor: torch.Tensor | None) -> Callable[[Path], None]:
    def change(kept: Path) -> None:
        tensors = load_file(kept / "batches.safetensors")
        tensors.pop(name)
        save_file(tensors if tensor is None else {**tensors, name: tensor}, kept / "batches.safetensors")

    return change


def into_fifo(name: str) -> Callable[[Path], None]:
    def change(kept: Path) -> None:
        (kept / name).unlink()
        os.mkfifo(kept / name)

    return change


def test_a_kept_step_is_read(kept: Path) -> None:
    tensors, facts = read_step(kept)
    assert facts["step"] == 3
    assert tensors["labels"].shape == (2, 1, 2, 8)


@pytest.mark.parametrize(
    "damage",
    [
        lambda kept: (kept / "step.json").write_text("[]"),
        lambda kept: (kept / "step.json").write_text('{"step": "3", "base": "2-abc"}'),
        lambda kept: (kept / "step.json").write_text('{"step": 3}'),
        lambda kept: (kept / "step.json").write_text('{"a":' * 100_000),
        lambda kept: (kept / "step.json").unlink(),
        lambda kept: os.truncate(kept / "batches.safetensors", 100),
        lambda kept: save_file({"a": torch.ones(1)}, kept / "batches.safetensors"),
        into_fifo("step.json"),
        into_fifo("batches.safetensors"),
        *(put(name, None) for name in ("input_ids", "packs", "loss_sums")),
        put("labels", torch.ones(2, 1, 2, 7, dtype=torch.int64)),
        put("packs", torch.ones(2, 2, dtype=torch.int64)),
    ],
)
def test_what_is_no_kept_step_is_one_sentence(kept: Path, damage: Callable[[Path], None]) -> None:
    damage(kept)
    with pytest.raises(CheckpointError, match="holds no batch of a step") as caught:
        read_step(kept)
    assert str(caught.value).startswith(f"{kept}: ")
    assert "\n" not in str(caught.value)
