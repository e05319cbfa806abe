"""Tokenising a data set so that an interrupted build is resumed.

Tokens, masks and document lengths are appended to files in `FOLDER.tmp`. Every `SECONDS_BETWEEN_SAVES` a journal
records the number of rows read and the sizes and hashes of the files. A later build compares the files with the
journal, truncates them to the recorded sizes and continues with the next row. The folder is renamed to its final name
when it is complete.
"""

import hashlib
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data.cache import (
    FILES,
    JOURNAL,
    LENGTHS,
    MANIFEST,
    OFFSETS,
    PACK_DOCUMENTS,
    PACK_OFFSETS,
    TOKENS,
    TRAINED,
    identity,
    put_aside,
)
from data.chat import ChatTemplate, Document, encode, pieces_of
from data.files import FaultError, bytes_of, flush, read_json, sync, write_json
from data.formats import Content, Conversation, Text, read_contents, size_of
from data.packing import best_fit, split_long, supervised_tokens
from data.sources import BadRows, DataError, RowError, Source
from data.tokenizer import Tokenizer
from monitoring.files import sha256_of

# Part of every folder's name: increase it when a change produces other tokens, masks or packs from the same data.
CODE_VERSION = 1
ROWS_AT_ONCE = 256
CHARACTERS_AT_ONCE = 4 << 20
REPORT_EVERY_ROWS = 50_000
SECONDS_BETWEEN_SAVES = 30.0
OVER_LONG = "over-long"
GROWING = (TOKENS, TRAINED, LENGTHS)


@dataclass(frozen=True)
class Settings:
    """The settings of the recipe that determine tokens and packs."""

    sequence_tokens: int
    packing: Literal["packed", "padded"]
    on_bad_row: Literal["stop", "skip"]
    over_long: Literal["drop", "stop"]


@dataclass(frozen=True)
class Job:
    """A data set to build, with callbacks for messages and progress."""

    folder: Path
    sources: Sequence[Source]
    tokenizer: Tokenizer
    settings: Settings
    report: Callable[[str], None]
    progress: Callable[[], None]


def build(job: Job) -> None:
    """Build the tokenised folder, resuming an interrupted build. Call it in one process at a time.

    Raises:
        DataError: a source cannot be read, holds bad rows that stop the run, or no row is left to train on.
    """
    building = job.folder.with_name(f"{job.folder.name}.tmp")
    if building.is_symlink() or (building.exists() and not building.is_dir()):
        put_aside(building)
    building.mkdir(exist_ok=True)
    try:
        manifest = _finish(building, job, _write_documents(building, job))
    except DataError:  # corrected data gets another folder
        shutil.rmtree(building, ignore_errors=True)
        raise
    write_json(building / MANIFEST, manifest)
    building.rename(job.folder)
    sync(job.folder.parent)
    for name in (JOURNAL, LENGTHS):
        (job.folder / name).unlink()


class _Growing:
    """An append-only file with a running hash."""

    def __init__(self, path: Path):
        """Open the file for appending; its existing content counts only after `keep`."""
        self._digest, self._path = hashlib.sha256(), path
        self._file = path.open("ab")
        self.size = 0

    def keep(self, size: int, sha256: str, progress: Callable[[], None]) -> None:
        """Verify the first `size` bytes, written by an earlier build, and truncate the rest.

        Raises:
            FaultError: the file is shorter, or its hash differs.
        """
        if bytes_of(self._path) < size:
            raise FaultError(f"{self._path}: is shorter than its journal says")
        with self._path.open("rb") as file:
            while self.size < size:
                piece = file.read(min(1 << 24, size - self.size))
                self._digest.update(piece)
                self.size += len(piece)
                progress()
        if self.sha256() != sha256:
            raise FaultError(f"{self._path}: was changed after it was written")
        self._file.truncate(size)

    def write(self, contents: bytes) -> None:
        self._file.write(contents)
        self._digest.update(contents)
        self.size += len(contents)

    def sha256(self) -> str:
        return self._digest.copy().hexdigest()

    def flush(self) -> None:
        flush(self._file)

    def close(self) -> None:
        self._file.close()


