"""Asynchronous writing of checkpoints: `ROOT/step-N/`, whole or absent.

The trainer passes copies in host memory and continues; one thread of each rank writes. Every rank writes its tensors
to one file of `ROOT/step-N.TOKEN.tmp`, then that file's size and hash. Rank 0 waits for the parts of all ranks, writes
the manifest, flushes it to the disk and renames the folder last. The threads synchronise through the file system only:
a collective could interleave with those of the step. A run killed at any moment leaves the earlier checkpoints and at
most one temporary folder, which the next write removes. The token in its name separates ranks of a killed run that are
still writing from the next run.
"""

import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from finetune.checkpoint.finite import all_finite
from finetune.checkpoint.folder import sync, write_json
from finetune.checkpoint.layout import CheckpointError
from finetune.checkpoint.manifest import MANIFEST, STEP, hash_of_values, step_of
from finetune.checkpoint.part_file import write_part
from finetune.checkpoint.shards import listed, read_header

PART = re.compile(r"part-\d+\.(safetensors|json)")
LEFTOVER = re.compile(r"step-\d+\.(\w+\.)?tmp")

SECONDS_BETWEEN_LOOKS = 0.02  # polling interval for files of other ranks
SECONDS_TO_APPEAR = 120  # until rank 0's folder is visible on another node; a network disk may delay it
SECONDS_FOR_OTHERS = 5  # at exit: time to finish a checkpoint that only waits for parts of other ranks


@dataclass(frozen=True)
class Written:
    """A whole checkpoint that was written."""

    step: int
    folder: Path
    seconds: float  # from `begin` to the rename
    not_deleted: str | None = None  # why an older checkpoint could not be deleted


class Writer:
    """Writes one rank's part of checkpoints, one checkpoint at a time."""

    def __init__(
        self,
        root: Path,
        *,
        rank: int,
        ranks: int,
        token: str,
        keep: int,
        progress: Callable[[], None] = lambda: None,
    ):
        """Write nothing yet.

        Args:
            token: identifies this start of the run; the same on all ranks.
            keep: number of checkpoints to keep, the newest included; at least 1.
            progress: called, in the thread, after each piece that is written.
        """
        assert keep >= 1, "the checkpoint just written cannot be deleted"
        self._root, self._rank, self._ranks, self._token, self._keep = root, rank, ranks, token, keep
        self._progress = progress
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._job: Future[Written | None] | None = None
        self._abandoned = threading.Event()

    @property
    def busy(self) -> bool:
        """Whether this rank's thread is still writing; on rank 0, until the checkpoint is whole."""
        return self._job is not None and not self._job.done()

    @property
    def failed(self) -> bool:
        """Whether the last write failed on this rank; `finish` raises the error."""
        return self._job is not None and self._job.done() and self._job.exception() is not None

    def begin(
        self, step: int, tensors: dict[str, Tensor], state: Mapping[str, Any], *, spare: Collection[int] = ()
    ) -> None:
        """Start writing `ROOT/step-STEP` in the background, on every rank; a checkpoint of the same step is replaced.

        Args:
            tensors: this rank's tensors, in host memory; they must not be modified. Names are unique over all ranks.
            state: JSON values; rank 0's are stored.
            spare: steps whose checkpoints are not deleted, however old.
        """
        assert not self.busy, "one checkpoint at a time"
        described = json.dumps(state) if self._rank == 0 else ""
        self._job = self._thread.submit(self._write, step, tensors, described, frozenset(spare))

    def wait(self, seconds: float | None = None) -> None:
        """Wait for this rank's thread, at most `seconds`; None: without limit."""
        if self._job is not None:
            wait([self._job], seconds)

    def finish(self) -> Written | None:
        """The result of the last write, returned once; None while it is running, and on all ranks but 0.

        Raises:
            CheckpointError: the disk refused, a tensor is not finite, or a rank's part did not arrive.
        """
        if self._job is None or not self._job.done():
            return None
        job, self._job = self._job, None
        return job.result()

    def abandon(self) -> None:
        """Stop waiting for other ranks; the checkpoint being written can no longer become whole."""
        self._abandoned.set()

    def close(self) -> None:
        """Finish this rank's part and end the thread; other ranks are awaited for `SECONDS_FOR_OTHERS` only."""
        if not self._abandoned.is_set():
            self.wait(SECONDS_FOR_OTHERS)
        self.abandon()
        self._thread.shutdown()

    def _write(self, step: int, tensors: dict[str, Tensor], described: str, spare: Collection[int]) -> Written | None:
        began = time.perf_counter()
        final, partial = self._root / f"step-{step}", self._root / f"step-{step}.{self._token}.tmp"
        try:
            if self._rank == 0:
                _clear(self._root)
                partial.mkdir(parents=True)
            else:
                self._wait_for_folder(partial)
            _write_part(partial, self._rank, tensors, self._progress)
            if self._rank != 0:
                return None
            self._wait_for_parts(partial)
            _commit(partial, final, step, self._ranks, described)
            not_deleted = _prune(self._root, step, self._keep, spare)
        except CheckpointError:
            self._drop(partial)
            raise
        except (OSError, SafetensorError) as error:
            self._drop(partial)
            raise CheckpointError(
                f"{final}: rank {self._rank} could not write it ({error}); {_before(self._root, step)}"
            ) from error
        return Written(step, final, time.perf_counter() - began, not_deleted)

    def _drop(self, partial: Path) -> None:
        """Remove a failed checkpoint on rank 0, which ends last; a full disk needs the space."""
        if self._rank == 0:
            shutil.rmtree(partial, ignore_errors=True)

    def _wait_for_folder(self, partial: Path) -> None:
        end = time.monotonic() + SECONDS_TO_APPEAR
        while not partial.is_dir():
            if time.monotonic() > end or self._abandoned.is_set():
                raise CheckpointError(
                    f"{partial}: rank {self._rank} does not see it; output.dir must be on a disk all ranks share"
                )
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def _wait_for_parts(self, partial: Path) -> None:
        awaited = {rank: _description(partial, rank) for rank in range(self._ranks)}
        while awaited := {rank: path for rank, path in awaited.items() if not path.exists()}:
            if self._abandoned.is_set():
                raise CheckpointError(f"{partial}: not finished, the part of rank {min(awaited)} did not arrive")
            time.sleep(SECONDS_BETWEEN_LOOKS)


