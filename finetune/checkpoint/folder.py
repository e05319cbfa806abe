"""Folders that appear whole or not at all: written under a temporary name, flushed to the disk, then renamed."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from finetune.checkpoint.layout import CheckpointError
from monitoring.files import replace_file

TEMPORARY = ".nextune-tmp"  # suffix of the temporary folder beside the target; it holds only these three names:
_MARKER = "being-written.lock"  # lock file of the writing process; created first, deleted last
_CONTENT = "content"  # the new folder
_REPLACED = "replaced"  # the previous folder, until it is deleted

WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf")


@contextmanager
def whole_folder(to: str | Path, *, check_replaceable: Callable[[Path], None] | None = None) -> Iterator[Path]:
    """Context manager of a new folder, which is renamed to `to` when the block ends and deleted when it fails.

    It is written in `TO.nextune-tmp`. What a killed process left there is deleted; a folder of that name with other
    contents is an error.

    Args:
        check_replaceable: raises CheckpointError if an existing, non-empty `to` must not be replaced. Called before
            anything is written, and again before `to` is replaced. By default no such `to` is replaced.

    Raises:
        CheckpointError: `to` must not be replaced, another process is writing it, or the disk refused.
    """
    to = Path(os.path.realpath(to))
    check_replaceable = check_replaceable or _refuse
    partial = to.with_name(to.name + TEMPORARY) if to.name else to
    try:
        _check_target(to, check_replaceable)
        held = _begin(partial, to)
    except OSError as error:
        raise CheckpointError(f"{to}: cannot be written ({error.strerror or error}); choose another folder") from error
    try:
        content = partial / _CONTENT
        content.mkdir()
        yield content
        for path in (*content.rglob("*"), content):
            sync(path)
        _check_target(to, check_replaceable)
        _put(content, to, partial / _REPLACED)
        sync(to.parent)
    except (OSError, SafetensorError) as error:
        _delete(partial)
        left = f"what is left of it is in {partial}" if partial.exists() else "nothing is left of it"
        raise CheckpointError(f"{to}: could not be written ({error}); {left}") from error
    finally:
        _delete(partial)
        held.release()


def _refuse(to: Path) -> None:
    raise CheckpointError(f"{to}: already exists and is not an empty folder; choose another or remove it")


def _check_target(to: Path, check_replaceable: Callable[[Path], None]) -> None:
    if os.path.ismount(to):
        raise CheckpointError(f"{to}: is a mount point, which cannot be replaced; choose a folder below it")
    if to.exists() and not (to.is_dir() and not any(to.iterdir())):
        check_replaceable(to)


def _begin(partial: Path, to: Path) -> FileLock:
    """Create and lock the temporary folder; what a killed process left in it is deleted first."""
    ours = {_MARKER, _CONTENT, _REPLACED}
    there = {path.name for path in partial.iterdir()} if partial.is_dir() else set()
    if os.path.lexists(partial) and (not partial.is_dir() or there - ours or (there and _MARKER not in there)):
        raise CheckpointError(f"{partial}: is in the way of writing {to.name}; rename or remove it")
    partial.mkdir(parents=True, exist_ok=True)
    held = FileLock(partial / _MARKER)
    try:
        held.acquire(timeout=0)
    except Timeout:
        raise CheckpointError(f"{to}: another process is writing it now; wait for it, or choose another") from None
    for name in (_CONTENT, _REPLACED):
        if (partial / name).exists():
            shutil.rmtree(partial / name)
    return held


def _put(content: Path, to: Path, replaced: Path) -> None:
    if to.exists() and any(to.iterdir()):
        os.rename(to, replaced)
        try:
            os.rename(content, to)
        except OSError:
            os.rename(replaced, to)
            raise
    else:
        os.rename(content, to)


def _delete(partial: Path) -> None:
    """Delete the temporary folder, the marker last, so that after an interruption it is still recognised as ours.

    What cannot be deleted stays; the next write tries again.
    """
    for name in (_CONTENT, _REPLACED):
        shutil.rmtree(partial / name, ignore_errors=True)
    with suppress(OSError):
        if not {path.name for path in partial.iterdir()} - {_MARKER}:
            (partial / _MARKER).unlink(missing_ok=True)
            partial.rmdir()


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file with the permissions of the umask; `save_file` alone would make it private."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata=metadata)
    path.chmod(mode)


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` atomically and flush it to the disk."""
    replace_file(path, (json.dumps(value, indent=2) + "\n").encode())


def is_companion(path: Path) -> bool:
    """Whether `path`, a file at the top of a checkpoint folder, belongs to the checkpoint and is not weights.

    Hidden files do not belong to it. Nor does `adapter_config.json`: transformers would load that adapter too, which
    was not part of the model trained here.
    """
    is_weights = path.name.endswith(WEIGHT_SUFFIXES) or path.name == "adapter_config.json"
    return path.is_file() and not path.name.startswith(".") and not is_weights


def copy_companions(base: Path, to: Path) -> None:
    """Copy everything of a checkpoint folder that is not weights, byte for byte.

    These are configuration, tokenizer, chat templates, generation settings, licence and model card: the files at the
    top of the folder, hidden ones excepted, and the folder in which transformers stores additional chat templates.
    """
    for path in companions(base):
        (to / path).parent.mkdir(exist_ok=True)
        shutil.copyfile(base / path, to / path)


def companions(base: Path) -> list[Path]:
    """The files that `copy_companions` copies, relative to `base`."""
    templates = base / "additional_chat_templates"
    further = (path for path in templates.rglob("*") if path.is_file()) if templates.is_dir() else ()
    return sorted(path.relative_to(base) for path in (*filter(is_companion, base.iterdir()), *further))
