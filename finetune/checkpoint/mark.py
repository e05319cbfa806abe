"""What an export says about itself: a model card for people, and a mark that says who wrote which files of the folder.

A folder is replaced only by whom its mark names, and only while it holds exactly the files that the mark names.
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
    """What an export is."""

    card: str  # the text of README.md
    facts: dict[str, Any]  # for the mark: run, step, checkpoint and its hash, who wrote it


def name_beside(name: str) -> str:
    """The name under which a file of the base is kept: its card and its mark make room for those of the export."""
    for own in (CARD, MARK):
        stem, dot, suffix = own.rpartition(".")
        if re.fullmatch(rf"{re.escape(stem)}(\.base)*{re.escape(dot + suffix)}", name):
            return f"{name.removesuffix(dot + suffix)}.base{dot}{suffix}"
    return name


def write_about(folder: Path, about: About, files: Mapping[str, str], facts: Mapping[str, Any]) -> None:
    """Write card and mark into a folder that holds everything else.

    Args:
        files: sha256 of every other file, by path in the folder.
        facts: what else the mark says.
    """
    (folder / CARD).write_text(about.card, encoding="utf-8")
    held = {**files, CARD: hashlib.sha256(about.card.encode()).hexdigest()}
    described = {name: {"bytes": (folder / name).stat().st_size, "sha256": held[name]} for name in sorted(held)}
    write_json(folder / MARK, {**about.facts, **facts, "files": described})


def read_mark(folder: str | Path) -> dict[str, Any] | None:
    """The mark of an export, or None where there is none that can be read."""
    folder = Path(folder)
    try:
        mark = json.loads((folder / MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return mark if isinstance(mark, dict) else None


def check_own(folder: Path, writer: str) -> None:
    """Make sure that a folder holds what `writer` exported into it and nothing else.

    Raises:
        CheckpointError: names what it holds beside that, or what was changed.
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
