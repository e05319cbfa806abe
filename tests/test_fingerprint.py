"""Base weights that were replaced are told, wherever they differ; those of earlier runs still count."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetune.checkpoint.fingerprint import fingerprint, is_of
from finetune.checkpoint.layout import CheckpointError

WEIGHTS = "model-00001-of-00001.safetensors"


def tensors() -> dict[str, Tensor]:
    """11 MB in 41 tensors, of which samples of the file alone would see a twentieth."""
    generator = torch.Generator().manual_seed(0)
    small = {f"layers.{layer}.norm": torch.randn(7, generator=generator) for layer in range(20)}
    large = {f"layers.{layer}.q_proj": torch.randn(350, 400, generator=generator) for layer in range(20)}
    return {**small, **large, "empty": torch.zeros(0)}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    save_file(tensors(), tmp_path / WEIGHTS)
    return tmp_path


def of_samples(folder: Path) -> str:
    """The form of earlier runs, written out."""
    content = (folder / WEIGHTS).read_bytes()
    digest = hashlib.sha256((folder / "config.json").read_bytes() + f"{WEIGHTS} {len(content)}".encode())
    for place in range(8):
        start = (len(content) - 65536) * place // 7
        digest.update(content[start : start + 65536])
    return digest.hexdigest()


@pytest.mark.parametrize("name", ["layers.3.q_proj", "layers.9.q_proj", "layers.12.q_proj", "layers.12.norm"])
def test_one_tensor_of_many_that_was_trained_is_told(name: str, base: Path) -> None:
    before, by_samples = fingerprint(base), of_samples(base)
    changed = load_file(base / WEIGHTS)
    changed[name] = changed[name] + 0.01
    save_file(changed, base / WEIGHTS)
    assert fingerprint(base) != before
    assert not is_of(before, base)
    if name == "layers.12.q_proj":
        assert of_samples(base) == by_samples, "lies between the samples, so that this test asks for more than they see"
    save_file(tensors(), base / WEIGHTS)
    assert is_of(before, base)


def test_names_shapes_sizes_and_configuration_count(base: Path) -> None:
    before = fingerprint(base)
    seen = {before}
    whole = tensors()
    whole["layers.0.k_proj"] = whole.pop("layers.0.q_proj")
    save_file(whole, base / WEIGHTS)
    seen.add(fingerprint(base))
    save_file({**tensors(), "layers.0.q_proj": tensors()["layers.0.q_proj"].view(400, 350)}, base / WEIGHTS)
    seen.add(fingerprint(base))
    save_file(tensors(), base / WEIGHTS)
    (base / "config.json").write_text("{ }")
    seen.add(fingerprint(base))
    assert len(seen) == 4
    (base / "config.json").write_text("{}")
    (base / "README.md").write_text("not weights")
    assert fingerprint(base) == before


def test_a_file_that_is_cut_short_has_a_fingerprint_too(base: Path) -> None:
    before = fingerprint(base)
    (base / WEIGHTS).write_bytes((base / WEIGHTS).read_bytes()[:-1])
    assert fingerprint(base) != before


def test_a_fingerprint_of_an_earlier_run_is_compared_in_its_own_form(base: Path) -> None:
    earlier = of_samples(base)
    assert is_of(earlier, base)
    changed = load_file(base / WEIGHTS)
    save_file({**changed, "layers.19.q_proj": -changed["layers.19.q_proj"]}, base / WEIGHTS)
    assert not is_of(earlier, base)


def test_files_in_folders_below_count_and_what_is_no_file_does_not(base: Path) -> None:
    """An index may name `sub/m.safetensors`; a FIFO would let the reader wait for ever."""
    held = load_file(base / WEIGHTS)
    (base / WEIGHTS).unlink()
    (base / "sub").mkdir()
    save_file(held, base / "sub/m.safetensors")
    index = {"weight_map": dict.fromkeys(held, "sub/m.safetensors")}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    before = fingerprint(base)
    os.mkfifo(base / "other.safetensors")
    (base / "gone.safetensors").symlink_to("nowhere")
    assert fingerprint(base) == before
    save_file({name: tensor + 1 for name, tensor in held.items()}, base / "sub/m.safetensors")
    assert fingerprint(base) != before
    (base / "config.json").unlink()
    os.mkfifo(base / "config.json")
    with pytest.raises(CheckpointError, match=r"config\.json: is a FIFO, not a regular file"):
        fingerprint(base)
