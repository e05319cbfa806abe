"""The manifest of a checkpoint: step, files and training state, with a hash over all of it. Imports no torch."""

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from finetune.checkpoint.layout import CheckpointError
from monitoring.json_file import FileError, MissingFileError, read_object

MANIFEST = "manifest.json"
STEP = re.compile(r"step-(\d+)")


class _Part(BaseModel):
    model_config = ConfigDict(strict=True)

    file: Annotated[str, Field(pattern=r"^part-\d{5,}\.safetensors$")]  # in the folder of the manifest
    bytes: Annotated[int, Field(ge=0)]
    sha256: str


class _Manifest(BaseModel):
    model_config = ConfigDict(strict=True)

    step: Annotated[int, Field(ge=0)]
    parts: list[_Part]
    state: dict[str, Any]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]  # of all other fields


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The contents of a checkpoint's manifest, without their hash.

    Raises:
        CheckpointError: no manifest, or one that was modified after it was written.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    try:
        manifest = read_object(path)
        recorded = _Manifest.model_validate(manifest).sha256
    except MissingFileError:
        raise CheckpointError(f"{path}: no such file; this is not a checkpoint of a run") from None
    except FileError as error:
        raise CheckpointError(f"{error}; it was changed or cut short") from None
    except ValidationError as error:
        key = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise CheckpointError(
            f"{path}: not a manifest of a checkpoint ({key} is missing or wrong); it was changed or cut short"
        ) from None
    del manifest["sha256"]
    if recorded != hash_of_values(manifest):
        raise CheckpointError(
            f"{path}: was changed after it was written (it names its own sha256 {recorded[:12]}..., its values"
            f" have {hash_of_values(manifest)[:12]}...)"
        )
    return manifest


def newest_manifest(root: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint below `root` with a valid manifest, and that manifest; no other file is read."""
    try:
        folders = sorted((path for path in root.iterdir() if STEP.fullmatch(path.name)), key=step_of, reverse=True)
    except OSError:
        return None
    for folder in folders:
        try:
            return folder, read_manifest(folder)
        except CheckpointError:
            continue  # the reader of the checkpoint reports what is wrong
    return None


def step_of(folder: Path) -> int:
    """N of `step-N` and of the temporary names that start with it; -1 for any other name."""
    found = STEP.match(folder.name)
    return int(found[1]) if found else -1


def hash_of_values(manifest: dict[str, Any]) -> str:
    """The sha256 of a manifest's values, independent of formatting and key order."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