class _Made:
    """The output of a build so far: the growing files and the counts."""

    def __init__(self, building: Path, job: Job):
        """Restore what an earlier build saved; start empty if there is nothing, or if it is damaged."""
        self._journal, self._key = building / JOURNAL, job.folder.name
        self.bad_rows = BadRows(job.settings.on_bad_row)
        self.counts = {"rows": 0, "supervised_tokens": 0, "split_rows": 0}
        self.files: dict[str, _Growing] = {}
        self._saved = time.monotonic()
        self.rows_read = 0  # from the sources, usable or not
        try:
            self._restore(building, job)
        except FaultError as fault:
            if self._journal.exists():
                job.report(f"{fault}; the half-made tokenised data is not continued but made anew")
            for file in self.files.values():
                file.close()
            self._start(building, job)

    def _start(self, building: Path, job: Job) -> None:
        put_aside(building)
        building.mkdir()
        self.files = {name: _Growing(building / name) for name in GROWING}

    def _restore(self, building: Path, job: Job) -> None:
        saved = read_json(self._journal)
        if saved.get("key") != self._key:
            raise FaultError(f"{self._journal}: belongs to other data")
        for name in GROWING:
            bytes_of(building / name)
            self.files[name] = _Growing(building / name)
            self.files[name].keep(saved["files"][name]["bytes"], saved["files"][name]["sha256"], job.progress)
        self.counts, self.rows_read = saved["counts"], saved["rows_read"]
        self.bad_rows.counts.update(saved["dropped"])
        job.report(f"continuing to tokenise after {self.rows_read:,} rows that an earlier start has read")

    def add(self, documents: Sequence[Document], token_type: type[np.unsignedinteger]) -> None:
        """Append the documents of one row."""
        self.counts["rows"] += 1
        self.counts["split_rows"] += len(documents) > 1
        for document in documents:
            self.files[TOKENS].write(document.ids.astype(token_type).tobytes())
            self.files[TRAINED].write(document.trained.tobytes())
            self.files[LENGTHS].write(np.int64(len(document.ids)).tobytes())
            self.counts["supervised_tokens"] += supervised_tokens(document)

    def save(self, rows_read: int, *, now: bool = False) -> None:
        """If a save is due or `now`, flush the files and record the first `rows_read` rows as done in the journal."""
        if self.bad_rows.stopping or not (now or time.monotonic() - self._saved >= SECONDS_BETWEEN_SAVES):
            return
        for file in self.files.values():
            file.flush()
        self.rows_read = rows_read
        saved = {"key": self._key, "rows_read": rows_read, "counts": self.counts, "dropped": dict(self.bad_rows.counts)}
        write_json(self._journal, {**saved, "files": self.described()})
        self._saved = time.monotonic()

    def described(self) -> dict[str, dict[str, Any]]:
        """Size and sha256 of each file."""
        return {name: {"bytes": file.size, "sha256": file.sha256()} for name, file in self.files.items()}


def _write_documents(building: Path, job: Job) -> _Made:
    """Tokenise the rows that no earlier build has read, and flush everything to the disk."""
    made, token_type = _Made(building, job), _token_type(job.tokenizer)
    try:
        for group in _documents(job, made):
            for documents in group:
                made.add(documents, token_type)
                if made.counts["rows"] % REPORT_EVERY_ROWS == 0:
                    job.report(f"tokenised {made.counts['rows']:,} rows")
            made.save(made.bad_rows.rows_seen)
            job.progress()
        made.bad_rows.stop_if_any()
        if not made.counts["rows"]:
            raise DataError(_nothing_left(job.sources, made.bad_rows))
        made.save(made.bad_rows.rows_seen, now=True)
    finally:
        for file in made.files.values():
            file.close()
    return made


