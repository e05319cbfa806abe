"""The Weights & Biases id of a run: created once, stored in the run folder and in every checkpoint."""

import logging
import re
import secrets
from pathlib import Path

from monitoring.files import replace_file
from monitoring.json_file import FileError, MissingFileError, read_bytes

log = logging.getLogger(__name__)

_ID = re.compile(rb"[A-Za-z0-9_-]{1,128}")


def run_id(run: Path) -> str:
    """The W&B id of the run folder, from `wandb/run-id`; a new one is created if there is none or it is unreadable."""
    known = known_run_id(run)
    if known is not None:
        return known
    made = secrets.token_hex(4)
    keep_run_id(run, made)
    return made


def known_run_id(run: Path) -> str | None:
    """The W&B id of the run folder, or None if there is none or it is unreadable."""
    path = run / "wandb" / "run-id"
    try:
        found = read_bytes(path).strip()
    except MissingFileError:
        return None
    except FileError as error:
        log.warning("%s; W&B shows what follows as a run of its own", error)
        return None
    if not _ID.fullmatch(found):
        log.warning("%s: holds no id of a W&B run; W&B shows what follows as a run of its own", path)
        return None
    return found.decode()


def keep_run_id(run: Path, known: str) -> None:
    """Store the id from a checkpoint in the run folder."""
    replace_file(run / "wandb" / "run-id", known.encode())
