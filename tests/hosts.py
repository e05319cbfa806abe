"""Two 'hosts' on this machine: network namespaces joined by a cable, or, where those are refused, loopback addresses.

Each has a host name, an `ssh` that enters it and a checkout like a user's, with its `.venv` set up. They share the
disk. A host can die: all its processes at once, or its cable.
"""

import hashlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.commands import ROOT

# Entered as a user enters a host: by name, with a command as one word, in a shell of its own and a home of its own.
SSH = """#!/bin/bash
while [[ $1 == -* ]]; do if [[ $1 == -o ]]; then shift; fi; shift; done
host=$1; shift
cd /
exec env -i PATH="{path}" HOME=/ TMPDIR="$TMPDIR" {environment} bash "{folder}/enter-$host" bash -c "$*"
"""
# A mark in the environment is how the processes of a host are found, since they leave every group they start in.
NAMESPACE = """#!/bin/bash
export ON_TEST_HOST={mark}
exec ip netns exec {namespace} unshare --uts {mounts} bash -c '
hostname {name}; {overlay} exec "$@"' bash "$@"
"""
LOOPBACK = """#!/bin/bash
export ON_TEST_HOST={mark}
exec "$@"
"""


@dataclass
class Host:
    """One of the two: the name that the hostfile gives it is its address, since nothing resolves names here."""

    name: str
    address: str
    mark: str

    def processes(self) -> list[int]:
        """Everything that runs on it."""
        return [pid for pid, environment in _environments() if f"ON_TEST_HOST={self.mark}".encode() in environment]

    def die(self) -> None:
        """As when it is switched off and its network still answers: every process is gone at once."""
        for _ in range(2):  # what was just being started
            for process in self.processes():
                os.kill(process, signal.SIGKILL)


@dataclass
class Hosts:
    """Both, and how to start things on them."""

    kind: str  # "namespaces" or "loopback"
    folder: Path  # shared by both
    both: list[Host]
    environment: dict[str, str] = field(default_factory=dict)
    started: list["subprocess.Popen[str]"] = field(default_factory=list)

    @property
    def launch(self) -> str:
        return str(self.folder / "checkout/launch.sh")

    def hostfile(self, *hosts: Host, slots: int = 1) -> Path:
        path = self.folder / f"hosts-{'-'.join(host.name for host in hosts)}"
        path.write_text("".join(f"{host.address} slots={slots}\n" for host in hosts))
        return path

    def start(self, *command: str, on: Host | None = None, cwd: Path, **environment: str) -> "subprocess.Popen[str]":
        """Start a command here, or in a host."""
        if on is not None:
            command = ("bash", str(self.folder / f"enter-{on.address}"), *command)
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def cut(self) -> None:
        """Pull the cable between two namespaces: no word reaches either side that the other is gone."""
        assert self.kind == "namespaces"
        _ip("netns", "exec", f"{self.both[1].mark}", "ip", "link", "set", "cable", "down")


def why_no_namespaces() -> str | None:
    """Why this machine does not let us make two network namespaces and a cable, or None where it does."""
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        return "`ip` and `unshare` (iproute2, util-linux) are not installed"
    name = f"nextune-try-{os.getpid()}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if tried.returncode:
        return f"`ip netns add` is refused: {tried.stderr.strip()}"
    try:
        cable = [*("netns", "exec", name, "ip", "link", "add", "one", "type", "veth", "peer", "name", "other")]
        tried = subprocess.run(["ip", *cable], capture_output=True, text=True, check=False)
        return f"a virtual cable (veth) is refused: {tried.stderr.strip()}" if tried.returncode else None
    finally:
        _ip("netns", "del", name)