def _finish(building: Path, job: Job, made: _Made) -> dict[str, Any]:
    """Write the document offsets and the documents of each pack; returns the manifest."""
    settings, described = job.settings, made.described()
    lengths: NDArray[np.int64] = np.fromfile(building / LENGTHS, np.int64)
    if settings.packing == "packed":
        packs = best_fit(lengths, settings.sequence_tokens, job.progress)
    else:
        packs = [[index] for index in range(len(lengths))]
    offsets = {
        OFFSETS: np.concatenate((np.zeros(1, np.int64), np.cumsum(lengths))),
        PACK_DOCUMENTS: np.fromiter(chain.from_iterable(packs), np.int64, len(lengths)),
        PACK_OFFSETS: np.cumsum(np.fromiter(chain([0], map(len, packs)), np.int64, len(packs) + 1)),
    }
    for name, values in offsets.items():
        with (building / name).open("wb") as file:
            np.save(file, values)
            flush(file)
        described[name] = {"bytes": bytes_of(building / name), "sha256": sha256_of(building / name, job.progress)}
    files, tokens = {name: described[name] for name in FILES}, int(lengths.sum())
    return {
        "key": job.folder.name,
        "code_version": CODE_VERSION,
        **asdict(settings),
        "pad_id": job.tokenizer.pad_id,
        "token_type": np.dtype(_token_type(job.tokenizer)).name,
        **made.counts,
        "documents": len(lengths),
        "packs": len(packs),
        "tokens": tokens,
        "fill": tokens / (len(packs) * settings.sequence_tokens),
        "dropped": dict(made.bad_rows.counts),
        "sources": [source.path for source in job.sources],
        "files": files,
        "sha256": identity(files),
    }


def _token_type(tokenizer: Tokenizer) -> type[np.unsignedinteger]:
    return np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32


def _documents(job: Job, made: _Made) -> Iterator[list[list[Document]]]:
    """The documents of each usable row, rendered and tokenised in groups of rows."""
    bad_rows, settings = made.bad_rows, job.settings
    template: ChatTemplate | None = None
    for group in _groups(read_contents(job.sources, bad_rows, skip=made.rows_read, progress=job.progress)):
        if template is None and any(isinstance(content, Conversation) for _, content in group):
            template = ChatTemplate(job.tokenizer)
        rendered = []
        for (place, content), pieces in zip(
            group, pieces_of([row[1] for row in group], job.tokenizer, template), strict=True
        ):
            if isinstance(pieces, RowError):
                bad_rows.add(pieces.at(place))
            else:
                rendered.append((place, content, pieces))
        if bad_rows.stopping:
            continue
        rows: list[list[Document]] = []
        for (place, content, _), document in zip(
            rendered, encode([row[2] for row in rendered], job.tokenizer), strict=True
        ):
            try:
                rows.append(_fit(content, document, settings))
            except RowError as error:
                stops = settings.over_long == "stop" if error.reason == OVER_LONG else None
                bad_rows.add(error.at(place), stops=stops)
        yield rows


def _groups(rows: Iterable[tuple[str, Content]]) -> Iterator[list[tuple[str, Content]]]:
    """Groups of rows to render and tokenise together, limited in rows and characters.

    No row beyond the group is read: the journal counts rows read, so their documents must have been written.
    """
    group: list[tuple[str, Content]] = []
    characters = 0
    for row in rows:
        group.append(row)
        characters += size_of(row[1])
        if len(group) == ROWS_AT_ONCE or characters >= CHARACTERS_AT_ONCE:
            yield group
            group, characters = [], 0
    if group:
        yield group


def _fit(content: Content, document: Document, settings: Settings) -> list[Document]:
    """The documents of at most `sequence_tokens` tokens that a row becomes.

    Raises:
        RowError: a row that is too long and may not be split, or without a supervised token.
    """
    if not supervised_tokens(document):
        raise RowError("no trainable token", "no token to learn from")
    if isinstance(content, Text):
        return split_long(document, settings.sequence_tokens)
    if len(document.ids) > settings.sequence_tokens:
        limit = f"train.sequence_tokens = {settings.sequence_tokens:,}"
        raise RowError(
            OVER_LONG, f"{len(document.ids):,} tokens, more than {limit}; raise it or set data.over_long: drop"
        )
    return [document]


def _nothing_left(sources: Sequence[Source], bad_rows: BadRows) -> str:
    reasons = ", ".join(f"{reason}: {count:,}" for reason, count in bad_rows.counts.most_common()) or "there are none"
    return f"{', '.join(source.path for source in sources)}: no rows left to train on ({reasons})"
