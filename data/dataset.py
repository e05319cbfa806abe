"""Tokenised data on disk: made once from the sources, opened by every rank, never changed.

A folder is named after everything that decides its content (bytes of the files, tokenizer, template, settings), so a
second run opens it and a changed source makes another. It appears whole: built beside, flushed, renamed.
"""

import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from data.chat import ChatTemplate, Document, encode, pieces_of
from data.formats import Content, Conversation, Text, read_contents, size_of
from data.packing import Batch, best_fit, collate, split_long, supervised_tokens
from data.sources import BadRows, DataError, RowError, Source, source_files
from data.tokenizer import Tokenizer

# Part of every folder's name: raise it when a change makes other tokens, masks or packs from the same data.
CODE_VERSION = 1
ROWS_AT_ONCE = 256
CHARACTERS_AT_ONCE = 4 << 20
REPORT_EVERY_ROWS = 50_000
OVER_LONG = "over-long"


@dataclass(frozen=True)
class Settings:
    """What of the recipe decides the tokens and the packs."""

    sequence_tokens: int
    packing: Literal["packed", "padded"]
    on_bad_row: Literal["stop", "skip"]
    over_long: Literal["drop", "stop"]


class Dataset:
    """Packs of tokenised documents, memory-mapped. `len` is the number of packs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            self._tokens = np.memmap(folder / "tokens.bin", np.dtype(self.manifest["token_type"]), "r")
            self._trained = np.memmap(folder / "trained.bin", np.bool_, "r")
            self._offsets = np.load(folder / "offsets.npy", mmap_mode="r")
            self._pack_documents = np.load(folder / "pack_documents.npy", mmap_mode="r")
            self._pack_offsets = np.load(folder / "pack_offsets.npy", mmap_mode="r")
        except (OSError, ValueError) as error:
            raise DataError(f"{folder}: damaged ({error}); delete the folder and it is made again") from None
        if not len(self._tokens) == len(self._trained) == self._offsets[-1] == self.manifest["tokens"]:
            raise DataError(f"{folder}: damaged (tokens are missing); delete the folder and it is made again")
        self.sequence_tokens: int = self.manifest["sequence_tokens"]
        self.sha256: str = self.manifest["sha256"]
        self._pad_id: int = self.manifest["pad_id"]

    def __len__(self) -> int:
        return len(self._pack_offsets) - 1

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
    cache: Path,
    report: Callable[[str], None] = lambda line: None,
) -> Dataset:
    """The data of `sources`, tokenised and packed below `cache`. Call it on every rank: one builds, the others wait.

    Text is split at `sequence_tokens`; what has turns or a prompt is never cut, so `over_long` decides about it.

    Raises:
        DataError: a source cannot be read, holds bad rows that stop the run, or leaves nothing to train on.
    """
    settings = Settings(sequence_tokens, packing, on_bad_row, over_long)
    folder = cache / _content_key(sources, tokenizer, settings)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        if not (folder / "manifest.json").is_file():
            with FileLock(cache / f"{folder.name}.lock"):
                if not (folder / "manifest.json").is_file():
                    _build(folder, sources, tokenizer, settings, report)
    except OSError as error:
        raise DataError(f"{cache}: cannot keep tokenised data ({error.strerror or error}); set data.cache") from None
    return Dataset(folder)


def _build(
    folder: Path,
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    settings: Settings,
    report: Callable[[str], None],
) -> None:
    building = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(building, ignore_errors=True)  # what a killed build left behind; the lock is ours
    building.mkdir()
    token_type = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    bad_rows = BadRows(settings.on_bad_row)
    try:
        rows = _documents(sources, tokenizer, settings, bad_rows)
        lengths, counts = _write_documents(building, rows, token_type, report)
        bad_rows.stop_if_any()
        if not counts["rows"]:
            raise DataError(_nothing_left(sources, bad_rows))
        packs = _write_packs(building, lengths, settings)
        tokens = int(lengths.sum())
        manifest = {
            "code_version": CODE_VERSION,
            **asdict(settings),
            "pad_id": tokenizer.pad_id,
            "token_type": np.dtype(token_type).name,
            **counts,
            "documents": len(lengths),
            "packs": packs,
            "tokens": tokens,
            "fill": tokens / (packs * settings.sequence_tokens),
            "dropped": dict(bad_rows.counts),
            "sources": [source.path for source in sources],
            "sha256": _sha256_of_files(sorted(building.iterdir())),
        }
        with (building / "manifest.json").open("wb") as file:
            file.write(json.dumps(manifest, indent=2).encode() + b"\n")
            _flush(file)
        building.rename(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _write_documents(
    building: Path, rows: Iterable[list[Document]], token_type: type[np.unsignedinteger], report: Callable[[str], None]
) -> tuple[NDArray[np.int64], dict[str, int]]:
    """Writes the tokens and the mask; the length of every document, and what was counted on the way."""
    counts = {"rows": 0, "supervised_tokens": 0, "split_rows": 0}
    lengths = array("q")
    with (building / "tokens.bin").open("wb") as tokens, (building / "trained.bin").open("wb") as trained:
        for documents in rows:
            counts["rows"] += 1
            counts["split_rows"] += len(documents) > 1
            if counts["rows"] % REPORT_EVERY_ROWS == 0:
                report(f"tokenised {counts['rows']:,} rows")
            for document in documents:
                tokens.write(document.ids.astype(token_type).tobytes())
                trained.write(document.trained.tobytes())
                lengths.append(len(document.ids))
                counts["supervised_tokens"] += supervised_tokens(document)
        _flush(tokens)
        _flush(trained)
    return np.array(lengths, np.int64), counts


def _write_packs(building: Path, lengths: NDArray[np.int64], settings: Settings) -> int:
    """Writes where documents begin and which documents each pack holds; the number of packs."""
    if settings.packing == "packed":
        packs = best_fit(lengths, settings.sequence_tokens)
    else:
        packs = [[index] for index in range(len(lengths))]
    _save(building / "offsets.npy", np.cumsum([0, *lengths]))
    _save(building / "pack_documents.npy", np.fromiter(chain.from_iterable(packs), np.int64, len(lengths)))
    _save(building / "pack_offsets.npy", np.cumsum([0, *map(len, packs)]))
    return len(packs)


def _documents(
    sources: Sequence[Source], tokenizer: Tokenizer, settings: Settings, bad_rows: BadRows
) -> Iterator[list[Document]]:
    """The documents that each usable row becomes, tokenised in groups of rows."""
    template: ChatTemplate | None = None
    for group in _groups(read_contents(sources, bad_rows)):
        if template is None and any(isinstance(content, Conversation) for _, content in group):
            template = ChatTemplate(tokenizer)
        rendered = []
        for (place, content), pieces in zip(
            group, pieces_of([row[1] for row in group], tokenizer, template), strict=True
        ):
            if isinstance(pieces, RowError):
                bad_rows.add(pieces.at(place))
            else:
                rendered.append((place, content, pieces))
        if bad_rows.stopping:
            continue
        for (place, content, _), document in zip(
            rendered, encode([row[2] for row in rendered], tokenizer), strict=True
        ):
            try:
                documents = _fit(content, document, settings)
            except RowError as error:
                stops = settings.over_long == "stop" if error.reason == OVER_LONG else None
                bad_rows.add(error.at(place), stops=stops)
            else:
                yield documents


def _groups(rows: Iterable[tuple[str, Content]]) -> Iterator[list[tuple[str, Content]]]:
    """Rows that are rendered and tokenised together; a long one is by itself."""
    group: list[tuple[str, Content]] = []
    characters = 0
    for row in rows:
        size = size_of(row[1])
        if group and (len(group) == ROWS_AT_ONCE or characters + size > CHARACTERS_AT_ONCE):
            yield group
            group, characters = [], 0
        group.append(row)
        characters += size
    if group:
        yield group


def _fit(content: Content, document: Document, settings: Settings) -> list[Document]:
    """The documents of at most `sequence_tokens` that a row becomes.

    Raises:
        RowError: it is too long and may not be cut, or nothing in it is trained.
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


def _content_key(sources: Sequence[Source], tokenizer: Tokenizer, settings: Settings) -> str:
    """A hash of everything that decides the tokens. Reads every byte of the sources; their folders do not count."""
    files = [[source.format, [[p.name, _sha256_of_files([p])] for p in source_files(source)]] for source in sources]
    identity = [CODE_VERSION, files, tokenizer.fingerprint, asdict(settings)]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def _sha256_of_files(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        try:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    return digest.hexdigest()


def _save(path: Path, values: NDArray[np.int64]) -> None:
    with path.open("wb") as file:
        np.save(file, values)
        _flush(file)


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
