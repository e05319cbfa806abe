"""What a run starts from: an earlier checkpoint of its own, or one of another run; going back by command."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune import cli
from finetune.checkpoint.layout import CheckpointError
from finetune.checkpoint.resume import chosen_checkpoint, newest_checkpoint, open_state
from finetune.recipe.load import load_recipe
from finetune.recipe.recipe import Recipe
from finetune.run.folder import claim, folder_of, is_complete, mark_finished
from finetune.run.starting_point import check_resume_from, rewind, starting_point
from monitoring.metrics import read_metrics
from tests.checkpoints import write_checkpoint
from tests.commands import ROOT, UNWATCHED, Place, place, records


def recipe_in(tmp_path: Path, *overrides: str) -> Recipe:
    return load_recipe(ROOT / "recipes/tiny.yaml", [f"output.dir={tmp_path}", *overrides])


def run_with(tmp_path: Path, *steps: int, name: str = "tiny", **state: Any) -> Path:
    """A run folder with checkpoints of these steps, as training leaves it."""
    recipe = recipe_in(tmp_path, f"name={name}")
    folder = folder_of(recipe)
    claim(folder, recipe).release()
    lines: list[dict[str, Any]] = [{"kind": "start", "step": 0}]
    for step in steps:
        tensors = {"a::fp32": torch.full((2,), float(step))}
        write_checkpoint(folder / "checkpoints", step, tensors=tensors, state=state, keep=99)
        lines += [{"kind": "train", "step": step}, {"kind": "checkpoint", "step": step}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    mark_finished(folder, {"step": steps[-1]})
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_going_back_sets_aside_what_came_later_and_deletes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_with(tmp_path, 20, 40, 60)
    assert cli.main(["rewind", str(folder), "--to", "step-20"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{folder}: went back to step-20; step-40, step-60 set aside in {folder}/set-aside/1",
        f"{folder}: the next start goes on from step-20",
    ]
    assert names(folder / "checkpoints") == ["step-20"]
    assert names(folder / "set-aside/1") == ["finished.json", "step-40", "step-60"]
    for name in ("step-40", "step-60"):
        kept = open_state(folder / "set-aside/1" / name)[1].read("a::fp32")
        assert kept.tolist() == [float(name[5:])] * 2
    assert [line["step"] for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "checkpoint"] == [20]
    assert newest_checkpoint(folder / "checkpoints") == (folder / "checkpoints/step-20", [])
    assert not is_complete(folder, recipe_in(tmp_path))
    write_checkpoint(folder / "checkpoints", 40, tensors={}, state={}, keep=99)
    rewind(folder, "step-20", lambda sentence: None)
    assert names(folder / "set-aside/2") == ["step-40"]


@pytest.mark.parametrize(
    ("to", "sentence"),
    [
        ("step-30", "step-30: no such checkpoint; there are step-20, step-40"),
        ("../x", "../x: no such checkpoint; there are step-20, step-40"),
        ("best", "has no best checkpoint"),
    ],
)
def test_going_back_to_what_is_not_there_changes_nothing(
    to: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_with(tmp_path, 20, 40)
    assert cli.main(["rewind", str(folder), "--to", to]) == 2
    assert sentence in capsys.readouterr().err
    assert names(folder / "checkpoints") == ["step-20", "step-40"]
    assert not (folder / "set-aside").exists()


def test_a_step_of_its_own_is_gone_back_to_once(tmp_path: Path) -> None:
    folder = run_with(tmp_path, 20, 40, 60)
    back = recipe_in(tmp_path, "checkpoint.resume_from=step-40")
    assert is_complete(folder, recipe_in(tmp_path))
    assert not is_complete(folder, back)
    assert starting_point(folder, back).checkpoint == folder / "checkpoints/step-40"
    assert names(folder / "checkpoints") == ["step-20", "step-40"]
    write_checkpoint(folder / "checkpoints", 50, tensors={}, state={}, keep=99)  # killed after this
    assert starting_point(folder, back).checkpoint == folder / "checkpoints/step-50"
    assert starting_point(folder, recipe_in(tmp_path)).checkpoint == folder / "checkpoints/step-50"
    assert starting_point(folder, back).checkpoint == folder / "checkpoints/step-40"  # asked for anew


def test_best_is_the_lowest_held_out_loss(tmp_path: Path) -> None:
    folder = run_with(tmp_path, 20, 40, best={"step": 20, "loss": 2.0})
    point = starting_point(folder, recipe_in(tmp_path, "checkpoint.resume_from=best"))
    assert point.checkpoint == folder / "checkpoints/step-20"
    assert not point.of_another_run


@pytest.mark.parametrize("which", ["", "/checkpoints/step-20"])
def test_a_new_run_starts_from_another_and_then_goes_on_by_itself(which: str, tmp_path: Path) -> None:
    other = run_with(tmp_path, 20, 40)
    recipe = recipe_in(tmp_path, "name=new", f"checkpoint.resume_from={other}{which}")
    folder = folder_of(recipe)
    check_resume_from(folder, recipe)
    point = starting_point(folder, recipe)
    assert point.of_another_run
    assert point.checkpoint == other / "checkpoints" / ("step-20" if which else "step-40")
    write_checkpoint(folder / "checkpoints", 41, tensors={}, state={})
    assert starting_point(folder, recipe).checkpoint == folder / "checkpoints/step-41"


def start_anew(recipe: Recipe) -> None:
    check_resume_from(folder_of(recipe), recipe)
    starting_point(folder_of(recipe), recipe)


@pytest.mark.parametrize(
    ("resume_from", "more", "sentence"),
    [
        ("nowhere", (), "checkpoint.resume_from: nowhere: no such folder; give step-N or best of this run, or"),
        ("step-7", (), "new/checkpoints/step-7: no such checkpoint; there are none"),
        ("OTHER", ("lora.rank=4",), "was trained with lora.rank 8, this recipe says 4; make them equal"),
        ("OTHER", ("lora.use_rslora=true",), "was trained with lora.use_rslora false, this recipe says true"),
        ("BASE", (), "neither the folder of a run nor of a run's checkpoint"),
    ],
)
def test_what_cannot_be_started_from_is_said(
    resume_from: str, more: tuple[str, ...], sentence: str, tmp_path: Path
) -> None:
    other = run_with(tmp_path, 20)
    asked = {"OTHER": str(other), "BASE": str(ROOT / "recipes/base")}.get(resume_from, resume_from)
    recipe = recipe_in(tmp_path, "name=new", f"checkpoint.resume_from={asked}", *more)
    with pytest.raises(CheckpointError) as error:
        start_anew(recipe)
    assert sentence in str(error.value)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return place(tmp_path_factory.getbasetemp())


@pytest.mark.slow
def test_a_run_that_went_back_or_was_continued_as_another_ends_with_the_same_parameters(here: Place) -> None:
    often = UNWATCHED | {"checkpoint__every_steps": 2, "checkpoint__keep": 9, "train__steps": 6}
    done = here.by_hand(name="back", **often)
    assert done.code == 0, done.out + done.err
    folder = here.run_folder("back")
    undisturbed = dict(open_state(folder / "checkpoints/step-6")[1])
    losses = [line["loss"] for line in records(folder, "train")]

    def same_as_undisturbed(name: str, steps: list[int]) -> None:
        found = open_state(here.run_folder(name) / "checkpoints/step-6")[1]
        assert found.keys() == undisturbed.keys()
        assert all(torch.equal(found[key], value) for key, value in undisturbed.items())
        lines = records(here.run_folder(name), "train")
        assert [line["step"] for line in lines] == steps
        assert [line["loss"] for line in lines] == [losses[step - 1] for step in steps]

    done = here.by_hand(name="back", checkpoint__resume_from="step-2", **often)
    assert done.code == 0, done.out + done.err
    assert "step-4, step-6 set aside in" in done.out
    same_as_undisturbed("back", [1, 2, 3, 4, 5, 6])
    assert names(folder / "set-aside/1") == ["finished.json", "step-4", "step-6"]
    fork = {"checkpoint__resume_from": folder / "checkpoints/step-4"}
    done = here.by_hand(name="fork", **often | fork)
    assert done.code == 0, done.out + done.err
    assert "continuing after step 4 from" in done.out
    same_as_undisturbed("fork", [5, 6])


@pytest.mark.slow
def test_a_run_that_another_began_has_a_best_checkpoint_from_its_first_evaluation(here: Place) -> None:
    few = {"train__eval_every_steps": 1, "checkpoint__every_steps": 1, "checkpoint__keep_best": "true"}
    assert here.by_hand(name="first", train__steps=2, **few).code == 0
    few["checkpoint__resume_from"] = str(here.run_folder("first"))
    nothing = here.by_hand(name="second", train__steps=2, **few)
    assert nothing.code == 2
    assert "stands at step 2, and this run ends at step 2, so nothing is left to train" in nothing.err
    assert here.by_hand(name="second", train__steps=3, **few, checkpoint__keep=9).code == 0
    second = here.run_folder("second") / "checkpoints"
    assert names(second) == ["step-2", "step-3"]  # the one of step 2 is the best until a later evaluation is better
    assert chosen_checkpoint(second, "step-2", print) == second / "step-2"


@pytest.mark.slow
def test_a_new_run_goes_on_from_the_adapter_of_another(here: Place, tmp_path: Path) -> None:
    measured = UNWATCHED | {"data__eval": f"[{{path: {here.folder}/heldout.jsonl}}]", "train__steps": 2}
    done = here.by_hand(name="first", **measured)
    assert done.code == 0, done.out + done.err
    before, after = (line["loss"] for line in records(here.run_folder("first"), "eval"))
    export = ("export", str(here.run_folder("first")), "--to", str(tmp_path / "adapter"), "--format", "adapter")
    assert cli.main(export) == 0
    second = {"lora__init_from": tmp_path / "adapter", "train__seed": 5}
    done = here.by_hand(name="second", **measured | second)
    assert done.code == 0, done.out + done.err
    assert f"adapters start from {tmp_path}/adapter: " in done.out
    first_loss = records(here.run_folder("second"), "eval")[0]["loss"]
    assert first_loss == after != before
    done = here.by_hand(name="third", **measured | second | {"lora__rank": 4})
    assert done.code == 2
    assert f"lora.init_from: {tmp_path}/adapter has r 8; set lora.rank to that, it is 4" in done.err


@pytest.mark.slow
def test_a_run_stops_early_and_a_resumed_one_keeps_counting(here: Place) -> None:
    """No improvement is as large as this threshold asks for."""
    changes = UNWATCHED | {"data__eval": f"[{{path: {here.folder}/heldout.jsonl}}]", "train__eval_every_steps": 1}
    changes |= {"checkpoint__every_steps": 1, "train__early_stopping_threshold": 100, "train__steps": 9}
    patient = {"train__early_stopping_patience": 2}
    done = here.by_hand(name="early", **changes | patient)
    assert done.code == 0, done.out + done.err
    folder = here.run_folder("early")
    losses = [line["loss"] for line in records(folder, "eval")]
    assert losses[2] < losses[0]
    facts = json.loads((folder / "finished.json").read_text())
    assert (facts["step"], facts["stopped_early"]) == (2, {"patience": 2, "threshold": 100.0})
    assert facts["reason"] in [line["message"] for line in records(folder, "action")]
    assert open_state(folder / "checkpoints/step-2")[0]["early_stopping"]["without"] == 2
    done = here.by_hand(name="early", **changes | {"train__early_stopping_patience": 3})
    assert done.code == 0, done.out + done.err
    assert json.loads((folder / "finished.json").read_text())["step"] == 3  # one more, not three
