"""Runs over several machines: reading a hostfile, and starting a command on each of its hosts by ssh.

Every host's command has a standard input that is open while this process lives and wants it to run. When the input
closes, for whatever reason, the host's `launch.sh` stops its ranks, so none survive even if this process is killed.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from finetune.recipe.messages import shown
from monitoring.json_file import FileError, read_bytes

# Environment variables of libraries that apply to every host. No tokens: command lines are public.
FORWARDED = ("NCCL_", "GLOO_", "TORCH_", "UCX_", "OMP_NUM_THREADS", "HF_HOME", "HF_HUB_OFFLINE")
# The ssh of a host that is switched off ends after a minute.
SSH = ("ssh", "-T", "-o", "BatchMode=yes", "-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4")
MOST_BYTES = 1 << 20
SECONDS_TO_SPEAK = 30  # for the other hosts to notice a failure and report it
SECONDS_TO_END = 660  # launch.sh gives a host's ranks ten minutes to save
SECONDS_TO_REPEAT = 2  # a signal repeated within this time counts as one: `timeout` sends it twice


class HostError(ValueError):
    """An unreadable hostfile, or a host that is not in it."""


@dataclass(frozen=True)
class Host:
    """One line of a hostfile: the host's name for ssh and for other hosts, and its number of ranks."""

    name: str
    slots: int


def read_hostfile(path: Path) -> list[Host]:
    """Read a hostfile in DeepSpeed's format, `NAME slots=N` a line; ranks are numbered in this order.

    Raises:
        HostError: no such file, an invalid line, a repeated host, or no host.
    """
    try:
        lines = read_bytes(path, MOST_BYTES).decode().splitlines()
    except (FileError, UnicodeDecodeError) as error:
        why = str(error).removeprefix(f"{path}: ")
        raise HostError(f"{path}: no readable hostfile here ({why}); every host needs it at this path") from None
    hosts: list[Host] = []
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].strip()
        if not words:
            continue
        found = re.fullmatch(r"([^\s-]\S*)\s+slots=([1-9]\d{0,4})", words, re.ASCII)
        if found is None:
            raise HostError(f"{path}:{number}: {shown(words)} is not NAME slots=N, such as node1 slots=8")
        if found[1] in [host.name for host in hosts]:
            raise HostError(f"{path}:{number}: {found[1]} is there twice; give it one line with all its slots")
        hosts.append(Host(found[1], int(found[2])))
    if not hosts:
        raise HostError(f"{path}: names no host; write a line such as node1 slots=8 for each")
    return hosts


def describe(hosts: Sequence[Host], node: int) -> str:
    """Total ranks, number of hosts, ranks on host `node`, and address of the first host; parsed by `launch.sh`.

    Raises:
        HostError: no such host.
    """
    if not 0 <= node < len(hosts):
        raise HostError(f"--node-rank {node}: the hostfile names {len(hosts)} host(s), numbered from 0")
    return f"{sum(host.slots for host in hosts)} {len(hosts)} {hosts[node].slots} {address(hosts[0])}"


def address(host: Host) -> str:
    """The address by which other hosts reach it: its name without the user for ssh."""
    return host.name.rpartition("@")[2]


def run_on_hosts(hosts: Sequence[Host], command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run `command --node-rank I` on every host, in the current folder.

    When one host fails, the others get time to report, then they are stopped. A signal to this process stops them
    immediately.

    Returns:
        The exit code of the first host that failed. 0 after a signal if all stopped in order, but 130 after an
        interrupt, so that a list of shell commands ends at Ctrl-C.
    """
    forwarded = [f"{name}={value}" for name, value in environment.items() if name.startswith(FORWARDED)]
    running: dict[str, subprocess.Popen[bytes]] = {}
    for node, host in enumerate(hosts):
        words = shlex.join(["env", *forwarded, *command, "--node-rank", str(node)])
        # A separate session: Ctrl-C only reaches this process, which stops the hosts in order.
        running[host.name] = subprocess.Popen(
            [*SSH, host.name, f"cd {shlex.quote(os.getcwd())} && exec {words}"],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
    return _Watch(running).wait()


class _Watch:
    """Waits for one process for each host, and stops all when one fails or on a signal."""

    def __init__(self, running: dict[str, "subprocess.Popen[bytes]"]):
        self.running = running
        self.code = 0
        self.asked, self.asked_at = 0, 0.0  # the first signal, and when it came (time.monotonic())
        self.stop_at: float | None = None  # time.monotonic() at which the others are stopped
        self.kill_at: float | None = None

    def wait(self) -> int:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, self._on_signal)
        while self.running:
            for host, process in list(self.running.items()):
                if process.poll() is not None:
                    del self.running[host]
                    self._ended(host, process.returncode)
            now = time.monotonic()
            if self.stop_at is not None and now >= self.stop_at:
                self._stop(now)
            if self.kill_at is not None and now >= self.kill_at:
                self._give_up()
            time.sleep(0.1)
        return self.code

    def _ended(self, host: str, code: int) -> None:
        if self.asked and code:
            self.code = self.code or _code_of(self.asked)
        if code == 0 or self.kill_at is not None:
            return
        code = code if code > 0 else 128 - code  # as a shell counts the end by a signal
        why = "; ssh itself failed, or lost the host" if code == 255 else ""
        _say(f"{host} ended with exit code {code}{why}")
        self.code = self.code or code
        if self.running and self.stop_at is None:
            self.stop_at = time.monotonic() + SECONDS_TO_SPEAK

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        name, where = signal.Signals(number).name, ", ".join(self.running)
        if self.asked:
            if time.monotonic() - self.asked_at < SECONDS_TO_REPEAT:
                return
            _say(f"got {name} again; no longer waiting for {where}")
            self.kill_at = time.monotonic()
            return
        _say(f"got {name}; stopping the ranks on {where}, which save first (again: no longer waiting for them)")
        self.asked, self.asked_at = number, time.monotonic()
        if number == signal.SIGINT or self.code:
            self.code = _code_of(number)
        self.stop_at = 0.0

    def _stop(self, now: float) -> None:
        """Close every host's standard input, which requests a stop from its launch.sh."""
        self.stop_at, self.kill_at = None, self.kill_at or now + SECONDS_TO_END
        for process in self.running.values():
            assert process.stdin is not None
            process.stdin.close()

    def _give_up(self) -> None:
        for host, process in self.running.items():
            _say(f"{host} does not answer; if it still runs, look there for ranks that were left")
            process.kill()
        self.kill_at = float("inf")


def _code_of(number: int) -> int:
    """Exit code after a signal; SIGHUP counts as SIGTERM."""
    return 128 + (signal.SIGTERM if number == signal.SIGHUP else number)


def _say(sentence: str) -> None:
    print(f"nextune: {sentence}", file=sys.stderr, flush=True)
