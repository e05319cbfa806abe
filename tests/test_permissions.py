"""Who may read what a run writes is what the umask says, for every file alike."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from finetune.checkpoint.folder import save_tensors, whole_folder
from finetune.recipe.load import load_recipe
from finetune.run.folder import claim, folder_of, mark_finished
from tests.checkpoints import write_checkpoint
from tests.commands import ROOT


@pytest.fixture(params=[0o077, 0o027, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_files_of_a_run_are_open_to_whom_the_umask_says(umask: int, tmp_path: Path) -> None:
    root = tmp_path / "new"
    recipe = load_recipe(ROOT / "recipes/tiny.yaml", [f"output.dir={root}"])
    run = folder_of(recipe)
    claim(run, recipe).release()
    write_checkpoint(run / "checkpoints", 1, tensors={"a": torch.ones(2)}, state={"step": 1})
    mark_finished(run, {"step": 1})
    with whole_folder(root / "exported") as folder:
        save_tensors({"a": torch.ones(2)}, folder / "model.safetensors", metadata={"format": "pt"})
    found = {path: stat.S_IMODE(path.stat().st_mode) for path in (root, *root.rglob("*"))}
    assert len(found) > 8
    assert found == {path: (0o777 if path.is_dir() else 0o666) & ~umask for path in found}


def test_no_module_writes_tensors_past_it() -> None:
    users = [
        path for path in (ROOT / "finetune").rglob("*.py") if "safetensors.torch import save_file" in path.read_text()
    ]
    assert [path.name for path in users] == ["folder.py"]
