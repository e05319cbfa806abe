"""Tokenised data on disk: made once from the sources, opened by every rank, never changed.

A folder is named after everything that decides its content (bytes of the files, tokenizer, template, settings), so a
second run opens it and a changed source makes another. It appears whole: built beside, flushed, renamed. Each start
compares it with its manifest before it is trained on.
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
from data.files import FaultError, sha256_of
from data.packing import Batch, collate
from data.sources import DataError, Source, source_files
from data.tokenizer import Tokenizer

SECONDS_BETWEEN_LOOKS = 1.0  # at what another process makes


class Known(NamedTuple):
    """Which data it is: enough to open it without reading its sources."""

    key: str  # name of its folder
    sha256: str


class Dataset:
    """Packs of tokenised documents, memory-mapped. `len` is the number of packs."""

    def __init__(self, folder: Path) -> None:
        """Open a folder that `prepare` of some process has made or checked.

        Raises:
            DataError: it has been changed since.
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
        """By what another rank finds this data."""
        return Known(self.folder.name, self.sha256)

    def documents(self, pack: int) -> list[Document]:
        """The documents of one pack, in their order."""
        indices = self._pack_documents[self._pack_offsets[pack] : self._pack_offsets[pack + 1]]
        spans = [(self._offsets[index], self._offsets[index + 1]) for index in indices]
        return [Document(self._tokens[a:b].astype(np.int64), np.array(self._trained[a:b])) for a, b in spans]

    def batch(self, packs: Iterable[int], *, at_least: int = 0) -> Batch:
        """The packs as one batch, filled up to `at_least` with packs of padding."""
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
    """The data of `sources`, tokenised and packed below `cache`: checked if it is there, else made.

    Reads every byte of the sources, or of the folder, so one process of a host does it and the others open what it
    found. Of several that call it at once, one builds and the others wait. A build that was killed is gone on with.

    Text is split at `sequence_tokens`; what has turns or a prompt is never cut, so `over_long` decides about it.

    Args:
        known: which data another host has found; its sources are read here only if they must be tokenised here.
        report: is told what is done, a line each.
        progress: called whenever a part of the work is done.

    Raises:
        DataError: a source cannot be read, holds bad rows that stop the run, or leaves nothing to train on; or it is
            not the `known` data.
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
    """The data that another process of this host has made or checked.

    Raises:
        DataError: it is not there any more.
    """
    dataset = Dataset(cache / known.key)
    if dataset.known != known:
        raise DataError(f"{dataset.folder}: changed while it was opened; the same command makes it again")
    return dataset


def _fault_of(folder: Path, progress: Callable[[], None]) -> str | None:
    """What is wrong with the data in a folder: nothing (None), it is not there (""), or a sentence."""
    if not (folder.exists() or folder.is_symlink()):
        return ""
    try:
        check_files(folder, read_manifest(folder), progress)
    except FaultError as fault:
        return str(fault)
    return None


def _make(job: Job, content: "_Content | None") -> None:
    """Make the data, unless another process has done so; what is there in its place is put aside."""
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
    """Be the one process that makes this data; while another one does and gets on, that is progress here too."""
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
    """What decides the tokens: all of it as a hash, and the state of each file when it was read."""

    key: str
    states: list[tuple[str, int, int]]


def _content(
    sources: Sequence[Source], tokenizer: Tokenizer, settings: Settings, progress: Callable[[], None]
) -> _Content:
    """Reads every byte of the sources; the folders that they are in do not count."""
    states = _states(sources)
    files = [[source.format, [[p.name, _hash_of(p, progress)] for p in source_files(source)]] for source in sources]
    identity = [CODE_VERSION, files, tokenizer.fingerprint, asdict(settings)]
    return _Content(hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32], states)


def _states(sources: Sequence[Source]) -> list[tuple[str, int, int]]:
    """Name, size and time of change of every file of the sources."""
    found = []
    for path in (path for source in sources for path in source_files(source)):
        try:
            state = path.stat()
        except OSError as error:
            raise _unreadable(path, error) from None
        found.append((str(path), state.st_size, state.st_mtime_ns))
    return found


def _hash_of(path: Path, progress: Callable[[], None]) -> str:
    """The hash of a file in the form that names of folders and checkpoints have always been made of."""
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