def _before(root: Path, step: int) -> str:
    """A clause on what a run can resume from after the checkpoint of `step` failed."""
    whole = [path for path in root.glob("step-*") if STEP.fullmatch(path.name) and (path / MANIFEST).exists()]
    older = [path for path in whole if step_of(path) < step]
    return "the checkpoints before it were not touched" if older else "there is no checkpoint before it"


def _write_part(partial: Path, rank: int, tensors: dict[str, Tensor], progress: Callable[[], None]) -> None:
    broken = [name for name, tensor in tensors.items() if not all_finite(tensor)]
    if broken:
        raise CheckpointError(f"{partial}: not written, not finite on rank {rank}: {listed(broken)}")
    path = partial / f"part-{rank:05d}.safetensors"
    size, sha256 = write_part(path, tensors, progress)
    part = {"file": path.name, "bytes": size, "sha256": sha256, "tensors": len(tensors)}
    # The rename must come last: as soon as rank 0 sees the last description, it writes the manifest and renames the
    # folder.
    described = _description(partial, rank)
    beside = described.with_name(f"{described.name}.new")
    beside.write_text(json.dumps(part, indent=2) + "\n", encoding="utf-8")
    sync(beside)
    os.replace(beside, described)


def _description(partial: Path, rank: int) -> Path:
    return partial / f"part-{rank:05d}.json"


def _commit(partial: Path, final: Path, step: int, ranks: int, described: str) -> None:
    parts = []
    owners: dict[str, str] = {}
    for rank in range(ranks):
        part = json.loads(_description(partial, rank).read_text(encoding="utf-8"))
        names = read_header(partial / part["file"]).keys()
        twice = [f"{name} (also in {owners[name]})" for name in names if name in owners]
        assert not twice, f"{part['file']}: holds tensors of another rank: {listed(twice)}"
        owners |= dict.fromkeys(names, part["file"])
        parts.append(part)
    manifest = {"step": step, "ranks": ranks, "parts": parts, "state": json.loads(described)}
    write_json(partial / MANIFEST, {**manifest, "sha256": hash_of_values(manifest)})
    sync(partial)
    if final.exists():
        _delete(final)
    os.rename(partial, final)
    sync(final.parent)


def _prune(root: Path, step: int, keep: int, spare: Collection[int]) -> str | None:
    """Delete surplus checkpoints; returns why one could not be deleted, which is not an error of the new one."""
    kept: list[str] = []
    try:
        found = {step_of(path): path for path in root.iterdir() if STEP.fullmatch(path.name)}
        older = sorted(number for number in found if number < step)
        for number in older[: max(0, len(older) + 1 - keep)]:
            if number in spare:
                continue
            if others := _others(found[number]):
                kept.append(f"{found[number].name} holds {listed(others)}, which no run wrote")
            else:
                _delete(found[number])
    except OSError as error:
        kept.append(str(error))
    return "; ".join(kept) or None


def _others(folder: Path) -> list[str]:
    """Names in a checkpoint folder that no run wrote."""
    return sorted(path.name for path in folder.iterdir() if path.name != MANIFEST and not PART.fullmatch(path.name))


def _delete(folder: Path) -> None:
    # Renamed first, so that a half-deleted folder is not taken for a checkpoint.
    doomed = folder.with_name(folder.name + ".old.tmp")
    os.rename(folder, doomed)
    shutil.rmtree(doomed)


def _clear(root: Path) -> None:
    for path in root.glob("step-*.tmp"):
        if LEFTOVER.fullmatch(path.name):  # a folder that a rank of a killed run still writes to is removed next time
            shutil.rmtree(path, ignore_errors=True)
