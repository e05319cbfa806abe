"""Checks that a folder can hold a run, before anything is loaded; its lock, and the markers of how a run ended.

Problems that would fail at the first checkpoint are reported at the start. A folder with files of no run is reported;
one that other users could change is refused.
"""

import os
import stat
from pathlib import Path

from filelock import FileLock, Timeout

from finetune.recipe.paths import ROOM_IN_RUN, path_problem
from finetune.recipe.recipe import RecipeError
from monitoring.json_file import FileError, read_object

NAMES = ("recipe.yaml", "metrics.jsonl", "finished.json", "stopped.json", "checkpoints", "routing", "crash", "wandb")
FOLDERS = ("checkpoints", "routing", "crash", "wandb")
SECONDS_TO_WAIT = 5  # for a killed process that has not ended yet when the same command starts again
MOST_SHOWN = 3


def check_place(folder: Path) -> None:
    """Check that a run can be written into this folder, which need not exist. Changes nothing.

    Raises:
        RecipeError: it is not writable, or belongs to another user and is writable by everyone.
    """
    problem = path_problem(str(folder), ROOM_IN_RUN)
    if problem is not None:
        raise RecipeError(f"output.dir: the run folder {folder} {problem}")
    if os.path.realpath(folder.parent) == "/":  # Path.resolve raises where links form a circle
        raise RecipeError("output.dir: is the root of the file system; name a folder for runs in it")
    there = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    if not _is_open(there):
        raise RecipeError(f"output.dir: {folder} cannot be written, because {there} is not a folder open to you")
    if there != folder:
        return
    status = folder.stat()
    if status.st_uid != os.geteuid() and status.st_mode & stat.S_IWOTH:
        raise RecipeError(
            f"{folder}: belongs to another user, and everyone may change what is in it; give this run a name of its own"
            f" (--set name=...), or remove that permission (chmod o-w)"
        )
    for name in FOLDERS:
        inside = folder / name
        if os.path.lexists(inside) and not _is_open(inside):
            raise RecipeError(f"{inside}: is not a folder that you can write to, but the run needs it; move it away")


def place_notes(folder: Path) -> list[str]:
    """Notes about a folder that holds files but no run; empty for a new folder or the folder of a run."""
    if not _is_open(folder) or os.path.exists(folder / "recipe.yaml"):
        return []
    foreign = sorted(name for name in os.listdir(folder) if not name.startswith(".") and name not in NAMES)
    if not foreign:
        return []
    more = f" and {len(foreign) - MOST_SHOWN} more" if len(foreign) > MOST_SHOWN else ""
    return [
        f"output.dir: {folder} holds files of no run ({', '.join(foreign[:MOST_SHOWN])}{more}); this run is put beside"
        " them"
    ]


def hold(folder: Path) -> FileLock:
    """Lock the folder against other training processes until the lock is released or this process ends.

    Raises:
        RecipeError: another process holds the lock, or the disk does not support locks.
    """
    held = FileLock(folder / ".lock")
    try:
        held.acquire(timeout=SECONDS_TO_WAIT)
    except Timeout:
        raise RecipeError(
            f"{folder}: another process is training this run; stop it first, or give this one a name of its own"
            " (--set name=...)"
        ) from None
    except (OSError, NotImplementedError) as error:  # NotImplementedError: the disk has no locks
        why = getattr(error, "strerror", None) or error
        raise RecipeError(
            f"{folder}/.lock: cannot be locked ({why}); remove it if it is no plain file, or set output.dir to another"
            " disk"
        ) from None
    return held


def marked_step(marker: Path) -> int | None:
    """The step in `finished.json` or `stopped.json`; None if there is no such file.

    Raises:
        RecipeError: the file holds no valid step.
    """
    if not os.path.lexists(marker):
        return None
    why = "it names no step"
    try:
        step = read_object(marker).get("step")
    except FileError as error:
        step, why = None, str(error).removeprefix(f"{marker}: ")
    if type(step) is not int or step < 0:
        raise RecipeError(
            f"{marker}: says nothing about the run ({why}); delete it, and the same command continues the run from its"
            " newest checkpoint"
        )
    return step


def _is_open(place: Path) -> bool:
    return os.path.isdir(place) and os.access(place, os.R_OK | os.W_OK | os.X_OK, effective_ids=True)
