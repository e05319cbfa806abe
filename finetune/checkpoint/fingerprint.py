"""Fingerprint of a folder of base weights, computed from samples without reading all of it."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from finetune.checkpoint.header import HeaderError, parse_index
from finetune.checkpoint.layout import CheckpointError
from finetune.checkpoint.shards import INDEX, read_header
from monitoring.json_file import FileError, read_bytes, read_json, reason

_FORM = "2-"  # prefix of fingerprints that sample every tensor; without it, the older form with eight samples a file
_TENSOR_BYTES = 4 * 1024
_SAMPLE_BYTES = 64 * 1024
_FILES_AT_ONCE = 8  # a network disk serves many small reads concurrently


def fingerprint(folder: str | Path) -> str:
    """A sha256 over `config.json` and samples of all weight files; the same on every machine.

    Each file contributes its name, its size, its header and 4 KiB from the middle of every tensor (training changes the
    whole of a tensor). A file that is not valid safetensors contributes 64 KiB at eight offsets; the loader reports
    what is wrong with it.
    """
    folder = Path(folder)
    digest = hashlib.sha256(_config(folder))
    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        for of_file in pool.map(lambda path: _of_file(folder, path), _files(folder)):
            digest.update(of_file)
    return _FORM + digest.hexdigest()


def is_of(known: str, folder: str | Path, now: str | None = None) -> bool:
    """Whether the stored fingerprint `known`, in this form or the older one, matches `folder`.

    Args:
        now: the folder's fingerprint, if already computed.
    """
    folder = Path(folder)
    return known == ((now or fingerprint(folder)) if known.startswith(_FORM) else _of_samples(folder))


def _config(folder: Path) -> bytes:
    try:
        return read_bytes(folder / "config.json")
    except FileError as error:
        raise CheckpointError(f"{error}; copy the file of the checkpoint again") from None


def _files(folder: Path) -> list[Path]:
    """Weight files: those at the top of the folder, and those in subfolders that the index names."""
    try:
        named = {folder / file for file in parse_index(read_json(folder / INDEX)).values() if "/" in file}
    except (FileError, HeaderError):  # no index, or an invalid one, which the loader reports
        named = set()
    return sorted(path for path in {*folder.glob("*.safetensors"), *named} if os.path.isfile(path))


def _of_file(folder: Path, path: Path) -> bytes:
    digest = hashlib.sha256(f"{path.relative_to(folder).as_posix()} {path.stat().st_size}".encode())
    try:
        tensors = read_header(path)
    except CheckpointError:
        _add_samples(digest, path)
        return digest.digest()
    with path.open("rb") as file:
        descriptor = file.fileno()
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # disables readahead around each sample
        for name, stored in tensors.items():
            digest.update(f"{name} {stored.dtype} {stored.shape} {stored.start}".encode())
            middle = (stored.start + stored.end - _TENSOR_BYTES) // 2
            digest.update(
                os.pread(descriptor, min(_TENSOR_BYTES, stored.end - stored.start), max(stored.start, middle))
            )
    return digest.digest()


def _of_samples(folder: Path) -> str:
    """The older form of the fingerprint, which existing runs have stored."""
    digest = hashlib.sha256(_config(folder))
    for path in _files(folder):
        digest.update(f"{path.name} {path.stat().st_size}".encode())
        _add_samples(digest, path)
    return digest.hexdigest()


def _add_samples(digest: "hashlib._Hash", path: Path) -> None:
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            for place in range(8):
                file.seek(max(0, size - _SAMPLE_BYTES) * place // 7)
                digest.update(file.read(_SAMPLE_BYTES))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({reason(error)}); check the file and its disk") from error
