"""Checkpoints of real runs: written while steps go on, finished before an orderly stop, the best kept.

Writes are slowed from outside: a `sitecustomize` on PYTHONPATH holds back one rank's file until the run's own lines say
that something has happened.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.checkpoint.resume import newest_checkpoint, open_state
from finetune.checkpoint.weights import from_pretrained
from finetune.commands.replay import losses_of_step, read_step
from monitoring.metrics import read_metrics
from tests.commands import TINY, Done, Place, command, launcher, place, records, run, run_with_checkpoint, write_rows
from tests.poison import poison

HELD = """
import os, time
if os.environ.get("RANK") == "1":
    def held(descriptor, fsync=os.fsync):
        path = os.readlink("/proc/self/fd/%d" % descriptor)
        if "/step-{step}." in path and path.endswith(".safetensors"):
            end = time.monotonic() + 60
            while {sign!r} not in open({metrics!r}).read() and time.monotonic() < end:
                time.sleep(0.02)
            time.sleep({seconds})
        fsync(descriptor)
    os.fsync = held
"""
QUIET: dict[str, Any] = {
    "train__log_every_steps": 1,
    "monitor__routing_every_steps": 0,
    "monitor__drift_every_steps": 0,
    "monitor__probe_tokens": 4096,
}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return place(tmp_path_factory.getbasetemp())


def launch_held(here: Place, name: str, hooks: Path, *, step: int, sign: str, seconds: float, **changes: Any) -> Done:
    """A run whose rank 1 writes its part of one step's checkpoint only after `sign` is in metrics.jsonl."""
    hooks.mkdir()
    metrics = str(here.run_folder(name) / "metrics.jsonl")
    (hooks / "sitecustomize.py").write_text(HELD.format(step=step, sign=sign, seconds=seconds, metrics=metrics))
    typed = [*launcher(2), *TINY, *here.settings(name=name, **QUIET | changes)]
    return run(*typed, cwd=here.folder, PYTHONPATH=str(hooks))


def test_steps_go_on_while_a_checkpoint_is_written_and_the_next_one_is_put_off(here: Place, tmp_path: Path) -> None:
    """The one of step 9 is not written before step 13; that of step 10, the best so far, comes as soon as it is."""
    changes = {"train__steps": 17, "train__eval_every_steps": 10, "checkpoint__every_steps": 9}
    kept = {"checkpoint__keep": 5, "checkpoint__keep_best": "true"}
    sign = '"kind": "train", "step": 13'
    done = launch_held(here, "slow-disk", tmp_path / "hooks", step=9, sign=sign, seconds=0, **changes, **kept)
    assert done.code == 0, done.out + done.err
    folder = here.run_folder("slow-disk")
    lines = [(line["kind"], line["step"]) for line in read_metrics(folder / "metrics.jsonl")]
    assert lines.index(("train", 13)) < lines.index(("checkpoint", 9))
    first, put_off, last = (line["step"] for line in records(folder, "checkpoint"))
    assert (first, last) == (9, 17)
    assert 13 <= put_off < 17
    losses = {line["step"]: line["loss"] for line in records(folder, "eval")}
    best = open_state(folder / f"checkpoints/step-{put_off}")[0]["best"]
    assert losses[10] < losses[0]
    assert best == {"step": put_off, "loss": losses[10], "measured": 10}
    assert all(line["blocked_seconds"] < 3 for line in records(folder, "checkpoint"))


@pytest.mark.slow
def test_an_orderly_stop_finishes_the_checkpoint_that_is_being_written(here: Place, tmp_path: Path) -> None:
    """Rank 1 still writes when a loss is not a number, for longer than a rank that must end would be waited for."""
    base, rows = Path(shutil.copytree(here.folder / "base", tmp_path / "base")), tmp_path / "rows.jsonl"
    write_rows(rows, range(96))
    rows.write_text(rows.read_text().replace("Return number 70.", "Return number 70\u0416."))
    vocabulary = json.loads((base / "tokenizer.json").read_text())["model"]["vocab"]
    poison(base, vocabulary["\u00d0"])  # how a byte-level tokenizer spells it
    changes = {"model__path": base, "data__train": f"[{{path: {rows}}}]", "data__eval": "[]"}
    often = {"train__eval_every_steps": 0, "checkpoint__every_steps": 1}
    done = launch_held(here, "stopped", tmp_path / "hooks", step=1, sign="not_finite", seconds=7, **changes, **often)
    assert done.code == 2, done.out + done.err
    folder = here.run_folder("stopped")
    assert newest_checkpoint(folder / "checkpoints") == (folder / "checkpoints/step-1", [])
    assert f"the newest checkpoint is {folder}/checkpoints/step-1" in done.err
    assert [line["step"] for line in records(folder, "checkpoint")] == [1]
    assert not list(folder.rglob("*.tmp"))
    replayed_as_then(folder, base, here.folder / "base")


