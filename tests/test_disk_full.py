"""A disk that fills up during a real run: one sentence, the older checkpoints whole, and the same command goes on.

What the run becomes once there is room again is compared, bit for bit, with a run that always had room.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from finetune.checkpoint.resume import newest_checkpoint, open_state
from finetune.run.folder import finished_step
from tests.commands import UNWATCHED, Place, place

STEPS = 12
CHANGES: dict[str, Any] = {
    **UNWATCHED,
    "train__steps": STEPS,
    "checkpoint__every_steps": 2,
    "checkpoint__keep": 10,
    "lora__rank": 64,  # so that checkpoints, not the other files, decide when the disk is full
}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return place(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def undisturbed(here: Place) -> Path:
    done = here.launch(name="with-room", **CHANGES)
    assert done.code == 0, done.out + done.err
    return here.run_folder("with-room")


def size_of(folder: Path) -> int:
    """Bytes on a disk of whole pages."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*"))


@pytest.fixture
def disk(tmp_path: Path, undisturbed: Path) -> Iterator[Path]:
    """A disk with room for three checkpoints and a half, and for a run's other files."""
    if os.getuid() != 0:
        pytest.skip("mounts a small disk")
    made = tmp_path / "disk"
    made.mkdir()
    checkpoint = size_of(undisturbed / "checkpoints/step-2")
    others = size_of(undisturbed) - size_of(undisturbed / "checkpoints")
    assert others < checkpoint / 4, "the run's other files would decide when the disk is full"
    size = f"size={3 * checkpoint + checkpoint // 2 + others}"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(made)]).returncode:
        pytest.skip("may not mount a small disk here")
    try:
        yield made
    finally:
        subprocess.run(["umount", str(made)], check=True)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return dict(open_state(folder / f"checkpoints/step-{STEPS}")[1])


@pytest.mark.slow
def test_a_run_whose_disk_fills_up_goes_on_as_if_it_had_not(here: Place, undisturbed: Path, disk: Path) -> None:
    folder = disk / "runs/with-room"
    for _ in range(2):  # without more room the same command says the same
        done = here.launch(name="with-room", output__dir=disk / "runs", **CHANGES)
        assert done.code == 2, done.out + done.err
        assert "Traceback" not in done.out + done.err
        told = re.findall(r"nextune: (.*)", done.err)
        assert len(told) == 1, done.err
        full = r"checkpoints/step-8: rank \d could not write it \(.*No space left on device.*before it were not touched"
        assert re.search(full, told[0]), told
        assert newest_checkpoint(folder / "checkpoints") == (folder / "checkpoints/step-6", [])
        assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-2", "step-4", "step-6"]
        assert finished_step(folder) is None
        assert not (folder / "crash").exists()
    assert "continuing after step 6" in done.out

    subprocess.run(["mount", "-o", "remount,size=256m", str(disk)], check=True)
    done = here.launch(name="with-room", output__dir=disk / "runs", **CHANGES)
    assert done.code == 0, done.out + done.err
    assert "continuing after step 6" in done.out
    assert finished_step(folder) == STEPS
    ours, theirs = tensors_of(folder), tensors_of(undisturbed)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    shutil.rmtree(folder)
