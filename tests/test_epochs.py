"""Runs given in epochs: how many steps they mean, to the plan, to training and to `finished`."""

from pathlib import Path

import pytest
import torch

from finetune import cli
from finetune.recipe.load import load_recipe
from finetune.recipe.recipe import Recipe
from finetune.run.folder import check_folder, claim, folder_of, is_complete, mark_finished
from finetune.training.epochs import planned_steps, with_steps
from tests.checkpoints import write_checkpoint
from tests.commands import ROOT, Place, place, write_rows


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return place(tmp_path_factory.getbasetemp())


def in_epochs(here: Place, epochs: float, **changes: object) -> Recipe:
    typed = here.settings(train__steps=0, train__epochs=epochs, **changes)
    return load_recipe(ROOT / "recipes/tiny.yaml", typed[1::2])


@pytest.mark.parametrize(
    ("epochs", "packs", "steps"), [(1, 80, 10), (1, 81, 11), (2, 81, 21), (0.5, 81, 6), (0.001, 81, 1), (3, 4, 2)]
)
def test_every_sequence_is_seen_as_often_as_the_epochs_say(here: Place, epochs: float, packs: int, steps: int) -> None:
    """A step takes 1024 / 128 = 8 sequences."""
    recipe, (sentence,) = with_steps(in_epochs(here, epochs, optim__warmup_steps=0), packs)
    assert recipe.train.steps == steps
    assert 8 * (steps - 1) < epochs * packs <= 8 * steps
    assert sentence == f"train.epochs {epochs:g}: {steps} steps of 8 sequences; the data holds {packs}"


def test_a_warm_up_longer_than_the_epochs_is_said(here: Place) -> None:
    _, sentences = with_steps(in_epochs(here, 1, optim__warmup_steps=30), 80)
    assert sentences[1:] == ["the warm-up of 30 steps is cut to the 10 of the run"]


def test_steps_stay_as_they_are(here: Place) -> None:
    recipe = load_recipe(ROOT / "recipes/tiny.yaml", here.settings()[1::2])
    assert with_steps(recipe, 80) == (recipe, [])
    assert planned_steps(recipe) == (recipe, [])


def test_the_plan_says_how_many_steps_the_epochs_are(here: Place, capsys: pytest.CaptureFixture[str]) -> None:
    typed = here.settings(train__steps=0, train__epochs=2, optim__warmup_steps=0)
    assert cli.main(["plan", "--recipe", "recipes/tiny.yaml", *typed]) == 0
    told = capsys.readouterr().out
    recipe, (sentence,) = planned_steps(in_epochs(here, 2, optim__warmup_steps=0))
    assert sentence in told
    assert recipe.train.steps > 0
    assert f"the run: {recipe.train.steps} steps, {recipe.train.steps * 1024:,} tokens" in told


def test_a_plan_without_the_tokenizer_says_what_is_not_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path / "rows.jsonl", range(2))
    typed = ["train.steps=0", "train.epochs=3", f"data.train=[{{path: {tmp_path}/rows.jsonl}}]", "data.eval=[]"]
    typed += [f"output.dir={tmp_path}", "model.path=Qwen/Qwen3-Coder-Next"]
    options = [text for value in typed for text in ("--set", value)]
    assert cli.main(["plan", "--recipe", "recipes/code.yaml", "--ranks", "8", "--device-gib", "80", *options]) == 0
    told = capsys.readouterr().out
    assert "train.epochs 3: the number of steps is known when the data is tokenised, and the tokenizer of" in told
    assert "the run: 3 epochs\n" in told
    assert "time: not known before the number of steps is" in told


def test_a_finished_run_is_complete_for_as_many_epochs(tmp_path: Path, here: Place) -> None:
    recipe = in_epochs(here, 2, output__dir=tmp_path)
    folder = folder_of(recipe)
    claim(folder, recipe).release()
    assert not is_complete(folder, recipe)
    mark_finished(folder, {"step": 20, "epochs": 2.0})
    write_checkpoint(folder / "checkpoints", 20, tensors={"a": torch.zeros(1)}, state={})
    assert is_complete(folder, recipe)
    longer = in_epochs(here, 3, output__dir=tmp_path)
    check_folder(folder, longer)
    assert not is_complete(folder, longer)
    mark_finished(folder, {"step": 20})  # by a run whose length was given in steps
    assert not is_complete(folder, recipe)