@contextmanager
def two_hosts(folder: Path, kind: str, *, own_disk: Path | None = None) -> Iterator[Hosts]:
    """Two hosts, gone with all that runs on them at the end.

    Args:
        own_disk: a folder that the second host has for itself, empty; only with namespaces.
    """
    folder.mkdir()
    names = [f"nextune-{secrets.token_hex(3)}-{letter}" for letter in "ab"]
    addresses = ["10.77.0.1", "10.77.0.2"] if kind == "namespaces" else ["127.0.0.1", "127.0.0.2"]
    both = [Host(f"host-{letter}", address, name) for letter, address, name in zip("ab", addresses, names, strict=True)]
    hosts = Hosts(kind, folder, both, _environment(folder))
    _make_checkout(folder / "checkout")
    if kind == "namespaces":
        _join(names, addresses)
    try:
        for number, host in enumerate(both):
            overlay = f"mount -t tmpfs none {own_disk};" if own_disk and number else ""
            text = NAMESPACE if kind == "namespaces" else LOOPBACK
            written = text.format(
                mark=host.mark,
                namespace=host.mark,
                name=host.name,
                mounts="--mount" if overlay else "",
                overlay=overlay,
            )
            (folder / f"enter-{host.address}").write_text(written)
        yield hosts
    finally:
        for process in hosts.started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        for host in both:
            host.die()
        if kind == "namespaces":
            for name in names:
                _ip("netns", "del", name)


def _environment(folder: Path) -> dict[str, str]:
    """That of a user at one of the hosts: our `ssh` first on the path, one thread, no GPU."""
    tools = folder / "tools"
    tools.mkdir()
    given = {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1"}
    path = f"{tools}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    # What a login shell of a host would have set. OMP_NUM_THREADS is not among it: launch.sh hands it on.
    login = {name: value for name, value in given.items() if name != "OMP_NUM_THREADS"}
    assigned = " ".join(f"{name}={value}" for name, value in login.items())
    write_tool(tools / "ssh", SSH.format(path=path, folder=folder, environment=assigned))
    write_tool(tools / "nvidia-smi", "#!/bin/sh\nexit 9\n")
    return {"PATH": path, "HOME": str(folder), "TMPDIR": os.environ.get("TMPDIR", "/tmp"), **given}


def write_tool(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def _make_checkout(checkout: Path) -> None:
    """What a user has after `./launch.sh setup`: this checkout, and a `.venv` that is the one the tests run in."""
    checkout.mkdir()
    for name in ("finetune", "data", "monitoring", "recipes", "pyproject.toml"):
        (checkout / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "launch.sh", checkout)
    venv = checkout / ".venv"
    venv.mkdir()
    for name in ("bin", "lib", "pyvenv.cfg"):
        (venv / name).symlink_to(Path(sys.prefix) / name)
    torch = next(
        line.partition("=")[2]
        for line in (ROOT / "launch.sh").read_text().splitlines()
        if line.startswith("TORCH_WITHOUT_GPU=")
    )
    contents = hashlib.sha256((ROOT / "pyproject.toml").read_bytes() + torch.encode()).hexdigest()
    (venv / "set-up").write_text(f"python {sys.version.split()[0]} in {venv}\n{contents} dev\n")


def _join(names: list[str], addresses: list[str]) -> None:
    for name in names:
        _ip("netns", "add", name)
        _ip("netns", "exec", name, "ip", "link", "set", "lo", "up")
    here, there = names
    _ip("netns", "exec", here, "ip", "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", there)
    for name, address in zip(names, addresses, strict=True):
        _ip("netns", "exec", name, "ip", "addr", "add", f"{address}/24", "dev", "cable")
        _ip("netns", "exec", name, "ip", "link", "set", "cable", "up")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def _environments() -> Iterator[tuple[int, bytes]]:
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            yield int(path.parent.name), path.read_bytes()
        except OSError:  # it has just ended
            continue


def slurm(hosts: Hosts, task: int, **changes: Any) -> dict[str, str]:
    """What `srun --nodes 2 --ntasks-per-node 1` sets for a task."""
    return {
        "SLURM_JOB_ID": str(4242 + os.getpid()),
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
        "SLURM_STEP_NODELIST": ",".join(host.address for host in hosts.both),
        "SLURM_PROCID": str(task),
        "SLURM_NODEID": str(task),
        "SLURM_LOCALID": "0",
        **changes,
    }
