"""What tells one folder of base weights from another without reading all of it."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from finetune.checkpoint.header import HeaderError, parse_index
from finetune.checkpoint.layout import CheckpointError
from finetune.checkpoint.shards import INDEX, read_header
from monitoring.json_file import FileError, read_bytes, read_json, reason

_FORM = "2-"  # of a fingerprint that looks into every tensor; without it, one of eight samples a file
_TENSOR_BYTES = 4 * 1024
_SAMPLE_BYTES = 64 * 1024
_FILES_AT_ONCE = 8  # a network disk answers many small reads at once as fast as one


def fingerprint(folder: str | Path) -> str:
    """A sha256 that is the same on every machine, over `config.json` and all files of weights.

    Of each file: its name, its size, what its header says, and 4 KiB from the middle of every tensor, since training
    changes all of a tensor. A file that is not safetensors gives 64 KiB at eight places; who loads it says what is
    wrong with it.
    """
    folder = Path(folder)
    digest = hashlib.sha256(_config(folder))
    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        for of_file in pool.map(lambda path: _of_file(folder, path), _files(folder)):
            digest.update(of_file)
    return _FORM + digest.hexdigest()


def is_of(known: str, folder: str | Path, now: str | None = None) -> bool:
    """Whether a fingerprint that a run has stored, in this form or the earlier one, is that of a folder.

    Args:
        now: the folder's fingerprint, where it has been taken already.
    """
    folder = Path(folder)
    return known == ((now or fingerprint(folder)) if known.startswith(_FORM) else _of_samples(folder))


def _config(folder: Path) -> bytes:
    try:
        return read_bytes(folder / "config.json")
    except FileError as error:
        raise CheckpointError(f"{error}; copy the file of the checkpoint again") from None


def _files(folder: Path) -> list[Path]:
    """Files of weights: those at the top of the folder, and those in folders below it that the index names."""
    try:
        named = {folder / file for file in parse_index(read_json(folder / INDEX)).values() if "/" in file}
    except (FileError, HeaderError):  # none, or one that whoever loads the folder says what is wrong with
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
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # else the kernel reads far around each place
        for name, stored in tensors.items():
            digest.update(f"{name} {stored.dtype} {stored.shape} {stored.start}".encode())
            middle = (stored.start + stored.end - _TENSOR_BYTES) // 2
            digest.update(
                os.pread(descriptor, min(_TENSOR_BYTES, stored.end - stored.start), max(stored.start, middle))
            )
    return digest.digest()


def _of_samples(folder: Path) -> str:
    """The earlier form, which runs begun with it have stored."""
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
