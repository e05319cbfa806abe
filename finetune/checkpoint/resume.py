"""Finding and opening checkpoints of a run: the newest whole one, a named one, and the tensors in it.

Tensors are looked up by name over the files of all ranks, so a run may resume with another number of ranks. Names are
`PARAMETER::KIND`, for routed experts `PARAMETER::KIND::EXPERT`. `writer.py` describes how checkpoints are written.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.checkpoint.layout import CheckpointError
from finetune.checkpoint.manifest import MANIFEST, STEP, read_manifest, step_of
from finetune.checkpoint.part_file import hash_of
from finetune.checkpoint.shards import Wanted, listed, read_header, read_into
from finetune.checkpoint.writer import LEFTOVER
from monitoring.files import MonitoringError
from monitoring.metrics import read_metrics

ADVICE = "the same command again continues from the newest checkpoint that is whole"


class TensorStore(Mapping[str, Tensor]):
    """The tensors of a checkpoint by name, over the files of all ranks; each is read on access.

    Files are read, not mapped: truncation of a mapped file kills the process with SIGBUS.
    """

    def __init__(self, folder: Path, files: list[str]):
        self._folder = folder
        self._stored = {
            name: stored for file in files for name, stored in read_header(folder / file, advice=ADVICE).items()
        }

    def read(self, name: str) -> Tensor:
        """The tensor of this name.

        Raises:
            CheckpointError: no such tensor, or its file cannot be read.
        """
        if name not in self._stored:
            raise CheckpointError(
                f"{self._folder}: holds no {name}; it comes from a run that trained other parameters, so give this run "
                "another name or the recipe of that one"
            )
        return self[name]

    def __getitem__(self, name: str) -> Tensor:
        stored = self._stored[name]
        values = torch.empty(stored.shape, dtype=stored.torch_dtype)
        read_into(self._folder / stored.file, [Wanted(stored.start, stored.torch_dtype, values)], advice=ADVICE)
        return values

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def newest_checkpoint(root: str | Path, progress: Callable[[], None] = lambda: None) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint (None: there is none), and one sentence for each newer one that was rejected.

    Reads and hashes every byte: call it on one rank and broadcast the result.

    Args:
        progress: called after each piece that is hashed.

    Raises:
        CheckpointError: the folder of checkpoints cannot be read.
    """
    root = Path(root)
    told = []
    try:
        if not root.is_dir():
            return None, []
        folders = sorted(root.iterdir(), key=step_of, reverse=True)
    except OSError as error:
        raise CheckpointError(f"{root}: cannot be read ({error}); check the folder and its disk") from error
    for folder in folders:
        if LEFTOVER.fullmatch(folder.name):
            told.append(f"{folder}: passed over, the run stopped while it was being written or deleted")
        elif STEP.fullmatch(folder.name) and folder.is_dir():
            fault = _fault(folder, progress)
            if fault is None:
                return folder, told
            told.append(f"{folder}: passed over, {fault}")
    return None, told


def newest_name(root: Path) -> str | None:
    """The folder of the newest checkpoint that has a manifest; hashes are not checked. For messages, not to resume."""
    whole = [folder for folder in root.glob("step-*") if STEP.fullmatch(folder.name) and (folder / MANIFEST).exists()]
    return str(max(whole, key=step_of)) if whole else None


def check_nothing_lost(root: Path) -> None:
    """Check that a run without a whole checkpoint never had one, so that it may start at its first step.

    Raises:
        CheckpointError: all checkpoints are damaged, or metrics.jsonl records one that no longer exists.
    """
    anew = "put one back from a copy, or give this run another name (--set name=...) to begin at the first step"
    if root.is_dir() and (damaged := _folders(root)):
        raise CheckpointError(
            f"{root}: none of its checkpoints is whole ({listed([path.name for path in damaged])}); {anew}"
        )
    metrics = root.parent / "metrics.jsonl"
    saved = [line for line in read_metrics(metrics) if line["kind"] == "checkpoint"] if metrics.exists() else []
    if saved:
        raise CheckpointError(f"{root}: the checkpoint of step {saved[-1]['step']} is gone; {anew}")


