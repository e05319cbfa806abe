"""A rank that what started it has left behind ends: real processes and real orphans, at every moment of the start."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from finetune.cluster.launcher import launcher_of

ROOT = Path(__file__).resolve().parent.parent
# As DeepSpeed's launcher sets it on one host.
OF_DEEPSPEED = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
OF_DEEPSPEED |= {"CROSS_RANK": "0", "CROSS_SIZE": "1"}
TOLD = r"nextune: rank 0 on \S+: the launcher died before the first step, so this rank ends; nothing is lost"

# A process that starts another one and waits for it. Its further words are what DeepSpeed's two are known by.
WAITING = [sys.executable, "-c", "import subprocess, sys; subprocess.run(sys.argv[2:])"]
LAUNCHER, RUNNER = [*WAITING, "deepspeed.launcher.launch"], [*WAITING, "deepspeed"]
# The start of train.py, with a second of sleep for what it imports, and ten for what it does.
RANK = """
import os
os.environ["NEXTUNE_PARENT"] = str(os.getppid())
import time
open("started", "w").close()
time.sleep(1)
from finetune.cluster.launcher import launcher_of
launcher = launcher_of(os.environ)
launcher.begin()
open("watched", "w").close()
time.sleep(10)
open("worked", "w").close()
"""


class Start:
    """A chain of processes, each of which starts the next, and the folder that the last one works in."""

    def __init__(self, folder: Path, command: list[str], **environment: str):
        self.folder = folder
        with (folder / "stderr").open("w") as errors:
            environment = {**os.environ, "PYTHONPATH": str(ROOT), **OF_DEEPSPEED, **environment}
            self.top = subprocess.Popen(command, cwd=folder, env=environment, stdout=errors, stderr=errors)

    def wait_for(self, name: str) -> None:
        until(lambda: (self.folder / name).exists(), f"no file {name}")

    def chain(self, length: int) -> list[psutil.Process]:
        """The processes, from the first one down."""
        top = psutil.Process(self.top.pid)
        until(lambda: len(top.children(recursive=True)) == length - 1, "not started")
        return [top, *top.children(recursive=True)]

    def errors(self) -> str:
        return (self.folder / "stderr").read_text()


def until(true: Callable[[], bool], complaint: str, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, complaint
        time.sleep(0.02)


def lives(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


@pytest.fixture
def started() -> Iterator[list[psutil.Process]]:
    """Processes to end after the test."""
    processes: list[psutil.Process] = []
    yield processes
    for process in processes:
        if process.is_running():
            process.kill()


def check_orphan(start: Start, rank: psutil.Process) -> None:
    """The rank ends long before its work is done, and says why."""
    until(lambda: not lives(rank), "the orphan works on", seconds=8)
    assert not (start.folder / "worked").exists()
    assert re.search(TOLD, start.errors()), start.errors()


@pytest.mark.parametrize("moment", ["started", "watched"])
@pytest.mark.parametrize("victim", [0, 1, 2], ids=["launch.sh", "runner", "launcher"])
def test_an_orphan_of_launch_sh_ends(tmp_path: Path, started: list[psutil.Process], victim: int, moment: str) -> None:
    """Left behind while it imports its libraries, and while it is put together."""
    shell = 'NEXTUNE_STARTERS="$$ $BASHPID" exec "$@" & wait'
    start = Start(tmp_path, ["bash", "-c", shell, "launch.sh", *RUNNER, *LAUNCHER, sys.executable, "-c", RANK])
    start.wait_for(moment)
    started += start.chain(4)
    started[victim].kill()
    if victim == 0:
        start.top.wait()
    check_orphan(start, started[3])


@pytest.mark.parametrize("victim", [0, 1], ids=["runner", "launcher"])
def test_an_orphan_of_deepspeed_alone_ends(tmp_path: Path, started: list[psutil.Process], victim: int) -> None:
    start = Start(tmp_path, [*RUNNER, *LAUNCHER, sys.executable, "-c", RANK])
    start.wait_for("watched")
    started += start.chain(3)
    started[victim].kill()
    if victim == 0:
        start.top.wait()
    check_orphan(start, started[2])


@pytest.mark.parametrize("dies", [True, False])
def test_train_py_notices_a_launcher_that_died_before_its_first_statement(
    tmp_path: Path, started: list[psutil.Process], dies: bool
) -> None:
    """The real script, held up before Python starts. With its launcher alive it comes to the recipe."""
    held = ["bash", "-c", 'until [[ -e go ]]; do sleep 0.05; done; exec "$@"', "held"]
    script = [sys.executable, str(ROOT / "finetune/train.py"), "--local_rank=0", "--recipe", "no-such.yaml"]
    start = Start(tmp_path, [*LAUNCHER, *held, *script])
    until(lambda: len(psutil.Process(start.top.pid).children()) == 1, "not started")
    started += [psutil.Process(start.top.pid), *psutil.Process(start.top.pid).children()]
    if dies:
        started[0].kill()
        start.top.wait()
    (tmp_path / "go").touch()
    until(lambda: not lives(started[1]), "it does not end")
    assert bool(re.search(TOLD, start.errors())) == dies, start.errors()
    assert ("no-such.yaml" in start.errors()) != dies


def test_a_rank_that_a_user_started_by_hand_may_outlive_the_shell() -> None:
    assert launcher_of({"NEXTUNE_PARENT": "1"}) is None
    assert launcher_of({"RANK": "0", "WORLD_SIZE": "1", "SLURM_JOB_ID": "7"}) is None


@pytest.mark.parametrize("variable", ["SLURM_PROCID", "TORCHELASTIC_RUN_ID"])
def test_a_task_of_slurm_or_torchrun_is_bound_to_its_parent(variable: str) -> None:
    launcher = launcher_of({variable: "0", "NEXTUNE_PARENT": str(os.getppid())})
    assert launcher is not None
    assert not launcher.is_dead()
    launcher = launcher_of({variable: "0", "NEXTUNE_PARENT": str(os.getpid())})  # not our parent any more
    assert launcher is not None
    assert launcher.is_dead()


def test_a_starter_that_is_gone_already_is_noticed() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    environment = {"NEXTUNE_PARENT": str(os.getppid()), "SLURM_PROCID": "0"}
    launcher = launcher_of({**environment, "NEXTUNE_STARTERS": f"{os.getppid()} {gone.pid}"})
    assert launcher is not None
    assert launcher.is_dead()
