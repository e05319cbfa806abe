"""The folder of one tokenised data set: its files, and checks that they are unchanged.

The folder's name is a hash of everything that determines its content. Its manifest records the size and the sha256 of
every file. All are compared once at each start; a folder that was changed or truncated is never trained on, but
rebuilt.
"""

import hashlib
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from data.files import FaultError, bytes_of, read_json
from monitoring.files import sha256_of

MANIFEST = "manifest.json"
TOKENS, TRAINED = "tokens.bin", "trained.bin"
OFFSETS, PACK_DOCUMENTS, PACK_OFFSETS = "offsets.npy", "pack_documents.npy", "pack_offsets.npy"
FILES = (OFFSETS, PACK_DOCUMENTS, PACK_OFFSETS, TOKENS, TRAINED)
JOURNAL, LENGTHS = "journal.json", "lengths.bin"  # only during a build
OURS = {MANIFEST, JOURNAL, LENGTHS, *FILES, *(f"{name}.new" for name in (MANIFEST, JOURNAL))}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder; the other files are not read.

    Raises:
        FaultError: no manifest, or not that of the data that the folder is named after.
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
    """A sha256 of the content of all files, stored in checkpoints to identify the data."""
    return hashlib.sha256(b"".join(bytes.fromhex(files[name]["sha256"]) for name in FILES)).hexdigest()


def put_aside(path: Path) -> Path | None:
    """Rename a damaged or foreign file or folder to `NAME.aside-N`, and delete it if it holds only files of ours.

    Returns:
        Its new name, or None if it was deleted.
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
