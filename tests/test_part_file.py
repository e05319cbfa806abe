"""A rank's file of a checkpoint, read back by the safetensors library."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune.checkpoint import part_file
from finetune.checkpoint.part_file import hash_of, write_part


def test_the_library_reads_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part_file, "PIECE_BYTES", 48)
    monkeypatch.setattr(part_file, "PIECES_BETWEEN_FLUSHES", 2)
    tensors = {
        "a::fp32": torch.randn(3, 7),
        "a::exp_avg": torch.randn(7, 3).T,  # not in one piece of memory
        "brief": torch.randn(5).bfloat16(),
        "count": torch.tensor(7),
        "mask": torch.tensor([True, False, True]),
        "nothing": torch.empty(0, 4),
        "sums": torch.randn(2, dtype=torch.float64),
        'a "name" \u00e9': torch.arange(3, dtype=torch.int32),
    }
    pieces: list[int] = []
    path = tmp_path / "part"
    size, sha256 = write_part(path, tensors, lambda: pieces.append(path.stat().st_size))
    read = load_file(path)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in tensors.items())
    assert size == path.stat().st_size
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest() == hash_of(path)
    assert len(pieces) > 8
    assert pieces == sorted(pieces)


def test_hashing_shows_that_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part_file, "PIECE_BYTES", 10)
    (tmp_path / "file").write_bytes(bytes(range(101)))
    pieces: list[None] = []
    assert hash_of(tmp_path / "file", lambda: pieces.append(None)) == hashlib.sha256(bytes(range(101))).hexdigest()
    assert len(pieces) == 11
