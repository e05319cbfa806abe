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
from finetune.run_folder import finished_step, stopped_step
from tests.commands import ROOT, SECONDS, TINY, Place, launcher, place, records, start
from tests.hosts import Hosts, two_hosts

STEPS = 60
QUICK: dict[str, Any] = {
    "train__steps": STEPS,
    "train__eval_every_steps": 0,
    "train__log_every_steps": 1,
    "data__eval": "[]",
    "monitor__routing_every_steps": 0,
    "monitor__drift_every_steps": None,
    "monitor__probe_tokens": None,
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


def settings(here: Place, name: str) -> list[str]:
    return here.settings(name=name, **QUICK)


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
