"""A real run whose preparation, evaluation and saving each take longer than the ranks may show no progress."""

from pathlib import Path
from typing import Any

import pytest

from finetune.run.folder import finished_step
from tests.commands import ROOT, TINY, UNWATCHED, launcher, place, records, run

# train.py whose ranks may stand still for 12 seconds, and where on rank 0 much takes longer than that, in small parts.
# Rank 1 waits for it in a collective.
SLOW = """
import os, runpy, sys, time
sys.path[0] = {root!r}
from data import build
from finetune.commands import train as launch
from finetune.checkpoint import part_file
from finetune.model.model import Block
from finetune.run.watchdog import Watch

launch.Watch = lambda folder, rank, stall_seconds: Watch(folder, rank, stall_seconds=12, grace_seconds=2)
encode, forward = build.encode, Block.forward

def slow_encode(*arguments):
    time.sleep(1)
    return encode(*arguments)

def slow_forward(self, *arguments, **named):
    if not self.training:
        time.sleep(2)
    return forward(self, *arguments, **named)

if os.environ["RANK"] == "0":
    build.ROWS_AT_ONCE, build.encode = 4, slow_encode
    Block.forward = slow_forward
    part_file.PIECE_BYTES, part_file.PIECES_BETWEEN_FLUSHES = 1 << 14, 1
    os.fdatasync = lambda descriptor: time.sleep(0.4)
runpy.run_path({script!r}, run_name="__main__")
"""


@pytest.mark.slow
def test_long_preparation_evaluation_and_saving_are_no_stall(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    here = place(tmp_path_factory.getbasetemp())
    changes: dict[str, Any] = {**UNWATCHED, "train__steps": 1, "data__cache": tmp_path / "cache"}
    changes |= {"data__eval": f"[{{path: {here.folder}/heldout.jsonl}}]", "checkpoint__every_steps": 1}
    script = tmp_path / "slow.py"
    script.write_text(SLOW.format(root=str(ROOT), script=str(ROOT / "finetune/train.py")))
    done = run(*launcher(2)[:-1], str(script), *TINY, *here.settings(name="long-work", **changes), cwd=here.folder)
    folder = here.run_folder("long-work")
    assert done.code == 0, done.out + done.err
    assert finished_step(folder) == 1
    assert not (folder / "crash").exists()
    started, ended = (records(folder, kind)[0]["time"] for kind in ("start", "end"))
    evaluated = [record["time"] for record in records(folder, "eval")]
    assert evaluated[0] - started > 13
    assert started - done.started > 24
    assert records(folder, "checkpoint")[0]["seconds"] > 13, records(folder, "checkpoint")
    assert ended - evaluated[-1] > 13
