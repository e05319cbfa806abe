"""The id under which Weights & Biases knows a run: made once, kept in the run folder and in every checkpoint."""

import secrets
from pathlib import Path

from monitoring.files import replace_file


def run_id(run: Path) -> str:
    """The W&B id of the run folder, from `wandb/run-id`; a new one if there is none yet."""
    path = run / "wandb" / "run-id"
    if not path.exists():
        replace_file(path, secrets.token_hex(4).encode())
    return path.read_text(encoding="ascii").strip()


def keep_run_id(run: Path, known: str) -> None:
    """Give the run folder the id that a checkpoint was stored with."""
    replace_file(run / "wandb" / "run-id", known.encode())
