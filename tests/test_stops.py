"""Real runs that are asked to stop, by any of the ways that schedulers and people have: they save, say "resumable" and
end with exit code 0, and the same command goes on to the parameters of a run that nothing happened to.
"""

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from finetune.checkpoint.resume import newest_checkpoint, open_state
from finetune.run.folder import finished_step, stopped_step
from tests.commands import ROOT, SECONDS, TINY, UNWATCHED, Place, launcher, place, records, start
from tests.hosts import Hosts, two_hosts

STEPS = 60
QUICK: dict[str, Any] = {
    **UNWATCHED,
    "train__steps": STEPS,
    "checkpoint__every_steps": 0,  # what is kept was saved because of the signal
}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return place(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """A checkout with its .venv set up; one host is enough."""
    with two_hosts(tmp_path_factory.mktemp("machine") / "one", "loopback") as machine:
        (machine.folder / "mine.yaml").write_text((ROOT / "recipes/tiny.yaml").read_text())
        yield machine


def launch(machine: Hosts, here: Place, name: str) -> "subprocess.Popen[str]":
    return machine.start(
        "bash", machine.launch, str(machine.folder / "mine.yaml"), *settings(here, name), cwd=here.folder
    )


def settings(here: Place, name: str, **changes: Any) -> list[str]:
    return here.settings(name=name, **QUICK | changes)


def wait_for_a_step(process: "subprocess.Popen[str]", folder: Path) -> None:
    """Until this start of the run has taken a step."""
    metrics, end = folder / "metrics.jsonl", time.monotonic() + SECONDS
    before = metrics.read_text().count('"kind": "start"') if metrics.exists() else 0
    while not (metrics.exists() and re.search(r'"kind": "train"', since_start(metrics.read_text(), before))):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "no step was taken"
        time.sleep(0.01)


def since_start(text: str, before: int) -> str:
    """The lines of the starts after the first `before`."""
    return "".join(text.split('"kind": "start"')[before + 1 :])


def ranks_below(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if any(word.startswith("--local_rank=") for word in child.cmdline())]


# train.py with a watch that does not wait for an hour, over ranks of which the second never comes back from one call.
HANG = """
import os, sys, time
from finetune.commands import train as launch
from finetune.training import trainer
from finetune.cli import main
from finetune.run.failure import leave
from finetune.run.watchdog import Watch

where, before = sys.argv[1], int(sys.argv[2])
real, calls = getattr(trainer, where), []

def hangs(*arguments, **named):
    calls.append(where)
    if os.environ["RANK"] == "1" and len(calls) > before:
        time.sleep(600)
    return real(*arguments, **named)

setattr(trainer, where, hangs)
launch.Watch = lambda folder, rank, stall_seconds: Watch(folder, rank, stall_seconds=15, grace_seconds=8)
leave(main(["train", *sys.argv[3:]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("where", "before"), [("optimize", 5), ("assemble", 0)])
def test_a_rank_that_hangs_leaves_the_stacks_of_all_and_the_same_command_goes_on(
    where: str, before: int, here: Place, undisturbed: dict[str, Tensor], tmp_path: Path
) -> None:
    """In a step, and while the run is put together; the collectives' own timeouts are those of every run."""
    folder = here.run_folder(f"hangs-in-{where}")
    (tmp_path / "hang.py").write_text(HANG)
    command, arguments = launcher(2), [*TINY, *settings(here, folder.name, checkpoint__every_steps=2)]
    # The launcher gives the script its rank as the first argument.
    script = f"import runpy, sys; sys.argv[1:] = ['{where}', '{before}', *sys.argv[1:]]; runpy.run_path('hang.py')"
    (tmp_path / "start.py").write_text(script)
    process = start(*command[:-1], str(tmp_path / "start.py"), *arguments, cwd=tmp_path, PYTHONPATH=str(ROOT))
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode != 0
    stacks = {rank: folder / f"crash/rank{rank}.stack" for rank in range(2)}
    assert all(stack.exists() for stack in stacks.values()), out + err
    texts = {rank: stack.read_text() for rank, stack in stacks.items()}
    assert all(text.startswith("no progress for 15 s, 20") for text in texts.values())
    assert "in hangs" in texts[1]
    assert f"in {where}" in texts[0] or where == "assemble"
    for rank, stack in stacks.items():
        told = f"nextune: rank {rank} on {os.uname().nodename}: no rank made progress for 15 s; the stacks of this one"
        assert f"{told} are in {stack}" in err
    if where == "assemble":
        return
    process = start(*command, *arguments, cwd=here.folder)
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, out + err
    assert "continuing after step 4 from" in out
    ended = tensors_of(folder)
    assert all(torch.equal(ended[name], undisturbed[name]) for name in undisturbed)
    assert {rank: stack.read_text() for rank, stack in stacks.items()} == texts


def lives(rank: psutil.Process) -> bool:
    """Whether it runs; one that ended after its launcher may stay a zombie where nobody collects those."""
    return rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return dict(open_state(folder / f"checkpoints/step-{STEPS}")[1])


@pytest.fixture(scope="module")
def undisturbed(here: Place) -> dict[str, Tensor]:
    process = start(*launcher(2), *TINY, *settings(here, "never-stopped"), cwd=here.folder)
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, out + err
    assert stopped_step(here.run_folder("never-stopped")) is None
    return tensors_of(here.run_folder("never-stopped"))


def check_stopped(folder: Path, reason: str) -> None:
    """Saved after the step that the signal came in, and nothing lost of it."""
    stopped = records(folder, "action")[-1]
    assert stopped["message"] == f"{reason}: saved and stopped, resumable"
    assert stopped_step(folder) == stopped["step"] < STEPS
    kept, _ = newest_checkpoint(folder / "checkpoints")
    assert kept is not None
    assert kept.name == f"step-{stopped['step']}"
    assert not list(folder.rglob("*.tmp"))


def test_a_signal_to_the_whole_group_of_the_launcher_saves(here: Place) -> None:
    """As Kubernetes, PBS and `scancel --full` send it: the rank gets one, and another from DeepSpeed's launcher."""
    folder = here.run_folder("whole-group")
    process = start(*launcher(2), *TINY, *settings(here, folder.name), cwd=here.folder)
    try:
        wait_for_a_step(process, folder)
        ranks = ranks_below(process)
        assert len(ranks) == 2
        os.killpg(process.pid, signal.SIGTERM)
        time.sleep(0.05)  # the launcher's own may come so soon that the two are one
        for rank in ranks:
            with suppress(psutil.NoSuchProcess):
                rank.terminate()
        psutil.wait_procs(ranks, timeout=60)
        process.communicate(timeout=60)
        assert not any(lives(rank) for rank in ranks)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    check_stopped(folder, "SIGTERM")


@pytest.mark.slow
def test_a_job_that_is_stopped_in_every_way_is_resumable_each_time_and_ends_as_if_nothing_had_happened(
    machine: Hosts, here: Place, undisturbed: dict[str, Tensor]
) -> None:
    folder = here.run_folder("stopped-by-all")
    for whom, asked in (("launch.sh", signal.SIGUSR1), ("everyone", signal.SIGTERM), ("ranks", signal.SIGTERM)):
        process = launch(machine, here, folder.name)
        wait_for_a_step(process, folder)
        ranks = ranks_below(process)
        assert len(ranks) == 2
        below = psutil.Process(process.pid).children(recursive=True)
        for pid in {
            "launch.sh": [process.pid],
            "everyone": [process.pid, *(child.pid for child in below)],
            "ranks": [rank.pid for rank in ranks],
        }[whom]:
            os.kill(pid, asked)
        out, err = process.communicate(timeout=SECONDS)
        assert process.returncode == 0, (whom, out, err)
        assert "Stopped in order, resumable" in out
        assert "Traceback" not in err
        assert not any(lives(rank) for rank in ranks)
        check_stopped(folder, "SIGTERM")
        assert finished_step(folder) is None
    process = launch(machine, here, folder.name)
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, out + err
    assert finished_step(folder) == STEPS
    assert stopped_step(folder) is None
    assert len(records(folder, "start")) == 4
    ended = tensors_of(folder)
    assert ended.keys() == undisturbed.keys()
    assert all(torch.equal(ended[name], undisturbed[name]) for name in ended)
