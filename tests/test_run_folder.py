import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from finetune.recipe.load import load_recipe
from finetune.recipe.recipe import Recipe, RecipeError
from finetune.run import place as run_place
from finetune.run.failure import is_told, record_crash
from finetune.run.folder import (
    check_folder,
    claim,
    finished_step,
    folder_of,
    is_complete,
    lost_checkpoint,
    mark_finished,
)
from finetune.run.place import hold
from finetune.run.stored_recipe import recorded
from monitoring.files import replace_file
from tests.checkpoints import write_checkpoint
from tests.commands import ROOT


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return changed(tmp_path)


def changed(tmp_path: Path, *overrides: str) -> Recipe:
    return load_recipe(ROOT / "recipes/tiny.yaml", [f"output.dir={tmp_path}/runs", *overrides])


def test_the_folder_is_the_name_of_the_run_below_output_dir(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert folder_of(recipe) == tmp_path / "runs/tiny"
    assert folder_of(changed(tmp_path, "name=other")) == tmp_path / "runs/other"
    monkeypatch.chdir(tmp_path)
    assert folder_of(load_recipe(ROOT / "recipes/tiny.yaml")) == tmp_path / "runs/tiny"


def test_a_claimed_folder_holds_the_whole_recipe_and_checking_makes_nothing(tmp_path: Path, recipe: Recipe) -> None:
    folder = folder_of(recipe)
    check_folder(folder, recipe)
    assert not folder.parent.exists()
    claim(folder, recipe).release()
    assert load_recipe(folder / "recipe.yaml") == recorded(recipe)
    assert {path.name for path in folder.iterdir()} == {"recipe.yaml", ".lock"}


@pytest.mark.parametrize(
    "override",
    [
        *("train.steps=90", "train.log_every_steps=1", "train.eval_every_steps=1", "train.recompute=full"),
        *("train.micro_batch_tokens=512", "checkpoint.every_steps=7", "checkpoint.keep=5", "monitor.wandb=off"),
        *("parallel.ranks=1", "parallel.zero_stage=1", "kernels.experts=loop", "optim.lr=1e-3", "optim.clip_norm=2"),
        *("lora.init_from=recipes/base", "train.early_stopping_patience=3", "train.early_stopping_threshold=0.1"),
        *("checkpoint.resume_from=step-3",),
    ],
)
def test_a_run_may_go_on_with_another(tmp_path: Path, recipe: Recipe, override: str) -> None:
    folder = folder_of(recipe)
    claim(folder, recipe).release()
    more = ("parallel.expert=1",) if override == "parallel.ranks=1" else ()
    check_folder(folder, changed(tmp_path, override, *more))


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("train.seed=1", "train.seed was 0, is 1"),
        ("train.sequence_tokens=256", "train.sequence_tokens was 512, is 256"),
        ("train.global_batch_tokens=8192", "train.global_batch_tokens was 4096, is 8192"),
        ("data.packing=padded", "data.packing was 'packed', is 'padded'"),
        ("lora.rank=4", "lora.rank was 8, is 4"),
        ("lora=null", "lora.alpha was 16.0, is None"),
        ("router.train=true", "router.train was False, is True"),
        ("optim.weight_decay=0.1", "optim.weight_decay was 0.0, is 0.1"),
    ],
)
def test_another_training_needs_another_name(tmp_path: Path, recipe: Recipe, override: str, difference: str) -> None:
    folder = folder_of(recipe)
    claim(folder, recipe).release()
    more = ("monitor.drift_every_steps=0", "monitor.probe_tokens=4096") if override == "lora=null" else ()
    with pytest.raises(RecipeError) as error:
        check_folder(folder, changed(tmp_path, override, *more))
    assert str(error.value).startswith(f"{folder}: holds a run of another recipe ({difference}")
    assert "give this one a name of its own (--set name=...) or delete the folder" in str(error.value)


@pytest.mark.parametrize("check", [check_folder, claim])
def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, check: object) -> None:
    (tmp_path / "runs").touch()
    recipe = changed(tmp_path)
    with pytest.raises(RecipeError, match=r"output\.dir: .*/runs/tiny cannot be written"):
        check(folder_of(recipe), recipe)  # type: ignore[operator]


