"""What ends a run at the worst moment, done to real runs: after each, the same command goes on to the same parameters.

Moments are found by watching the run folder from outside. One run is killed again and again; what it has become in the
end is compared, bit for bit, with a run that nothing happened to.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from finetune.checkpoint.resume import newest_checkpoint, open_state
from finetune.run.folder import finished_step
from monitoring.metrics import read_metrics
from tests.commands import SECONDS, TINY, UNWATCHED, Place, launcher, place, records, start
from tests.poison import poison

STEPS = 80
QUICK: dict[str, Any] = {
    **UNWATCHED,
    "train__steps": STEPS,
    "checkpoint__every_steps": 2,
    "checkpoint__keep": 3,
}


class Kill(NamedTuple):
    moment: str  # "step", "save" or "between files" of a checkpoint
    rank: int
    steps: int  # that the start makes before
    delay: float  # seconds from when the moment is seen


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return place(tmp_path_factory.getbasetemp())


def begin(here: Place, name: str, **changes: Any) -> "subprocess.Popen[str]":
    return start(*launcher(2), *TINY, *here.settings(name=name, **QUICK | changes), cwd=here.folder)


def run_to_end(here: Place, name: str, **changes: Any) -> tuple[int, str, str]:
    process = begin(here, name, **changes)
    try:
        out, err = process.communicate(timeout=SECONDS)
    finally:
        end_all(process)
    return process.returncode, out, err


def end_all(process: "subprocess.Popen[str]") -> None:
    """End what is left of the process group that the launcher got."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def rank_of(process: "subprocess.Popen[str]", rank: int) -> psutil.Process:
    """The process of a rank: the script itself, of which the launcher's arguments are no part."""
    children = psutil.Process(process.pid).children(recursive=True)
    return next(c for c in children if f"--local_rank={rank}" in c.cmdline())


def until(process: "subprocess.Popen[str]", happened: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.0005)


def step_now(folder: Path) -> int:
    """The last step that the newest start has reported; 0 before its first."""
    path = folder / "metrics.jsonl"
    newest = path.read_text().rpartition('"kind": "start"')[2] if path.exists() else ""
    found = re.findall(r'"kind": "train", "step": (\d+)', newest)
    return int(found[-1]) if found else 0


