"""Whether a folder can be that of a run, before anything is loaded; and the files in it that say how a run ended.

What would fail at the first checkpoint is said at the start, and a folder in which somebody else has put things, or may
put things, is not used without a word.
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
SECONDS_TO_WAIT = 5  # for a process that is about to end: the same command may follow a killed one at once
MOST_SHOWN = 3


def check_place(folder: Path) -> None:
    """Make sure that a run can be written into this folder, which need not exist. Changes nothing.

    Raises:
        RecipeError: it cannot, or other users could change what is in it.
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
    """What should be said of a folder that holds files but no run; nothing of one that is new, or a run's."""
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
    """Keep other processes from training in the folder until the lock is released or this process ends in any way.

    Raises:
        RecipeError: another process holds it, or the disk refuses to lock.
    """
    held = FileLock(folder / ".lock")
    try:
        held.acquire(timeout=SECONDS_TO_WAIT)
    except Timeout:
        raise RecipeError(
            f"{folder}: another process is training this run; stop it first, or give this one a name of its own"
            " (--set name=...)"
        ) from None
    except (OSError, NotImplementedError) as error:  # the latter on a disk that has no locks
        why = getattr(error, "strerror", None) or error
        raise RecipeError(
            f"{folder}/.lock: cannot be locked ({why}); remove it if it is no plain file, or set output.dir to another"
            " disk"
        ) from None
    return held


def marked_step(marker: Path) -> int | None:
    """The step that `finished.json` or `stopped.json` names, or None where there is no such file.

    Raises:
        RecipeError: it names none.
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
