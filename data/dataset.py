"""Tokenised data on disk: built once from the sources, opened by every rank, never modified.

The folder's name is a hash of everything that determines its content (file contents, tokenizer, template, settings), so
a second run reuses it and a changed source gets another. It is whole or absent: built under a temporary name, flushed,
then renamed. Each start compares it with its manifest before training on it.
"""

import hashlib
import json
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from filelock import FileLock, Timeout

from data.build import CODE_VERSION, Job, Settings, build
from data.cache import OFFSETS, PACK_DOCUMENTS, PACK_OFFSETS, TOKENS, TRAINED, check_files, put_aside, read_manifest
from data.chat import Document
from data.files import FaultError
from data.packing import Batch, collate
from data.sources import DataError, Source, source_files
from data.tokenizer import Tokenizer
from monitoring.files import sha256_of

SECONDS_BETWEEN_LOOKS = 1.0  # polling interval for another process's build


class Known(NamedTuple):
    """Identifies a tokenised data set, so that it can be opened without reading its sources."""

    key: str  # name of its folder
    sha256: str


class Dataset:
    """Packs of tokenised documents, memory-mapped. `len` is the number of packs."""

    def __init__(self, folder: Path) -> None:
        """Open a folder that `prepare` has built or checked, in any process.

        Raises:
            DataError: it has been modified since.
        """
        self.folder = folder
        try:
            self.manifest: dict[str, Any] = read_manifest(folder)
            self._tokens = np.memmap(folder / TOKENS, np.dtype(self.manifest["token_type"]), "r")
            self._trained = np.memmap(folder / TRAINED, np.bool_, "r")
            self._offsets = np.load(folder / OFFSETS, mmap_mode="r")
            self._pack_documents = np.load(folder / PACK_DOCUMENTS, mmap_mode="r")
            self._pack_offsets = np.load(folder / PACK_OFFSETS, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise DataError(
                f"{folder}: changed while it was opened ({error}); the same command makes it again"
            ) from None
        self.sequence_tokens: int = self.manifest["sequence_tokens"]
        self.sha256: str = self.manifest["sha256"]
        self._pad_id: int = self.manifest["pad_id"]

    def __len__(self) -> int:
        return len(self._pack_offsets) - 1

    @property
    def known(self) -> Known:
        """The identity by which another rank opens this data."""
        return Known(self.folder.name, self.sha256)

    def documents(self, pack: int) -> list[Document]:
        """The documents of one pack, in order."""
        indices = self._pack_documents[self._pack_offsets[pack] : self._pack_offsets[pack + 1]]
        spans = [(self._offsets[index], self._offsets[index + 1]) for index in indices]
        return [Document(self._tokens[a:b].astype(np.int64), np.array(self._trained[a:b])) for a, b in spans]

    def batch(self, packs: Iterable[int], *, at_least: int = 0) -> Batch:
        """The packs as one batch, filled up to `at_least` packs with padding."""
        contents = [self.documents(int(pack)) for pack in packs]
        contents += [[]] * (at_least - len(contents))
        return collate(contents, sequence_tokens=self.sequence_tokens, pad_id=self._pad_id)


def prepare(
    sources: Sequence[Source],
    *,
    tokenizer: Tokenizer,
    sequence_tokens: int,
    packing: Literal["packed", "padded"],
    on_bad_row: Literal["stop", "skip"],
    over_long: Literal["drop", "stop"],
    cache: str | Path,
    known: Known | None = None,
    report: Callable[[str], None] = lambda line: None,
    progress: Callable[[], None] = lambda: None,
) -> Dataset:
    """Open the data of `sources`, tokenised and packed, below `cache`; build it if it is missing or damaged.

    Reads every byte of the sources or of the folder, so one process of a host calls it and the others call
    `open_known`. Of several concurrent calls, one builds and the others wait. An interrupted build is resumed.

    Text is split at `sequence_tokens`. Rows with turns or a prompt are never split; `over_long` applies to them.

    Args:
        known: identity of the data as found on another host; the sources are read only if they must be tokenised here.
        report: called with each message.
        progress: called after each part of the work.

    Raises:
        DataError: a source cannot be read, holds bad rows that stop the run, or leaves nothing to train on; or the data
            differs from `known`.
    """
    cache = Path(cache)
    settings = Settings(sequence_tokens, packing, on_bad_row, over_long)
    content: _Content | None = None
    if known:
        key = known.key
    else:
        content = _content(sources, tokenizer, settings, progress)
        key = content.key
    job = Job(cache / key, sources, tokenizer, settings, report, progress)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        if _fault_of(job.folder, progress) is not None:
            with _locked(job):
                _make(job, content)
    except OSError as error:
        reason = error.strerror or error
        raise DataError(
            f"{cache}: cannot keep tokenised data ({reason}); free space there, or set data.cache to another folder"
        ) from None
    dataset = Dataset(job.folder)
    if known and dataset.known != known:
        raise DataError(_differs(sources))
    return dataset


def open_known(cache: Path, known: Known) -> Dataset:
    """Open the data that another process of this host has built or checked.

    Raises:
        DataError: it no longer exists or has changed.
    """
    dataset = Dataset(cache / known.key)
    if dataset.known != known:
        raise DataError(f"{dataset.folder}: changed while it was opened; the same command makes it again")
    return dataset


def _fault_of(folder: Path, progress: Callable[[], None]) -> str | None:
    """What is wrong with the data in a folder: None (nothing), "" (it does not exist), or a sentence."""
    if not (folder.exists() or folder.is_symlink()):
        return ""
    try:
        check_files(folder, read_manifest(folder), progress)
    except FaultError as fault:
        return str(fault)
    return None


def _make(job: Job, content: "_Content | None") -> None:
    """Build the data unless another process has done so; an invalid folder is renamed or deleted first."""
    fault = _fault_of(job.folder, job.progress)
    if fault is None:
        return
    if fault:
        aside = put_aside(job.folder)
        job.report(
            f"{fault}; it is not trained on but made again"
            + (f" (what was there is {aside} now, since not all of it is ours)" if aside else "")
        )
    content = content or _content(job.sources, job.tokenizer, job.settings, job.progress)
    if content.key != job.folder.name:
        raise DataError(_differs(job.sources))
    build(job)
    if content.states != _states(job.sources):
        put_aside(job.folder)
        raise DataError(
            f"{', '.join(source.path for source in job.sources)}: a file was changed while it was read; give the"
            " command again when the data stays as it is"
        )


@contextmanager
def _locked(job: Job) -> Iterator[None]:
    """Hold the lock for building this data; while waiting for another process, report its progress as this one's."""
    lock = FileLock(job.folder.with_name(f"{job.folder.name}.lock"))
    building, seen, is_told = job.folder.with_name(f"{job.folder.name}.tmp"), 0, False
    while not lock.is_locked:
        try:
            lock.acquire(timeout=SECONDS_BETWEEN_LOOKS)
        except Timeout:
            if not is_told:
                job.report(f"waiting for another process that is making {job.folder}")
                is_told = True
            made = sum(path.stat().st_size for path in building.glob("*.*") if path.is_file())
            if made != seen:
                seen = made
                job.progress()
    try:
        yield
    finally:
        lock.release()


class _Content(NamedTuple):
    """Identity of the sources: a hash of everything that determines the tokens, and each file's state when read."""

    key: str
    states: list[tuple[str, int, int]]


def _content(
    sources: Sequence[Source], tokenizer: Tokenizer, settings: Settings, progress: Callable[[], None]
) -> _Content:
    """Hash every byte of the sources; file names count, their folders do not."""
    states = _states(sources)
    files = [[source.format, [[p.name, _hash_of(p, progress)] for p in source_files(source)]] for source in sources]
    identity = [CODE_VERSION, files, tokenizer.fingerprint, asdict(settings)]
    return _Content(hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32], states)


def _states(sources: Sequence[Source]) -> list[tuple[str, int, int]]:
    """Path, size in bytes and modification time in ns of every file of the sources."""
    found = []
    for path in (path for source in sources for path in source_files(source)):
        try:
            state = path.stat()
        except OSError as error:
            raise _unreadable(path, error) from None
        found.append((str(path), state.st_size, state.st_mtime_ns))
    return found


def _hash_of(path: Path, progress: Callable[[], None]) -> str:
    """The sha256 of the file's sha256 digest, the form used in names of folders and in checkpoints."""
    try:
        return hashlib.sha256(bytes.fromhex(sha256_of(path, progress))).hexdigest()
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path}: cannot be read ({error.strerror or error})")


def _differs(sources: Sequence[Source]) -> str:
    host = socket.gethostname()
    return (
        f"{', '.join(source.path for source in sources)}: the data on {host} differs from that of rank 0; every host"
        " needs the same, from a shared disk or as an exact copy"
    )
