"""Checkpoints of real runs: written while steps go on, finished before an orderly stop, the best kept.

Writes are slowed from outside: a `sitecustomize` on PYTHONPATH holds back one rank's file until the run's own lines say
that something has happened.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from finetune.checkpoint.resume import newest_checkpoint, open_state
from monitoring.metrics import read_metrics
from tests.commands import TINY, Done, Place, launcher, place, records, run, write_rows

HELD = """
import os, time
if os.environ.get("RANK") == "1":
    import safetensors.torch
    def held(tensors, path, *more, save=safetensors.torch.save_file, **others):
        if "/step-{step}." in str(path):
            end = time.monotonic() + 60
            while {sign!r} not in open({metrics!r}).read() and time.monotonic() < end:
                time.sleep(0.02)
            time.sleep({seconds})
        save(tensors, path, *more, **others)
    safetensors.torch.save_file = held
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


def test_an_orderly_stop_finishes_the_checkpoint_that_is_being_written(here: Place, tmp_path: Path) -> None:
    """Rank 1 still writes when a loss is not a number, for longer than a rank that must end would be waited for."""
    base, rows = Path(shutil.copytree(here.folder / "base", tmp_path / "base")), tmp_path / "rows.jsonl"
    write_rows(rows, range(96))
    rows.write_text(rows.read_text().replace("Return number 70.", "Return number 70\u0416."))
    vocabulary = json.loads((base / "tokenizer.json").read_text())["model"]["vocab"]
    tensors = load_file(base / "model.safetensors")
    tensors["model.embed_tokens.weight"][vocabulary["\u00d0"]] = float("inf")  # how a byte-level tokenizer spells it
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    changes = {"model__path": base, "data__train": f"[{{path: {rows}}}]", "data__eval": "[]"}
    often = {"train__eval_every_steps": 0, "checkpoint__every_steps": 1}
    done = launch_held(here, "stopped", tmp_path / "hooks", step=1, sign="not_finite", seconds=7, **changes, **often)
    assert done.code == 2, done.out + done.err
    folder = here.run_folder("stopped")
    assert newest_checkpoint(folder / "checkpoints") == (folder / "checkpoints/step-1", [])
    assert f"the newest whole checkpoint is {folder}/checkpoints/step-1" in done.err
    assert [line["step"] for line in records(folder, "checkpoint")] == [1]
    assert not list(folder.rglob("*.tmp"))
