"""Environment of a rank started by SLURM, derived from the variables that `srun` sets for every task."""

import re
from collections.abc import Mapping

PORTS = range(20_000, 30_000)  # below Linux's range for outgoing connections
# Variables set by launchers that are read as whole numbers.
NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE")


class SlurmError(ValueError):
    """A SLURM step whose variables do not determine the place of its ranks."""


def is_task(environment: Mapping[str, str]) -> bool:
    """Whether `srun` started this process as one of several tasks, each of which is a rank.

    A batch script is not a task, and a step of one task (`srun --pty bash`) is a shell on one machine.
    """
    return "SLURM_PROCID" in environment and _number(environment, "SLURM_STEP_NUM_TASKS", "1") > 1


def _number(environment: Mapping[str, str], name: str, default: str) -> int:
    text = environment.get(name, default)
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise SlurmError(f"{name} is {text!r}; it must be a whole number such as 0 or 16; correct it or unset it")
    return int(text)


def task_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that DeepSpeed's launcher would set for this task; empty if a launcher set them, or outside a step.

    All tasks must derive the same rendezvous without communication: the node of rank 0, which is the first in the
    step's list, and a port that depends on the job. `MASTER_ADDR` and `MASTER_PORT` override both.

    Raises:
        SlurmError: a variable of the step is missing or unreadable, or one of a launcher is not a number.
    """
    for name in (*NUMBERS, *(["MASTER_PORT"] if environment.get("MASTER_PORT") else [])):
        _number(environment, name, "0")
    if "RANK" in environment or not is_task(environment):
        return {}
    for name in ("SLURM_PROCID", "SLURM_LOCALID"):
        _number(environment, name, "0")
    try:
        node = int(environment["SLURM_NODEID"])
        tasks = tasks_by_node(environment["SLURM_STEP_TASKS_PER_NODE"])
        job, step = int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"])
        return {
            "RANK": environment["SLURM_PROCID"],
            "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
            "LOCAL_RANK": environment["SLURM_LOCALID"],
            "LOCAL_SIZE": str(tasks[node]),
            "CROSS_RANK": str(node),
            "CROSS_SIZE": str(len(tasks)),
            "MASTER_ADDR": environment.get("MASTER_ADDR") or first_node(environment["SLURM_STEP_NODELIST"]),
            "MASTER_PORT": environment.get("MASTER_PORT") or str(PORTS[(job * 7 + step) % len(PORTS)]),
        }
    except KeyError as error:
        raise SlurmError(
            f"SLURM started this task, but the variable {error.args[0]} is not set; start it by srun"
        ) from None
    except (ValueError, IndexError):
        raise SlurmError(
            "SLURM started this task, but its variables (SLURM_NODEID, SLURM_STEP_TASKS_PER_NODE, SLURM_STEP_NODELIST) "
            "do not say where it is; set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT yourself"
        ) from None


def first_node(nodes: str) -> str:
    """The first name in SLURM's compact list: `gpu[07-09,12],login1` gives `gpu07`.

    Source: `scontrol show hostnames`, of which this is the first line.
    """
    found = re.match(r"(?P<stem>[^\[\],]+)(?:\[(?P<first>\d+)[^\]]*\](?P<end>[^,\[]*))?(?:,|$)", nodes)
    if found is None:
        raise ValueError(nodes)
    return found["stem"] + (found["first"] or "") + (found["end"] or "")


def tasks_by_node(counts: str) -> list[int]:
    """Tasks of each node: `8(x2),4` gives 8, 8, 4."""
    tasks: list[int] = []
    for group in counts.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", group)
        if found is None:
            raise ValueError(counts)
        tasks += [int(found[1])] * int(found[2] or 1)
    return tasks
