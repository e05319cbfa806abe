"""Folders that appear whole or not at all: written beside their final name, flushed to the disk, then renamed."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from finetune.checkpoint.layout import CheckpointError
from monitoring.files import replace_file

# Tells a folder that an earlier, interrupted write left behind from one that happens to have its name.
_MARKER = ".being-written"

WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf")


@contextmanager
def whole_folder(to: Path) -> Iterator[Path]:
    """A new folder `TO.tmp` to write into, which becomes `to` when the block ends and is deleted when it fails.

    Raises:
        CheckpointError: `to` already holds something, or the disk refused.
    """
    partial = to.with_name(to.name + ".tmp")
    if to.exists() and not (to.is_dir() and not any(to.iterdir())):
        raise CheckpointError(f"{to}: already exists and is not an empty folder; choose another or remove it")
    if partial.exists() and not (partial / _MARKER).exists():
        raise CheckpointError(f"{partial}: is in the way of writing {to.name}; rename or remove it")
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        (partial / _MARKER).touch()
        yield partial
        (partial / _MARKER).unlink()
        for path in (*partial.rglob("*"), partial):
            sync(path)
        os.rename(partial, to)
        sync(to.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"{to}: could not be written ({error}); nothing is left of it") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def sync(path: Path) -> None:
    """Wait until a file, or the list of names of a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Put `value` at `path`, whole, and wait until it is on the disk."""
    replace_file(path, (json.dumps(value, indent=2) + "\n").encode())


def copy_companions(base: Path, to: Path) -> None:
    """Copy everything of a checkpoint folder that is not weights, byte for byte.

    That is configuration, tokenizer, chat templates, generation settings, licence, model card: the files at the top of
    the folder, hidden ones left out, and the folder in which transformers keeps further chat templates.
    """
    for path in base.iterdir():
        if path.is_file() and not path.name.startswith(".") and not path.name.endswith(WEIGHT_SUFFIXES):
            shutil.copyfile(path, to / path.name)
    templates = base / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, to / templates.name, copy_function=shutil.copyfile)