def replayed_as_then(folder: Path, base: Path, healthy: Path) -> None:
    """The kept batch is not finite again in the same sequences, on weights that are sick, and nowhere on others."""
    (kept,) = (folder / "crash").iterdir()
    batch, facts = read_step(kept)
    losses = losses_of_step(from_pretrained(base, dtype=torch.float32), batch)
    assert losses.shape == (2, 2, 2)
    assert facts["step"] > 1
    assert 0 < (~losses.isfinite()).sum() < losses.numel()
    assert torch.equal(losses.isfinite(), batch["loss_sums"].isfinite())
    done = command("replay", str(kept))
    assert done.code == 0, done.out + done.err
    sick = batch["packs"][~losses.isfinite()].tolist()
    for number in batch["packs"].flatten().tolist():
        (line,) = (line for line in done.out.splitlines() if line.startswith(f"sequence {number} ("))
        assert line.endswith("summed to nan, now nan") == (number in sick), line
    assert done.out.endswith("not finite in the same sequences\n")
    done = command("replay", str(kept), "--model", str(healthy))
    assert done.code == 1, done.out + done.err
    assert "not the same as then: it depends on what the run had learnt" in done.out
    done = command("replay", str(kept.with_name("step-0")))
    assert done.code == 2
    assert done.err.startswith(f"nextune: {folder}/crash/step-0: holds no batch of a step that can be read (")


@pytest.mark.slow
def test_the_best_checkpoint_outlives_newer_ones_and_is_exported_and_the_wandb_run_goes_on(
    here: Place, tmp_path: Path
) -> None:
    """The first step lowers the held-out loss, the next two raise it, at such a scale of the adapters.

    Then the file that names the W&B run is lost.
    """
    rising = {"optim__lr": 0.25, "optim__warmup_steps": 2, "lora__alpha": 4096, "train__eval_every_steps": 1}
    kept = {"checkpoint__every_steps": 1, "checkpoint__keep": 1, "checkpoint__keep_best": "true"}
    changes = QUIET | rising | kept | {"monitor__wandb": "offline"}
    done = here.launch(name="best", train__steps=3, **changes)
    assert done.code == 0, done.out + done.err
    folder = here.run_folder("best")
    losses = {line["step"]: line["loss"] for line in records(folder, "eval")}
    best = min(losses, key=lambda step: losses[step])
    assert best == 1, losses
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-1", "step-3"]
    assert open_state(folder / "checkpoints/step-3")[0]["best"] == {"step": best, "loss": losses[best]}
    to = tmp_path / "adapter"
    done = command("export", str(folder), "--to", str(to), "--format", "adapter", "--checkpoint", "best")
    assert done.code == 0, done.out + done.err
    trained, other = (open_state(folder / f"checkpoints/step-{step}")[1] for step in (best, 3))
    factors = load_file(to / "adapter_model.safetensors")
    assert len(factors) > 10
    for name, factor in factors.items():
        stored = name.removeprefix("base_model.model.").replace(".weight", ".default.weight::fp32")
        assert torch.equal(factor, trained.read(stored)), name
        assert not torch.equal(factor, other.read(stored)), name

    known = (folder / "wandb/run-id").read_text()
    (folder / "wandb/run-id").unlink()
    done = here.launch(name="best", train__steps=4, **changes)
    assert done.code == 0, done.out + done.err
    assert "continuing after step 3" in done.out
    assert (folder / "wandb/run-id").read_text() == known
    assert {path.name.rpartition("-")[2] for path in (folder / "wandb").glob("offline-run-*")} == {known}
    assert len(list((folder / "wandb").glob("offline-run-*"))) == 2


def test_a_run_does_not_go_on_upon_other_base_weights(here: Place, tmp_path: Path) -> None:
    own = Place(tmp_path)
    shutil.copytree(here.folder / "base", own.folder / "base")
    for name in ("train.jsonl", "heldout.jsonl"):
        shutil.copy(here.folder / name, own.folder / name)
    folder = run_with_checkpoint(own, "other-base")
    weights = own.folder / "base/model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.1.mlp.experts.3.up_proj.weight"] *= 1.5
    save_file(tensors, weights, metadata={"format": "pt"})
    done = own.by_hand(name="other-base")
    assert done.code == 2, done.out + done.err
    assert "Traceback" not in done.err
    assert done.err.rpartition("nextune: ")[2] == (
        f"{folder}/checkpoints/step-1: belongs to other base weights than {own.folder}/base holds now; put them back,"
        " or start a new run under another name\n"
    )
