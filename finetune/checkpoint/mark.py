"""The description in an export folder: a model card for people, and a mark with the writer and the hash of each file.

A folder is replaced only by the writer named in its mark, and only while it holds exactly the files listed there.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from finetune.checkpoint.copying import hash_on_disk
from finetune.checkpoint.folder import write_json
from finetune.checkpoint.layout import CheckpointError
from finetune.checkpoint.shards import listed

CARD = "README.md"
MARK = "nextune-export.json"


class About(NamedTuple):
    """Contents of the model card and the mark."""

    card: str  # the text of README.md
    facts: dict[str, Any]  # for the mark: run, step, checkpoint and its hash, who wrote it


def name_beside(name: str) -> str:
    """The name under which a file of the base is copied; its card and mark are renamed in favour of the export's."""
    for own in (CARD, MARK):
        stem, dot, suffix = own.rpartition(".")
        if re.fullmatch(rf"{re.escape(stem)}(\.base)*{re.escape(dot + suffix)}", name):
            return f"{name.removesuffix(dot + suffix)}.base{dot}{suffix}"
    return name


def write_about(folder: Path, about: About, files: Mapping[str, str], facts: Mapping[str, Any]) -> None:
    """Write card and mark into a folder that is otherwise complete.

    Args:
        files: sha256 of every other file, by path relative to `folder`.
        facts: additional fields of the mark.
    """
    (folder / CARD).write_text(about.card, encoding="utf-8")
    held = {**files, CARD: hashlib.sha256(about.card.encode()).hexdigest()}
    described = {name: {"bytes": (folder / name).stat().st_size, "sha256": held[name]} for name in sorted(held)}
    write_json(folder / MARK, {**about.facts, **facts, "files": described})


def read_mark(folder: str | Path) -> dict[str, Any] | None:
    """The mark of an export, or None if it is missing or unreadable."""
    folder = Path(folder)
    try:
        mark = json.loads((folder / MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return mark if isinstance(mark, dict) else None


def check_own(folder: Path, writer: str) -> None:
    """Check that a folder holds exactly the files that `writer` exported into it, unmodified.

    Raises:
        CheckpointError: names the additional, missing or modified files.
    """
    mark = read_mark(folder)
    files = mark.get("files") if mark and mark.get("written_by") == writer else None
    if not isinstance(files, dict):
        raise CheckpointError(f"{folder}: was not written by {writer}, and stays as it is")
    there = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if not path.is_dir()}
    other = sorted(there.keys() ^ {*files, MARK})
    changed = [name for name in there.keys() & files if _facts(there[name]) != files[name]] if not other else []
    if other or changed:
        raise CheckpointError(
            f"{folder}: is no longer as {writer} wrote it ({listed(other or sorted(changed))}), and stays as it is"
        )


def _facts(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": hash_on_disk(path)}
