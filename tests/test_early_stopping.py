"""Early stopping: when a run ends because its held-out loss no longer falls, and what it remembers."""

from dataclasses import asdict
from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import EarlyStoppingCallback

from finetune.recipe.load import load_recipe
from finetune.recipe.sections import Train
from finetune.run.folder import claim, early_stopping_of, folder_of, is_complete, mark_finished
from finetune.training.early_stopping import EarlyStopping
from tests.checkpoints import write_checkpoint
from tests.commands import ROOT


def ends_after(losses: list[float], patience: int, threshold: float = 0.0) -> int | None:
    """The number of the evaluation after which the run ends."""
    train = Train(steps=1, early_stopping_patience=patience, early_stopping_threshold=threshold)
    stopping = EarlyStopping()
    for number, loss in enumerate(losses):
        stopping = EarlyStopping(**asdict(stopping))  # as if the run were resumed between any two
        stopping.see(loss, train)
        if stopping.reason(train):
            return number
    return None


@pytest.mark.parametrize(
    ("losses", "patience", "threshold", "end"),
    [
        ([3.0, 2.0, 2.1, 2.2, 2.3], 2, 0.0, 3),
        ([3.0, 2.0, 2.1, 1.9, 2.0, 2.0], 2, 0.0, 5),
        ([3.0, 2.0, 2.0, 2.0], 1, 0.0, 2),  # an equal loss is no lower one
        ([3.0, 3.1], 1, 0.0, 1),  # worse than the base
        ([3.0, 2.0, 2.1, 2.2], 0, 0.0, None),
        ([3.0, 2.0, 1.95, 1.85], 2, 0.1, None),  # together they are more than 0.1 below 2.0
        ([3.0, 2.0, 1.95, 1.91], 2, 0.1, 3),
        ([3.0, float("nan"), float("inf")], 2, 0.0, 2),
        ([float("nan"), 3.0, 2.0], 1, 0.0, None),
    ],
)
def test_a_run_ends_after_so_many_evaluations_without_a_lower_loss(
    losses: list[float], patience: int, threshold: float, end: int | None
) -> None:
    assert ends_after(losses, patience, threshold) == end


def test_without_a_threshold_it_ends_where_transformers_does(tmp_path: Path) -> None:
    losses = [3.0, 2.5, 2.6, 2.4, 2.45, 2.41, 2.39, 2.5, 2.6, 2.7]
    arguments = TrainingArguments(tmp_path, metric_for_best_model="loss", greater_is_better=False, use_cpu=True)
    for patience in (1, 2, 3):
        theirs, state, end = EarlyStoppingCallback(patience), TrainerState(), None
        for number, loss in enumerate(losses):
            control = TrainerControl()
            theirs.on_evaluate(arguments, state, control, metrics={"eval_loss": loss})
            state.best_metric = min(loss, state.best_metric if state.best_metric is not None else loss)
            if control.should_training_stop:
                end = number
                break
        assert ends_after(losses, patience) == end


def test_the_reason_names_the_loss_and_the_evaluations() -> None:
    train = Train(steps=1, early_stopping_patience=2, early_stopping_threshold=0.01)
    assert EarlyStopping(2.5, 1).reason(train) is None
    assert EarlyStopping(2.5, 2).reason(train) == (
        "early stopping: no held-out loss below 2.5000 by more than 0.01 in 2 evaluations in a row"
    )


def test_a_run_that_stopped_early_is_complete_until_its_patience_is_changed(tmp_path: Path) -> None:
    def recipe(*overrides: str):
        given = [f"output.dir={tmp_path}", "train.early_stopping_patience=2", *overrides]
        return load_recipe(ROOT / "recipes/tiny.yaml", given)

    folder = folder_of(recipe())
    claim(folder, recipe()).release()
    write_checkpoint(folder / "checkpoints", 30, tensors={}, state={})
    mark_finished(folder, {"step": 30, "epochs": 0.0, "stopped_early": early_stopping_of(recipe())})
    assert is_complete(folder, recipe())
    assert is_complete(folder, recipe("train.steps=90"))
    assert not is_complete(folder, recipe("train.early_stopping_patience=3"))
    assert not is_complete(folder, recipe("train.early_stopping_threshold=0.1"))
    assert not is_complete(folder, recipe("train.early_stopping_patience=0"))