def chosen_checkpoint(
    root: str | Path,
    which: str,
    say: Callable[[str], None],
    finished: int | None = None,
    progress: Callable[[], None] = lambda: None,
) -> Path:
    """The whole checkpoint that a user named: `newest`, `best` (the lowest held-out loss) or `step-N`.

    An older checkpoint must be named explicitly: `newest` and `best` are errors if the run's newest checkpoint is lost.

    Args:
        say: called with each sentence to report to the user.
        finished: the last step of a run that ended.
        progress: called after each piece that is hashed.

    Raises:
        CheckpointError: no such checkpoint, or the named one is not whole.
    """
    root = Path(root)
    if which in ("newest", "best"):
        newest, passed_over = newest_checkpoint(root, progress)
        for sentence in passed_over:
            say(sentence)
        if newest is None:
            check_nothing_lost(root)
            raise CheckpointError(f"{root.parent}: holds no whole checkpoint to export; train it first")
        last = max(finished or 0, _last_recorded(root), max(map(step_of, _folders(root))))
        if step_of(newest) < last:
            lost = root / f"step-{last}"
            # Where a complete run's files have their sizes, the training command does not read what is in them.
            state, first = ("damaged", "once its folder is moved away, ") if lost.exists() else ("gone", "")
            raise CheckpointError(
                f"{lost}: the newest checkpoint of the run is {state}; {first}the training command makes it again from"
                f" {newest.name}; an older one is used only by its name; {_there_are(root)}"
            )
        if which == "newest":
            return newest
        which = _best(newest, root, say)
    chosen = root / which
    if not STEP.fullmatch(which) or not chosen.is_dir():
        raise CheckpointError(f"{chosen}: no such checkpoint; {_there_are(root)}")
    fault = _fault(chosen, progress)
    if fault is not None:
        raise CheckpointError(f"{chosen}: {fault}")
    return chosen


def _best(newest: Path, root: Path, say: Callable[[str], None]) -> str:
    """Name of the checkpoint with the lowest held-out loss, as recorded in the newest one."""
    best = read_manifest(newest)["state"].get("best")
    if best is None:
        raise CheckpointError(
            f"{root.parent}: has no best checkpoint, since no held-out loss was measured; that needs data.eval in its"
            f" recipe; {_there_are(root)}"
        )
    name = f"step-{best['step']}"
    if best["step"] == 0:
        raise CheckpointError(
            f"{root.parent}: has no best checkpoint, since training never improved on the base (the held-out loss of"
            f" {best['loss']:.4f} before the first step is the lowest); use the base as it is, or name newest or"
            f" step-N; {_there_are(root)}"
        )
    if not (root / name).is_dir():
        raise CheckpointError(
            f"{root / name}: the checkpoint with the lowest held-out loss ({best['loss']:.4f}) is gone; only"
            f" checkpoint.keep_best: true keeps it while newer ones are written; {_there_are(root)}"
        )
    if "measured" in best:
        say(
            f"{name}: the held-out loss was measured at step {best['measured']}, while one before was still being saved"
        )
    return name


def _last_recorded(root: Path) -> int:
    """Step of the last checkpoint recorded in metrics.jsonl; 0 if there is none or the file cannot be read."""
    try:
        lines = read_metrics(root.parent / "metrics.jsonl")
        return max((line["step"] for line in lines if line["kind"] == "checkpoint"), default=0)
    except MonitoringError:
        return 0


def _folders(root: Path) -> list[Path]:
    """Folders named `step-N`, oldest first."""
    return sorted((path for path in root.iterdir() if STEP.fullmatch(path.name)), key=step_of)


def _there_are(root: Path) -> str:
    names = [path.name for path in _folders(root)] if root.is_dir() else []
    return f"there are {', '.join(names)}" if names else "there is none"


def open_state(folder: str | Path) -> tuple[dict[str, Any], TensorStore]:
    """The training state (with its `step`) and the tensors of a checkpoint that `newest_checkpoint` found whole.

    Raises:
        CheckpointError: the manifest or a file is missing, modified or truncated.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    store = TensorStore(folder, [part["file"] for part in manifest["parts"]])
    return {**manifest["state"], "step": manifest["step"]}, store


def _fault(folder: Path, progress: Callable[[], None] = lambda: None) -> str | None:
    """What is wrong with a checkpoint, or None if every file exists and has its recorded hash."""
    try:
        manifest = read_manifest(folder)
        if manifest["step"] != step_of(folder):
            return f"its manifest is of step {manifest['step']}; rename the folder to step-{manifest['step']}"
        return _fault_of_parts(folder, manifest["parts"], progress)
    except CheckpointError as error:
        return str(error)
    except OSError as error:  # an I/O error while a file is hashed
        return f"cannot be read ({error})"


def _fault_of_parts(folder: Path, parts: list[dict[str, Any]], progress: Callable[[], None]) -> str | None:
    for part in parts:
        path = folder / part["file"]
        if not path.exists():
            return f"{path.name} is missing"
        if path.stat().st_size != part["bytes"]:
            return f"{path.name} is {path.stat().st_size} bytes instead of {part['bytes']}"
        if (found := hash_of(path, progress)) != part["sha256"]:
            return (
                f"{path.name} was changed after it was written (its sha256 is {found[:12]}..., the manifest says"
                f" {part['sha256'][:12]}...)"
            )
    return None
