"""Training over two hosts: started by hostfile and by SLURM, one host that dies, going on with the one that is left.

Where this machine permits it the hosts are two network namespaces joined by a cable; else two loopback addresses, over
which the launch, the meeting and the exchange are the same, and only the network is not.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from monitoring.metrics import read_metrics
from tests.commands import ROOT, Place, free_port, place, records
from tests.hosts import Hosts, slurm, two_hosts, why_no_namespaces

SECONDS = 300  # for a run that takes 25 alone; the machine may be busy
STEPS = 12

REFUSED = why_no_namespaces()
KINDS = [
    pytest.param(
        "namespaces", marks=pytest.mark.skipif(REFUSED is not None, reason=f"no network namespaces here: {REFUSED}")
    ),
    pytest.param("loopback", marks=[pytest.mark.slow] if REFUSED is None else []),
]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return place(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module", params=KINDS)
def hosts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with two_hosts(tmp_path_factory.mktemp("hosts") / "both", request.param) as both:
        (both.folder / "mine.yaml").write_text((ROOT / "recipes/tiny.yaml").read_text())
        yield both


def job(hosts: Hosts, here: Place, name: str, **changes: Any) -> list[str]:
    """A recipe and its overrides; no dropout, whose draws would depend on the number of ranks."""
    settings = here.settings(name=f"{hosts.kind}-{name}", lora__dropout=None, **changes)
    return [str(hosts.folder / "mine.yaml"), *settings]


class Ended(NamedTuple):
    """A command that has ended, and how long that took from the moment it was watched."""

    code: int
    out: str
    err: str
    seconds: float


def end_of(process: Any) -> Ended:
    began = time.monotonic()
    out, err = process.communicate(timeout=SECONDS)
    return Ended(process.returncode, out, err, time.monotonic() - began)


def wait_for_step(process: Any, folder: Path, step: int) -> None:
    metrics, end = folder / "metrics.jsonl", time.monotonic() + SECONDS
    while not (metrics.exists() and f'"kind": "routing", "step": {step},' in metrics.read_text()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "the step never came"
        time.sleep(0.02)


def nobody_is_left(hosts: Hosts) -> bool:
    """Whether both hosts are empty, or are so within the seconds that a shell takes to end."""
    end = time.monotonic() + 10
    while any(host.processes() for host in hosts.both):
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


@pytest.fixture(scope="module")
def undisturbed(hosts: Hosts, here: Place) -> Path:
    """The run that the others are compared with: one SLURM task on each host, which has no launcher and no ssh."""
    recipe, *settings = job(hosts, here, "undisturbed")
    command = [sys.executable, str(ROOT / "finetune/train.py"), "--recipe", recipe, *settings]
    tasks = [
        hosts.start(*command, on=host, cwd=here.folder, DS_ACCELERATOR="cpu", **slurm(hosts, task))
        for task, host in enumerate(hosts.both)
    ]
    for task in tasks:
        ended = end_of(task)
        assert ended.code == 0, ended.err
    return here.run_folder(f"{hosts.kind}-undisturbed")


class Disturbed(NamedTuple):
    """A run over both hosts of which one died, and the same command given again with the host that was left."""

    folder: Path
    first: Ended
    left_empty: bool
    steps_kept: int
    again: Ended


@pytest.fixture(scope="module")
def disturbed(hosts: Hosts, here: Place) -> Disturbed:
    folder = here.run_folder(f"{hosts.kind}-disturbed")
    recipe, *settings = job(hosts, here, "disturbed")
    # The loopback addresses are those of other tests too.
    port = ["--master-port", str(free_port())] if hosts.kind == "loopback" else []
    command = ["bash", hosts.launch, recipe, *settings, *port, "--hostfile"]
    process = hosts.start(*command, str(hosts.hostfile(*hosts.both)), cwd=here.folder)
    wait_for_step(process, folder, 5)
    hosts.both[1].die()
    first = end_of(process)
    left_empty = nobody_is_left(hosts)
    kept = max(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").glob("step-*"))
    process = hosts.start(*command, str(hosts.hostfile(hosts.both[0])), cwd=here.folder)
    return Disturbed(folder, first, left_empty, kept, end_of(process))


def test_two_hosts_plan_first_and_train_together(disturbed: Disturbed) -> None:
    out = disturbed.first.out
    # Every host plans for itself, the first one in words; another may be done before it.
    assert out.index("2 ranks (CPU, 1 a node), expert parallel 2") < out.index("Training on host 0")
    assert "a rank sends" in out
    assert "over the network a step" in out
    assert f"disturbed: 2 rank(s), expert parallel 2; the run is in {disturbed.folder}" in out
    assert out.count("Memory of each rank") == 1  # one host speaks
    assert records(disturbed.folder, "start")[0]["ranks"] == 2


def test_the_host_that_is_left_ends_in_order_and_says_why(hosts: Hosts, disturbed: Disturbed) -> None:
    first, folder = disturbed.first, disturbed.folder
    assert first.code != 0
    (sentence,) = [line for line in first.err.splitlines() if "lost the connection to another rank" in line]
    assert "nextune: lost the connection to another rank in step " in sentence
    assert f"or one with fewer hosts, continues from {folder}/checkpoints/step-" in sentence
    assert f"nextune: {hosts.both[1].address} ended with exit code 137" in first.err
    assert "Traceback" not in first.err
    assert not list(folder.glob("crash/*.json"))
    assert first.seconds < 60
    assert disturbed.left_empty


def test_one_host_goes_on_from_the_newest_checkpoint(disturbed: Disturbed) -> None:
    again, kept = disturbed.again, disturbed.steps_kept
    assert again.code == 0, again.err
    assert "running on one rank with every expert on it" in again.out
    assert f"continuing after step {kept} from {disturbed.folder}/checkpoints/step-{kept}" in again.out
    assert [(line["step"], line["ranks"], line["expert"]) for line in records(disturbed.folder, "start")] == [
        (0, 2, 2),
        (kept, 1, 1),
    ]
    assert (disturbed.folder / "finished.json").exists()
    assert "Where things are" in again.out


def test_the_losses_are_those_of_the_run_that_no_host_left(undisturbed: Path, disturbed: Disturbed) -> None:
    """Started by SLURM over two ranks to the end; in float32 all that another layout may change is rounding."""
    for kind, keys in (("train", ("loss", "grad_norm", "balance_loss")), ("eval", ("loss",))):
        ours, theirs = records(disturbed.folder, kind), records(undisturbed, kind)
        assert [line["step"] for line in ours] == [line["step"] for line in theirs]
        assert ours[-1]["step"] == STEPS
        for key in keys:
            assert [line[key] for line in ours] == pytest.approx([line[key] for line in theirs], abs=1e-5)


def test_slurm_tasks_find_their_ranks(undisturbed: Path) -> None:
    (start,) = [record for record in read_metrics(undisturbed / "metrics.jsonl") if record["kind"] == "start"]
    assert (start["ranks"], start["expert"]) == (2, 2)


# Stopped, refused, and the embedded default itself.


def start_over_both(hosts: Hosts, here: Place, name: str, step: int) -> Any:
    """A run by hostfile that has reached a step."""
    recipe, *settings = job(hosts, here, name, train__steps=400, train__eval_every_steps=0)
    arguments = [recipe, *settings, "--master-port", str(free_port()), "--hostfile", str(hosts.hostfile(*hosts.both))]
    process = hosts.start("bash", hosts.launch, *arguments, cwd=here.folder)
    wait_for_step(process, here.run_folder(f"{hosts.kind}-{name}"), step)
    return process


@pytest.mark.slow
@pytest.mark.parametrize(("asked", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0), (signal.SIGKILL, -9)])
def test_stopping_the_command_leaves_no_rank_on_any_host(
    hosts: Hosts, here: Place, asked: signal.Signals, code: int
) -> None:
    process = start_over_both(hosts, here, asked.name, 2)
    assert all(host.processes() for host in hosts.both)
    process.send_signal(asked)
    ended = end_of(process)
    assert ended.code == code
    end = time.monotonic() + 60
    while any(host.processes() for host in hosts.both):
        assert time.monotonic() < end, "ranks were left behind"
        time.sleep(0.2)
    if code >= 0:
        assert "saved and stopped, resumable" in ended.out
        assert f"nextune: got {asked.name}; stopping the ranks on {hosts.both[0].address}" in ended.err


@pytest.mark.slow
def test_when_the_first_host_dies_the_other_speaks_for_itself(hosts: Hosts, here: Place) -> None:
    """Rank 0, which otherwise speaks for all, and the meeting point are gone with it."""
    process = start_over_both(hosts, here, "headless", 2)
    hosts.both[0].die()
    ended = end_of(process)
    assert ended.code == 137
    assert "nextune: rank 1 on " in ended.err
    assert "lost the connection to another rank in step " in ended.err
    assert nobody_is_left(hosts)


@pytest.mark.slow
def test_a_run_folder_that_is_not_shared_is_refused(here: Place, tmp_path: Path) -> None:
    if REFUSED is not None:
        pytest.skip(f"no host with a disk of its own here: {REFUSED}")
    runs = tmp_path / "own"
    runs.mkdir()
    with two_hosts(tmp_path / "both", "namespaces", own_disk=runs) as hosts:
        (hosts.folder / "mine.yaml").write_text((ROOT / "recipes/tiny.yaml").read_text())
        recipe, *settings = job(hosts, here, "unshared", output__dir=runs)
        arguments = [recipe, *settings, "--hostfile", str(hosts.hostfile(*hosts.both))]
        ended = end_of(hosts.start("bash", hosts.launch, *arguments, cwd=here.folder))
    assert ended.code == 2
    folder = runs / "namespaces-unshared"
    assert f"output.dir: {folder} on host-b is not the folder that rank 0 sees on host-a;" in ended.err
    assert list(runs.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("hosts", KINDS[:1], indirect=True)
def test_srun_trains_the_embedded_default_over_two_namespaces(hosts: Hosts, here: Place, tmp_path: Path) -> None:
    """`srun ./launch.sh` as it is documented: plan, training, export and summary by the first task alone."""
    settings = [f"output.dir={tmp_path}/runs", "monitor.wandb=off", "train.steps=12", "train.eval_every_steps=0"]
    settings = [word for setting in settings for word in ("--set", setting)]
    tasks = [
        hosts.start("bash", hosts.launch, *settings, on=host, cwd=tmp_path, **slurm(hosts, task))
        for task, host in enumerate(hosts.both)
    ]
    first, second = (end_of(task) for task in tasks)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    for word in ("2 ranks (CPU, 1 a node)", "Training on 2 ranks that SLURM started", "merged model", "findings of"):
        assert word in first.out
    assert second.out == ""
    assert records(tmp_path / "runs/tiny", "train")[-1]["step"] == 12
    alone = end_of(hosts.start("bash", hosts.launch, *settings, cwd=tmp_path))
    assert (alone.code, alone.out.splitlines()[1]) == (0, "This job is complete already.")


@pytest.mark.slow
@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_of_slurm_to_every_process_saves_once_and_is_resumable(
    hosts: Hosts, here: Place, asked: signal.Signals
) -> None:
    """The shells of launch.sh get it too, and may neither die of it nor hand it on, which would be asking twice."""
    folder = here.run_folder(f"{hosts.kind}-{asked.name}-by-slurm")
    rare = {"train__steps": 400, "train__eval_every_steps": 0, "checkpoint__every_steps": 0}
    arguments = job(hosts, here, f"{asked.name}-by-slurm", **rare)
    tasks = [
        hosts.start("bash", hosts.launch, *arguments, on=host, cwd=here.folder, **slurm(hosts, task))
        for task, host in enumerate(hosts.both)
    ]
    wait_for_step(tasks[0], folder, 3)
    for host in hosts.both:
        for process in host.processes():
            os.kill(process, asked)
    first, second = (end_of(task) for task in tasks)
    assert f"{asked.name}: saved and stopped, resumable" in first.out
    assert "Stopped in order, resumable: the same command continues" in first.out
    assert (first.code, second.code) == (0, 0)
    assert len(list((folder / "checkpoints").glob("step-*/manifest.json"))) == 1
    assert nobody_is_left(hosts)
