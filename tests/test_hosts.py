"""Hostfiles and SLURM variables as text, and one command on several hosts with an `ssh` that only starts it here."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finetune.cluster.hostfile import HostError, describe, read_hostfile
from finetune.cluster.slurm import SlurmError, first_node, task_environment, tasks_by_node
from tests.commands import ROOT
from tests.hosts import write_tool

TASK = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "1",
    "SLURM_STEP_NUM_TASKS": "20",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2),4",
    "SLURM_STEP_NODELIST": "gpu[07-08,11]",
    "SLURM_PROCID": "17",
    "SLURM_NODEID": "2",
    "SLURM_LOCALID": "1",
}


def test_a_slurm_task_knows_its_place() -> None:
    assert task_environment(TASK) == {
        "RANK": "17",
        "WORLD_SIZE": "20",
        "LOCAL_RANK": "1",
        "LOCAL_SIZE": "4",
        "CROSS_RANK": "2",
        "CROSS_SIZE": "3",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": str(20_000 + 1234 * 7 + 1),
    }
    told = task_environment({**TASK, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "7"})
    assert (told["MASTER_ADDR"], told["MASTER_PORT"]) == ("10.0.0.1", "7")


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0"},  # a batch script
        {"SLURM_STEP_NUM_TASKS": "x"},  # no task
        {**TASK, "SLURM_STEP_NUM_TASKS": "1"},  # srun --pty bash
        {**TASK, "RANK": "3"},  # a launcher inside a step
    ],
)
def test_what_is_no_task_is_left_alone(environment: dict[str, str]) -> None:
    assert task_environment(environment) == {}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"SLURM_STEP_NODELIST": None}, "the variable SLURM_STEP_NODELIST is not set; start it by srun"),
        ({"SLURM_STEP_TASKS_PER_NODE": "8x2"}, "do not say where it is; set RANK, LOCAL_RANK"),
        ({"SLURM_STEP_NUM_TASKS": "a[$(id)]"}, "SLURM_STEP_NUM_TASKS is 'a[$(id)]'; it must be a whole number"),
        ({"SLURM_PROCID": "x"}, "SLURM_PROCID is 'x'; it must be a whole number"),
        ({"SLURM_LOCALID": "-1"}, "SLURM_LOCALID is '-1'; it must be a whole number"),
        ({"RANK": "first"}, "RANK is 'first'; it must be a whole number"),
        ({"RANK": "0", "WORLD_SIZE": "1.5"}, "WORLD_SIZE is '1.5'; it must be a whole number"),
        ({"MASTER_PORT": "a"}, "MASTER_PORT is 'a'; it must be a whole number"),
        ({"SLURM_NODEID": "3"}, "do not say where it is"),
        ({"SLURM_STEP_NODELIST": "[1-2]"}, "do not say where it is"),
    ],
)
def test_variables_that_say_nothing_are_told(change: dict[str, str | None], sentence: str) -> None:
    environment = {name: value for name, value in (TASK | change).items() if value is not None}
    with pytest.raises(SlurmError, match=re.escape(sentence)):
        task_environment(environment)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu07", "gpu07"),
        ("gpu[07-09,12],login1", "gpu07"),
        ("a-1,b-2", "a-1"),
        ("rack1-n[3,5]-ib", "rack1-n3-ib"),
        ("10.77.0.1,10.77.0.2", "10.77.0.1"),
    ],
)
def test_the_first_node_of_a_list(nodes: str, first: str) -> None:
    """As `scontrol show hostnames` prints them."""
    assert first_node(nodes) == first


def test_tasks_of_each_node() -> None:
    assert tasks_by_node("8(x2),4,1(x3)") == [8, 8, 4, 1, 1, 1]


def test_a_hostfile_is_read_as_deepspeed_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# ours\nme@node1 slots=8\n\nnode2   slots=4  # half\n")
    hosts = read_hostfile(path)
    assert [(host.name, host.slots) for host in hosts] == [("me@node1", 8), ("node2", 4)]
    assert describe(hosts, 1) == "12 2 4 node1"
    with pytest.raises(HostError, match="--node-rank 2: the hostfile names 2 host"):
        describe(hosts, 2)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "no readable hostfile here .*every host needs it at this path"),
        ("", "names no host"),
        ("node1 slots=8\nnode2\n", ":2: 'node2' is not NAME slots=N"),
        ("node1 slots=0\n", ":1: 'node1 slots=0' is not NAME slots=N"),
        ("node1 slots=8\nnode1 slots=8\n", ":2: node1 is there twice"),
    ],
)
def test_a_hostfile_that_is_none_is_one_sentence(tmp_path: Path, text: str | None, sentence: str) -> None:
    path = tmp_path / "hosts"
    if text is not None:
        path.write_text(text)
    with pytest.raises(HostError, match=sentence) as caught:
        read_hostfile(path)
    assert "\n" not in str(caught.value)


# One command on each of several hosts.


class Fan:
    """`python -m finetune across`, with an `ssh` that writes down what it is asked and runs it on this machine."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "hosts").write_text("one slots=2\ntwo slots=2\n")
        write_tool(folder / "ssh", f'#!/bin/bash\necho "$*" >>{folder}/asked\nexec bash -c "${{!#}}"\n')

    def start(self, script: str, **environment: str) -> "subprocess.Popen[str]":
        """The script is told by `$2` which host it is on."""
        command = [sys.executable, "-P", "-m", "finetune", "across", str(self.folder / "hosts"), "bash", "-c", script]
        path = f"{self.folder}:{os.environ['PATH']}"
        return subprocess.Popen(
            [*command, "bash"],
            cwd=self.folder,
            env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


@pytest.fixture
def fan(tmp_path: Path) -> Fan:
    return Fan(tmp_path)


def test_every_host_gets_the_command_its_number_and_the_settings_of_the_libraries(fan: Fan) -> None:
    done = fan.start('echo "$PWD $*, $NCCL_DEBUG, $SECRET"', NCCL_DEBUG="IN FO", WANDB_API_KEY="secret")
    out, err = done.communicate(timeout=60)
    assert (done.returncode, err) == (0, "")
    assert sorted(out.splitlines()) == [f"{fan.folder} --node-rank {node}, IN FO, " for node in (0, 1)]
    assert "secret" not in (fan.folder / "asked").read_text()


def test_the_code_of_the_host_that_failed_is_the_commands(fan: Fan) -> None:
    """The other, which notices by itself, is given time to."""
    done = fan.start("[[ $2 == 1 ]] && exit 7; sleep 2; echo noticed; exit 3")
    out, err = done.communicate(timeout=60)
    assert (done.returncode, out) == (7, "noticed\n")
    assert err == "nextune: two ended with exit code 7\nnextune: one ended with exit code 3\n"


@pytest.mark.parametrize(
    ("asked", "last_words", "code"),
    [
        (signal.SIGINT, "", 130),
        (signal.SIGTERM, "", 0),  # every host says that it stopped in order
        (signal.SIGUSR1, "", 0),
        (signal.SIGTERM, "; [[ $2 == 0 ]] || exit 143", 143),
        (signal.SIGHUP, "; [[ $2 == 0 ]] || exit 7", 143),
        (signal.SIGKILL, "", -9),
    ],
)
def test_the_input_of_every_host_ends_with_the_command(
    fan: Fan, asked: signal.Signals, last_words: str, code: int
) -> None:
    done = fan.start("touch ready-$2; cat; touch ended-$2" + last_words)
    end = time.monotonic() + 60
    while len(list(fan.folder.glob("ready-*"))) < 2:
        assert time.monotonic() < end
        time.sleep(0.05)
    time.sleep(0.3)  # so that a signal finds the handlers in place
    assert not list(fan.folder.glob("ended-*"))
    done.send_signal(asked)
    assert done.wait(timeout=60) == code
    while len(list(fan.folder.glob("ended-*"))) < 2:
        assert time.monotonic() < end
        time.sleep(0.05)
    done.communicate()


def test_a_second_signal_ends_the_wait_for_hosts_that_are_saving(fan: Fan) -> None:
    done = fan.start("touch ready-$2; cat; touch asked-$2; exec sleep 60")
    for signs in ("ready-*", "asked-*"):
        end = time.monotonic() + 60
        while len(list(fan.folder.glob(signs))) < 2:
            assert time.monotonic() < end
            time.sleep(0.05)
        time.sleep(0.3)
        done.send_signal(signal.SIGTERM)
        done.send_signal(signal.SIGTERM)  # at once, as `timeout` does: the same signal
        if signs == "ready-*":
            time.sleep(2.5)
            assert done.poll() is None
    _, err = done.communicate(timeout=20)
    assert done.returncode == 143
    assert "nextune: got SIGTERM again; no longer waiting for one, two\n" in err


def test_a_host_that_ssh_does_not_reach_is_named(fan: Fan) -> None:
    done = fan.start("exit 255")
    _, err = done.communicate(timeout=60)
    assert done.returncode == 255
    assert "nextune: one ended with exit code 255; ssh itself failed, or lost the host\n" in err
