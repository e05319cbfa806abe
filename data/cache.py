"""The folder of one tokenised data set: what it holds, and whether it still holds what was written.

A folder is named after everything that decides its content. Its manifest records the size and the hash of every file,
and its own. All of it is compared once a start, so what was changed, cut short or put there by something else is never
trained on: the folder is made again.
"""

import hashlib
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from data.files import FaultError, bytes_of, read_json, sha256_of

MANIFEST = "manifest.json"
TOKENS, TRAINED = "tokens.bin", "trained.bin"
OFFSETS, PACK_DOCUMENTS, PACK_OFFSETS = "offsets.npy", "pack_documents.npy", "pack_offsets.npy"
FILES = (OFFSETS, PACK_DOCUMENTS, PACK_OFFSETS, TOKENS, TRAINED)
JOURNAL, LENGTHS = "journal.json", "lengths.bin"  # while it is made
OURS = {MANIFEST, JOURNAL, LENGTHS, *FILES, *(f"{name}.new" for name in (MANIFEST, JOURNAL))}


def read_manifest(folder: Path) -> dict[str, Any]:
    """What was recorded about the data in a folder; its files are not looked at.

    Raises:
        FaultError: it is not the manifest of the data that the folder is named after.
    """
    manifest = read_json(folder / MANIFEST)
    if manifest.get("key") != folder.name or set(manifest.get("files", {})) != set(FILES):
        raise FaultError(f"{folder / MANIFEST}: belongs to other data, or to an earlier version")
    return manifest


def check_files(folder: Path, manifest: Mapping[str, Any], progress: Callable[[], None]) -> None:
    """Compare every byte of a folder with its manifest.

    Args:
        progress: called after each piece that is read.

    Raises:
        FaultError: names the file that differs.
    """
    for name, recorded in manifest["files"].items():
        path = folder / name
        size = bytes_of(path)
        if size != recorded["bytes"]:
            raise FaultError(f"{path}: has {size:,} bytes instead of {recorded['bytes']:,}")
        try:
            found = sha256_of(path, progress)
        except OSError as error:
            raise FaultError(f"{path}: cannot be read ({error.strerror})") from None
        if found != recorded["sha256"]:
            raise FaultError(f"{path}: was changed after it was written")


def identity(files: Mapping[str, Mapping[str, Any]]) -> str:
    """One hash for the content of all files, by which a checkpoint knows the data."""
    return hashlib.sha256(b"".join(bytes.fromhex(files[name]["sha256"]) for name in FILES)).hexdigest()


def put_aside(path: Path) -> Path | None:
    """Free a name that something damaged or foreign has.

    Returns:
        Its new name, unless all in it was ours and is deleted.
    """
    number = 1
    while (aside := path.with_name(f"{path.name}.aside-{number}")).exists() or aside.is_symlink():
        number += 1
    path.rename(aside)
    if aside.is_symlink() or not aside.is_dir():
        return aside
    try:
        if any(inside.name not in OURS or inside.is_dir() for inside in aside.iterdir()):
            return aside
        shutil.rmtree(aside)
    except OSError:
        return aside
    return None
