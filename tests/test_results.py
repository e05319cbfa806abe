import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune import cli
from finetune.commands.summary import print_summary
from finetune.recipe.recipe import RecipeError
from finetune.run.folder import recipe_of
from monitoring.metrics import MetricsFile
from monitoring.routing import RoutingSnapshot, snapshot_path, write_snapshot
from tests.commands import Place, place, run_with_checkpoint


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return place(tmp_path_factory.getbasetemp())


@pytest.fixture
def folder(here: Place, tmp_path: Path) -> Path:
    """A run folder with a checkpoint, which a test may change."""
    return Path(shutil.copytree(run_with_checkpoint(here, "of-results"), tmp_path / "run"))


def write(folder: Path, *records: dict[str, Any]) -> None:
    metrics = MetricsFile(folder / "metrics.jsonl")
    for record in records:
        metrics.write(record)
    metrics.close()


def evaluation(step: int, *parts: tuple[float, int]) -> dict[str, Any]:
    tokens = sum(count for _, count in parts)
    loss = sum(part for part, _ in parts) / tokens
    return {"kind": "eval", "step": step, "loss": loss, "tokens": tokens, "parts": parts}


def summary(folder: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert print_summary(folder) == 0
    return capsys.readouterr().out.splitlines()


def test_the_recipe_of_a_run_is_read_even_where_its_data_is_gone(here: Place, folder: Path) -> None:
    shutil.rmtree(folder / "checkpoints")  # whose recipe would count
    stored = folder / "recipe.yaml"
    stored.write_text(stored.read_text().replace(str(here.folder / "train.jsonl"), "/nowhere/train.jsonl"))
    assert recipe_of(folder).data.train[0].path == "/nowhere/train.jsonl"


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="not the folder of a run"):
        recipe_of(tmp_path)


def test_summary_tells_the_change_with_its_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(
        folder,
        {"kind": "start", "step": 0},
        evaluation(0, (30.0, 10), (64.0, 20)),
        evaluation(3, (29.0, 10), (60.0, 20)),
        evaluation(6, (20.0, 10), (46.0, 20)),
    )
    # Per token 1.0 and 0.9 lower; 28 / 30 over all. The rest of each part is 0.667 and -0.667 of its tokens' sum.
    error = np.sqrt(2 * (2 / 3) ** 2 * 2 / 1) / 30
    assert summary(folder, capsys)[0] == (
        "held-out loss: 3.1333 before, 2.2000 after 6 steps; change -0.9333 with standard error"
        f" {error:.4f} over 2 batches ({0.93333 / error:.0f} standard errors)"
    )


@pytest.mark.parametrize(
    ("losses", "said"), [((3.0, 3.1, 3.05), True), ((3.0, 3.0), True), ((3.0, 2.9, 3.1), False), ((3.0, 2.9), False)]
)
def test_summary_says_when_training_never_improved_on_the_base(
    folder: Path, capsys: pytest.CaptureFixture[str], losses: tuple[float, ...], said: bool
) -> None:
    evaluations = [evaluation(5 * n, (10 * loss, 10), (10 * loss, 10)) for n, loss in enumerate(losses)]
    write(folder, {"kind": "start", "step": 0}, *evaluations)
    line = "training never improved on the base: no held-out loss is below that before the first step"
    assert (line in summary(folder, capsys)) == said


@pytest.mark.parametrize(
    ("evaluations", "expected"),
    [
        ([evaluation(0, (30.0, 10))], None),
        (
            [evaluation(0, (30.0, 10), (30.0, 10)), evaluation(5, (20.0, 10), (20.0, 10))],
            "held-out loss: 3.0000 before, 2.0000 after 5 steps; change -1.0000 with standard error 0.0000"
            " over 2 batches",
        ),
        (
            [evaluation(0, (30.0, 10)), evaluation(5, (40.0, 20))],
            "held-out loss: 3.0000 before, 2.0000 after 5 steps"
            " (no standard error: it needs two or more batches that are the same in both)",
        ),
        (
            [evaluation(0, (30.0, 10)), evaluation(5, (float("nan"), 10))],
            "held-out loss: not a number at step 5",
        ),
    ],
    ids=["measured once", "the same change everywhere", "measured on other rows", "lost"],
)
def test_summary_of_what_has_no_error(
    folder: Path, capsys: pytest.CaptureFixture[str], evaluations: list[dict[str, Any]], expected: str | None
) -> None:
    write(folder, {"kind": "start", "step": 0}, *evaluations)
    lines = [line for line in summary(folder, capsys) if line.startswith("held-out")]
    assert lines == ([] if expected is None else [expected])


def test_summary_shows_the_last_load_of_every_layer(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder, {"kind": "start", "step": 0})
    for step in (5, 12):
        counts = np.full((4, 8), 10) + step * np.eye(4, 8, dtype=np.int64)
        write_snapshot(snapshot_path(folder, step), RoutingSnapshot(step, (0, 1, 2, 3), counts, 46))
    out = "\n".join(summary(folder, capsys))
    assert "Expert load per layer, step 12" in out
    assert out.count("DeltaNet") == 3
    assert out.count("attention") == 1
    assert f"{22 / 92:.1%}" in out  # the busiest expert of each layer


def test_summary_counts_findings_and_says_where_everything_lies(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def finding(level: str) -> dict[str, Any]:
        return {"kind": "finding", "step": 1, "level": level, "rule": "r", "layer": 0, "message": f"of level {level}"}

    write(folder, {"kind": "start", "step": 0}, finding("info"), finding("warn"), finding("stop"))
    lines = summary(folder, capsys)
    assert lines[:3] == ["findings of the routing and loss rules: 2", "  of level warn", "  of level stop"]
    assert f"  run folder     {folder}" in lines
    assert f"  report data    {folder}/metrics.jsonl" in lines
    assert not [line for line in lines if "W&B" in line or "merged" in line]
    (folder / "wandb/offline-run-1").mkdir(parents=True)
    (folder / "merged").mkdir()
    (folder / "merged-by-launch").mkdir()
    out = "\n".join(summary(folder, capsys))
    assert f"offline; see it with: wandb sync {folder}/wandb/offline-run-*" in out
    assert f"  merged model   {folder}/merged\n" in out
    assert f"  merged model   {folder}/merged-by-launch\n" in out


def test_summary_of_a_run_that_never_started_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["summary", str(folder)]) == 2
    assert capsys.readouterr().err == (f"nextune: {folder}/metrics.jsonl: no such file; is this the folder of a run?\n")