def starts(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_text().count('"kind": "start"') if path.exists() else 0


def unfinished(folder: Path, *, with_part: bool = False) -> set[str]:
    """Checkpoints that are being written, or were when a rank died: their manifest is not there, a part may be."""
    found = (folder / "checkpoints").glob("step-*.tmp/part-*.safetensors" if with_part else "step-*.tmp")
    return {(path.parent if with_part else path).name for path in found}


def tensors_of(folder: Path, step: int = STEPS) -> dict[str, Tensor]:
    return dict(open_state(folder / f"checkpoints/step-{step}")[1])


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def undisturbed(here: Place) -> dict[str, Tensor]:
    code, out, err = run_to_end(here, "undisturbed")
    assert code == 0, out + err
    return tensors_of(here.run_folder("undisturbed"))


def kill_at(here: Place, name: str, kill: Kill) -> None:
    """Start or go on with the run and kill one rank with SIGKILL; nothing that was saved is lost."""
    folder = here.run_folder(name)
    before, _ = newest_checkpoint(folder / "checkpoints")
    begun, left_behind = starts(folder), unfinished(folder)
    process = begin(here, name)
    try:
        first = int(before.name[5:]) if before else 0
        until(process, lambda: starts(folder) > begun and step_now(folder) >= first + kill.steps)
        if kill.moment != "step":  # one that this start writes, not what an earlier kill has left
            with_part = kill.moment == "between files"
            until(process, lambda: bool(unfinished(folder, with_part=with_part) - left_behind))
        time.sleep(kill.delay)
        rank_of(process, kill.rank).kill()
        process.communicate(timeout=SECONDS)
        assert process.returncode != 0
    finally:
        end_all(process)
    assert finished_step(folder) is None
    saved = [line["step"] for line in records(folder, "checkpoint")]
    kept, _ = newest_checkpoint(folder / "checkpoints")
    assert (int(kept.name[5:]) if kept else 0) >= max([first, *saved])


def kills(number: int, seed: int) -> list[Kill]:
    """Random moments, every kind as often; they begin when the run has saved once or twice."""
    draw = random.Random(seed)
    moments = ("step", "save", "between files")
    return [
        Kill(
            moments[n % 3],
            draw.randrange(2),
            draw.randint(4, 6) if n == 0 else draw.randint(1, 3),
            draw.uniform(0, wide),
        )
        for n in range(number)
        for wide in ((0.05,) if n % 3 == 0 else (0.004,))
    ]


@pytest.mark.slow  # in every check: test_resume.py kills a writer at any moment, test_train_command.py a run
@pytest.mark.parametrize("number", [3, 20])
def test_a_run_whose_ranks_are_killed_again_and_again_ends_as_if_nothing_had_happened(
    number: int, here: Place, undisturbed: dict[str, Tensor]
) -> None:
    name = f"killed-{number}-times"
    for kill in kills(number, seed=number):
        kill_at(here, name, kill)
    code, out, err = run_to_end(here, name)
    assert code == 0, out + err
    assert "continuing after step" in out
    assert finished_step(here.run_folder(name)) == STEPS
    assert same(tensors_of(here.run_folder(name)), undisturbed)
    assert not list(here.run_folder(name).rglob("*.tmp"))


@pytest.mark.parametrize("victim", [pytest.param("runner", marks=pytest.mark.slow), "launcher"])
def test_ranks_that_lost_their_launcher_save_and_end_and_its_exit_code_is_not_believed(
    victim: str, here: Place, undisturbed: dict[str, Tensor]
) -> None:
    """SIGTERM to DeepSpeed's runner orphans the ranks; its launcher killed makes the runner exit with code 0."""
    folder = here.run_folder(f"without-{victim}")
    process = begin(here, folder.name)
    try:
        until(process, lambda: step_now(folder) > 1)
        ranks = [rank_of(process, rank) for rank in range(2)]
        if victim == "runner":
            process.terminate()
        else:
            ranks[0].parent().kill()  # type: ignore[union-attr]
        process.wait(timeout=60)
        _, alive = psutil.wait_procs(ranks, timeout=60)
        assert not alive
    finally:
        end_all(process)
    assert process.returncode == (0 if victim == "launcher" else -signal.SIGTERM)
    assert finished_step(folder) is None
    stopped = records(folder, "action")[-1]
    assert stopped["message"] == "the launcher died: saved and stopped, resumable"
    kept, _ = newest_checkpoint(folder / "checkpoints")
    assert kept is not None
    assert kept.name == f"step-{stopped['step']}"
    if victim == "runner":
        code, out, err = run_to_end(here, folder.name)
        assert code == 0, out + err
        assert same(tensors_of(folder), undisturbed)


def poisoned(here: Place) -> tuple[Path, Path]:
    """A base that overflows on one token, and rows of which one holds that token."""
    base, rows = here.folder / "poisoned-base", here.folder / "poisoned.jsonl"
    shutil.copytree(here.folder / "base", base)
    lines = (here.folder / "train.jsonl").read_text().splitlines()
    lines[40] = json.dumps(json.loads(lines[40].replace("Return number 40.", "Return ~~~~ 40.")))
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    ids = tokenizer.encode("Return ~~~~ 40.").ids
    ordinary = {i for line in lines if "~~~~" not in line for i in tokenizer.encode(line).ids}
    rare = next(i for i in ids if i not in ordinary)
    poison(base, rare)
    rows.write_text("\n".join(lines) + "\n")
    return base, rows


def test_a_loss_that_is_not_a_number_stops_with_its_batch_or_is_skipped_and_changes_nothing(here: Place) -> None:
    base, rows = poisoned(here)
    changes = {
        "model__path": base,
        "data__train": f"[{{path: {rows}}}]",
        "train__steps": 16,
        "checkpoint__every_steps": 1,
        "checkpoint__keep": 20,
    }
    folder = here.run_folder("poisoned")
    code, out, err = run_to_end(here, "poisoned", **changes)
    assert code == 2, out + err
    found = re.search(r"nextune: step (\d+): the loss or the gradient is not finite: (.*)", err)
    assert found is not None, err
    step = int(found[1])
    assert re.match(
        r"the loss is not finite on sequence \d+ of the training data \(rank \d, micro-batch \d\)", found[2]
    )
    kept = folder / "crash" / f"step-{step}"
    assert f"its batch is in {kept}" in found[2]
    assert "Traceback" not in err
    batch, facts = load_file(kept / "batches.safetensors"), json.loads((kept / "step.json").read_text())
    assert facts["step"] == step
    shape = (2, 2, 2)  # micro-batches, ranks, packs
    assert batch["packs"].shape == batch["loss_sums"].shape == shape
    assert {batch[name].shape for name in ("input_ids", "labels", "segment_ids")} == {(*shape, 128)}
    token = load_file(base / "model.safetensors")["model.embed_tokens.weight"][:, 0].nonzero()
    assert torch.equal((batch["input_ids"] == token).any(-1), ~batch["loss_sums"].isfinite())

    code, out, err = run_to_end(here, "poisoned", **changes, train__on_nan="skip")
    assert code == 0, out + err
    skipped = [line for line in read_metrics(folder / "metrics.jsonl") if line.get("rule") == "not_finite"]
    assert step in [line["step"] for line in skipped]
    assert all(line["level"] == "warn" and "changed nothing that trains" in line["message"] for line in skipped)
    before = tensors_of(folder, step - 1)
    left_out, after = tensors_of(folder, step), tensors_of(folder, step + 1)
    for state in (before, left_out, after):
        del state["windows"]
    assert same(before, left_out)
    assert not same(left_out, after)
    assert open_state(folder / "checkpoints/step-16")[0]["left_out"]["total"] == len(skipped)


def test_a_damaged_newest_checkpoint_is_passed_over_and_all_damaged_are_refused(
    here: Place, undisturbed: dict[str, Tensor]
) -> None:
    runs = here.folder / "damaged"
    folder = runs / "undisturbed"
    shutil.copytree(here.run_folder("undisturbed"), folder)
    (folder / "finished.json").unlink()

    def flip(step: int) -> None:
        path = folder / f"checkpoints/step-{step}/part-00000.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    flip(STEPS)
    code, out, err = run_to_end(here, "undisturbed", output__dir=runs)
    assert code == 0, out + err
    assert re.search(rf"step-{STEPS}: passed over, part-00000\.safetensors was changed after .*its sha256 is", out)
    assert f"continuing after step {STEPS - 2} from" in out
    assert same(tensors_of(folder), undisturbed)
    (folder / "finished.json").unlink()
    for path in (folder / "checkpoints").glob("step-*"):
        flip(int(path.name[5:]))
    code, out, err = run_to_end(here, "undisturbed", output__dir=runs)
    assert code == 2
    assert "none of its checkpoints is whole" in err