def test_a_folder_is_held_until_released_or_its_process_is_gone(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(recipe)
    monkeypatch.setattr(run_place, "SECONDS_TO_WAIT", 0.1)
    held = claim(folder, recipe)
    with pytest.raises(RecipeError, match="another process is training this run; stop it first"):
        claim(folder, recipe)
    held.release()
    hold(folder).release()
    code = "import sys, time; from pathlib import Path; from finetune.run.place import hold\n"
    code += "held = hold(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, folder], cwd=ROOT, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RecipeError, match="another process"):
            hold(folder)
        other.kill()
        other.wait()
    hold(folder).release()


def test_a_run_is_finished_when_its_marker_says_so(tmp_path: Path) -> None:
    assert finished_step(tmp_path) is None
    mark_finished(tmp_path, {"step": 60})
    assert finished_step(tmp_path) == 60


def lose_nothing(root: Path) -> None:
    pass


def lose_all(root: Path) -> None:
    shutil.rmtree(root)


def lose_newest(root: Path) -> None:
    shutil.rmtree(root / "step-60")


def lose_part(root: Path) -> None:
    (root / "step-60/part-00000.safetensors").unlink()


def cut_part(root: Path) -> None:
    (root / "step-60/part-00000.safetensors").write_bytes(b"")


def lose_manifest(root: Path) -> None:
    (root / "step-60/manifest.json").unlink()


def spoil_manifest(root: Path) -> None:
    (root / "step-60/manifest.json").write_text("[")


def go_on(root: Path) -> None:
    write_checkpoint(root, 70, tensors={"a": torch.zeros(3)}, state={}, keep=1)


@pytest.mark.parametrize(
    ("change", "complete"),
    [
        *((lose_nothing, True), (go_on, True)),
        *((lose_all, False), (lose_newest, False), (lose_part, False), (cut_part, False)),
        *((lose_manifest, False), (spoil_manifest, False)),
    ],
)
def test_a_finished_run_whose_last_checkpoint_is_lost_is_not_complete(
    tmp_path: Path, recipe: Recipe, change: Callable[[Path], None], complete: bool
) -> None:
    for step in (40, 60):
        write_checkpoint(tmp_path / "checkpoints", step, tensors={"a": torch.zeros(3)}, state={}, keep=2)
    mark_finished(tmp_path, {"step": 60})
    change(tmp_path / "checkpoints")
    assert is_complete(tmp_path, recipe) == complete
    sentence = f"{tmp_path}: ended at step 60, but its checkpoint of that step is gone or incomplete"
    assert (lost_checkpoint(tmp_path) or "").startswith("" if complete else sentence)
    assert complete == (lost_checkpoint(tmp_path) is None)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "finished.json"
    replace_file(path, b"old")

    def no_room(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(OSError, match="No space left"):
        replace_file(path, b"new and much longer")
    assert path.read_text() == "old"
    monkeypatch.undo()
    replace_file(path, b"new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("finished.json", "new")]


def test_a_crash_is_written_whole_and_a_disk_that_refuses_it_is_passed_over(tmp_path: Path) -> None:
    try:
        raise IndexError("no such expert")
    except IndexError as error:
        record_crash(tmp_path / "run", error, rank=3, step=7)
        (tmp_path / "file").touch()
        record_crash(tmp_path / "file", error, rank=3, step=7)
    (kept,) = (tmp_path / "run").rglob("*.*")
    assert kept.relative_to(tmp_path).as_posix() == "run/crash/rank3.json"
    facts = json.loads(kept.read_text())
    assert (facts["rank"], facts["step"], facts["exception"]) == (3, 7, "IndexError: no such expert")
    assert "test_run_folder.py" in "".join(facts["traceback"])
    assert {"python", "torch", "deepspeed", "transformers", "peft"} <= facts["versions"].keys()


def test_only_our_own_errors_are_the_whole_story() -> None:
    assert is_told(RecipeError("recipes/x.yaml:7: optim.lr: must be at most 1"))
    assert not is_told(ValueError("too many values to unpack"))
    assert not is_told(KeyError("model"))
