"""Writing training state while training goes on: `ROOT/step-N/`, whole or absent.

The trainer hands over copies in host memory and takes its next step; a thread of each rank does the rest. Every rank
writes the tensors it answers for to one file of `ROOT/step-N.TOKEN.tmp`, then that file's size and hash. Rank 0 waits
until the parts of all ranks are there, and its last act is a rename, after the manifest is on the disk. The threads
meet on the disk alone: a collective beside those of the step would mix with them. A run killed at any moment leaves the
checkpoints before and at most one such folder, which the next write removes; its token keeps a rank of the killed run
that is still writing out of the next one's way.
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

SECONDS_BETWEEN_LOOKS = 0.02  # at the disk, for what another rank writes
SECONDS_TO_APPEAR = 120  # of rank 0's folder on another node; a network disk may show it late
SECONDS_FOR_OTHERS = 5  # when this rank must end: to write what only needs the others' parts


@dataclass(frozen=True)
class Written:
    """A checkpoint that is whole."""

    step: int
    folder: Path
    seconds: float  # from the hand-over to the rename
    not_deleted: str | None = None  # why an older one is still there that should not be


class Writer:
    """What one rank writes, one checkpoint at a time."""

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
        """Nothing is written yet.

        Args:
            token: the same on all ranks of this start of the run, and of no other start.
            keep: how many checkpoints stay, the newest included; at least 1.
            progress: called, by the thread, after each piece that is written.
        """
        assert keep >= 1, "the checkpoint just written cannot be deleted"
        self._root, self._rank, self._ranks, self._token, self._keep = root, rank, ranks, token, keep
        self._progress = progress
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._job: Future[Written | None] | None = None
        self._abandoned = threading.Event()

    @property
    def busy(self) -> bool:
        """Whether this rank's thread is still at work; rank 0's is until the checkpoint is whole."""
        return self._job is not None and not self._job.done()

    @property
    def failed(self) -> bool:
        """Whether what was begun last came to nothing on this rank; `finish` says why."""
        return self._job is not None and self._job.done() and self._job.exception() is not None

    def begin(
        self, step: int, tensors: dict[str, Tensor], state: Mapping[str, Any], *, spare: Collection[int] = ()
    ) -> None:
        """Start to write `ROOT/step-STEP` and return; every rank calls it. A checkpoint of the same step is replaced.

        Args:
            tensors: what this rank answers for, in host memory; nobody may change them. No name comes from two ranks.
            state: anything JSON can hold; rank 0's is kept.
            spare: steps whose checkpoints are not deleted, however old.
        """
        assert not self.busy, "one checkpoint at a time"
        described = json.dumps(state) if self._rank == 0 else ""
        self._job = self._thread.submit(self._write, step, tensors, described, frozenset(spare))

    def wait(self, seconds: float | None = None) -> None:
        """Wait for this rank's thread, at most so long."""
        if self._job is not None:
            wait([self._job], seconds)

    def finish(self) -> Written | None:
        """What became of the last write, once; None before it has ended, and on all ranks but 0.

        Raises:
            CheckpointError: the disk refused, a tensor is not finite, or a rank's part did not arrive.
        """
        if self._job is None or not self._job.done():
            return None
        job, self._job = self._job, None
        return job.result()

    def abandon(self) -> None:
        """Wait no longer for what other ranks write: it can no longer become whole."""
        self._abandoned.set()

    def close(self) -> None:
        """End the thread: what it writes is finished, but for parts of other ranks it waits only seconds."""
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
        """Remove what can no longer become a checkpoint; rank 0 ends last, and a full disk needs the space."""
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
    """What a run can still go on from, when the checkpoint of this step came to nothing."""
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
    # Renamed into place, and nothing after that: as soon as rank 0 sees the last one, it waits for the disk, and this
    # folder has another name.
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
    """Delete older checkpoints; say why one could not be, since the new one is whole all the same."""
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
    """Names in a checkpoint that are not of one."""
    return sorted(path.name for path in folder.iterdir() if path.name != MANIFEST and not PART.fullmatch(path.name))


def _delete(folder: Path) -> None:
    # Renamed first, so that one deleted halfway is not taken for a checkpoint.
    doomed = folder.with_name(folder.name + ".old.tmp")
    os.rename(folder, doomed)
    shutil.rmtree(doomed)


def _clear(root: Path) -> None:
    for path in root.glob("step-*.tmp"):
        if LEFTOVER.fullmatch(path.name):  # one that a rank of a killed run still writes into goes the next time
            shutil.rmtree(path, ignore_errors=True)
