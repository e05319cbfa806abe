"""After a kill and a restart every reader sees every step once: metrics.jsonl, the counts, and the W&B run."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
from PIL import Image
from wandb.proto.wandb_internal_pb2 import Record

from monitoring import supersede
from monitoring.charts import heatmap
from monitoring.metrics import MetricsFile, read_metrics
from monitoring.routing import RoutingSnapshot, read_snapshot, routing_measures, snapshot_path
from monitoring.sinks import Sinks, open_sinks
from monitoring.supersede import supersede_lines
from monitoring.wandb_rows import read_log, take_back_rows, write_log
from tests.test_wandb import history, parse


def snapshot(step: int, factor: int = 1) -> RoutingSnapshot:
    counts = np.random.default_rng(step).integers(0, 100, (2, 512)) * factor
    return RoutingSnapshot(step, (0, 1), counts, 40)


def sinks_of(run: Path, after: int, wandb: str = "off") -> Sinks:
    return open_sinks(run, name="n", steps=9, wandb=wandb, project="p", config={}, after=after)  # type: ignore[arg-type]


def take(sinks: Sinks, steps: range, loss: float) -> None:
    """Records of these steps; the counts are larger where the loss is."""
    for step in steps:
        taken = snapshot(step, int(loss))
        sinks.routing(taken, routing_measures(taken))
        sinks.write({"kind": "train", "step": step, "loss": loss})
        if step % 2 == 0:
            sinks.write({"kind": "checkpoint", "step": step, "path": f"checkpoints/step-{step}"})


def killed_and_continued(run: Path, wandb: str = "off") -> None:
    """Steps 1 to 5, killed; continued after 4, killed again at 7, whose checkpoint of 6 is damaged: after 4 again."""
    for after, last, loss in ((0, 5, 1.0), (4, 7, 2.0), (4, 8, 3.0)):
        sinks = sinks_of(run, after, wandb)
        sinks.write({"kind": "start", "step": after})
        take(sinks, range(after + 1, last + 1), loss)
        sinks.close()


def numbers(path: Path) -> list[tuple[str, int, float | None]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [(line["kind"], line["step"], line.get("loss")) for line in lines if line["kind"] in ("start", "train")]


TRUTH = [("start", 0, None), *(("train", step, 1.0) for step in range(1, 5)), ("start", 4, None)]
TRUTH += [("start", 4, None), *(("train", step, 3.0) for step in range(5, 9))]


def test_a_naive_reader_sees_every_step_once_and_no_line_is_lost(tmp_path: Path) -> None:
    killed_and_continued(tmp_path)
    assert numbers(tmp_path / "metrics.jsonl") == TRUTH
    frame = pandas.read_json(tmp_path / "metrics.jsonl", lines=True)
    trained = frame[frame["kind"] == "train"]
    assert trained["step"].tolist() == list(range(1, 9))
    assert trained["loss"].tolist() == [1, 1, 1, 1, 3, 3, 3, 3]
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    aside = numbers(tmp_path / "metrics.superseded.jsonl")
    assert aside == [("train", 5, 1.0), *(("train", step, 2.0) for step in (5, 6, 7))]


def test_the_counts_are_those_of_the_steps_that_count(tmp_path: Path) -> None:
    killed_and_continued(tmp_path)
    for step in range(1, 9):
        found = read_snapshot(snapshot_path(tmp_path, step))
        assert np.array_equal(found.counts, snapshot(step, 1 if step < 5 else 3).counts), step
    aside = {path.name: read_snapshot(path).counts.max() for path in (tmp_path / "routing/superseded").iterdir()}
    assert sorted(aside) == [f"step-0000000{name}.npz" for name in ("5.2", "5", "6", "7")]
    assert aside["step-00000005.npz"] * 2 == aside["step-00000005.2.npz"]


def picture(run: Path) -> Any:
    return np.asarray(Image.open(run / "routing/heatmap.png"))


def test_the_picture_is_not_that_of_a_step_that_is_taken_back(tmp_path: Path) -> None:
    sinks = sinks_of(tmp_path, 0)
    take(sinks, range(1, 6), 1.0)
    sinks.close()
    assert np.array_equal(picture(tmp_path), np.asarray(heatmap(snapshot(5))))
    sinks_of(tmp_path, 4).close()
    assert np.array_equal(picture(tmp_path), np.asarray(heatmap(snapshot(4))))
    sinks_of(tmp_path, 0).close()
    assert not (tmp_path / "routing/heatmap.png").exists()


@pytest.mark.parametrize("contents", ["nothing", "step 4 is the last", "orderly stop"])
def test_what_needs_no_change_is_left_as_it_is(tmp_path: Path, contents: str, caplog: pytest.LogCaptureFixture) -> None:
    sinks = sinks_of(tmp_path, 0)
    if contents != "nothing":
        take(sinks, range(1, 5), 1.0)
    if contents == "orderly stop":
        sinks.write({"kind": "action", "step": 4, "message": "SIGTERM: saved and stopped, resumable"})
    sinks.close()
    files = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.rglob("*") if path.is_file()}
    sinks_of(tmp_path, 4).close()
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.rglob("*") if p.is_file()} == files
    assert not caplog.records


def test_a_run_that_begins_anew_takes_everything_back(tmp_path: Path) -> None:
    """Killed before its first checkpoint."""
    for loss in (1.0, 2.0):
        sinks = sinks_of(tmp_path, 0)
        sinks.write({"kind": "start", "step": 0})
        take(sinks, range(1, 3), loss)
        sinks.close()
    assert numbers(tmp_path / "metrics.jsonl") == [("start", 0, None), ("train", 1, 2.0), ("train", 2, 2.0)]
    assert numbers(tmp_path / "metrics.superseded.jsonl") == [("start", 0, None), ("train", 1, 1.0), ("train", 2, 1.0)]


def test_lines_that_belong_to_no_step_or_are_out_of_order_are_judged_by_their_own_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = ['{"kind": "x"}', "not JSON", '{"kind": "train", "step": 5}', '{"kind": "checkpoint", "step": 4}', "[1]"]
    lines += ["[" * 100_000, '{"kind": "train", "step": "7"}', '{"kind": "train", "step": 6, "loss": 1']
    path.write_text("\n".join(lines))  # the last one was torn by the kill
    MetricsFile(path, 4).close()
    assert path.read_text().splitlines() == [lines[0], lines[1], lines[3], lines[4], lines[5], lines[6]]
    assert supersede.aside_of(path).read_text().splitlines() == [lines[2]]


@pytest.mark.parametrize("at", [1, 2])
def test_a_kill_while_lines_are_moved_loses_none_and_the_next_start_completes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"kind": "train", "step": step}) + "\n" for step in range(1, 8)))
    real, calls = supersede.replace_file, []

    def killed(target: Path, contents: bytes) -> None:
        calls.append(target)
        if len(calls) == at:
            raise KeyboardInterrupt
        real(target, contents)

    with monkeypatch.context() as patch:
        patch.setattr(supersede, "replace_file", killed)
        with pytest.raises(KeyboardInterrupt):
            supersede_lines(path, 4)
    assert len(path.read_text().splitlines()) == 7
    assert supersede_lines(path, 4) == 3
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]
    aside = supersede.aside_of(path).read_text().splitlines()
    assert [json.loads(line)["step"] for line in aside] == [5, 6, 7]


# W&B, read back from its own files.


def rows(run: Path) -> list[tuple[int, float]]:
    """Step and loss of every row of every part, in the order in which `wandb sync` sends them."""
    found = []
    for path in sorted((run / "wandb").glob("offline-run-*/*.wandb")):
        found += [(step, row["train/loss"]) for step, row in history(parse(path.read_bytes())).items()]
    return found


@pytest.fixture(scope="module")
def continued(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("continued")
    killed_and_continued(run, wandb="offline")
    return run


def test_the_wandb_run_has_one_row_for_a_step(continued: Path) -> None:
    assert rows(continued) == [*((step, 1.0) for step in range(1, 5)), *((step, 3.0) for step in range(5, 9))]
    aside = [history(parse(path.read_bytes())) for path in sorted((continued / "wandb/superseded").rglob("*.wandb"))]
    assert [list(part) for part in aside] == [[1, 2, 3, 4, 5], [5, 6, 7]]  # as they were


def test_what_is_left_of_a_part_is_what_wandb_wrote(continued: Path) -> None:
    """Every other record is there, byte for byte."""
    for before in sorted((continued / "wandb/superseded").rglob("*.wandb")):
        after = continued / "wandb" / before.relative_to(continued / "wandb/superseded")
        old, new = (list(read_log(path.read_bytes())) for path in (before, after))
        assert [r for r in new if r not in old] == []
        gone = [Record.FromString(r) for r in old if r not in new]
        assert {r.WhichOneof("record_type") for r in gone} == {"history"}
        assert {r.history.step.num for r in gone} <= {5, 6, 7}


def test_a_log_is_written_as_wandb_writes_it(continued: Path) -> None:
    contents = [path.read_bytes() for path in (continued / "wandb/superseded").rglob("*.wandb")]
    assert max(map(len, contents)) > 32768  # so that a record lies in two blocks
    for whole in contents:
        assert write_log(read_log(whole)) == whole


@pytest.mark.parametrize("size", [0, 1, 32748, 32749, 32754, 32755, 32756, 32761, 32762, 70_000])
def test_records_of_every_size_come_back(size: int) -> None:
    records = [b"a" * size, b"b" * 11, b"c" * size]
    assert list(read_log(write_log(records))) == records


def test_a_part_that_a_kill_cut_short_is_read_up_to_there(continued: Path, tmp_path: Path) -> None:
    (part, *_) = sorted((continued / "wandb/superseded").rglob("*.wandb"))
    folder = tmp_path / "wandb" / part.parent.name
    folder.mkdir(parents=True)
    shutil.copyfile(continued / "wandb/run-id", tmp_path / "wandb/run-id")
    (folder / part.name).write_bytes(part.read_bytes()[:-300])
    assert take_back_rows(tmp_path / "wandb", part.stem.removeprefix("run-"), 3) == 3
    assert rows(tmp_path) == [(step, 1.0) for step in range(1, 4)]


def test_rows_that_a_kill_kept_from_wandb_come_from_our_own_lines(tmp_path: Path) -> None:
    sinks = sinks_of(tmp_path, 0, wandb="offline")
    take(sinks, range(1, 4), 1.0)
    sinks.close()
    sinks = sinks_of(tmp_path, 3)  # as if nothing had reached W&B, which is written last
    take(sinks, range(4, 8), 1.0)
    sinks.close()
    sinks = sinks_of(tmp_path, 6, wandb="offline")
    take(sinks, range(7, 9), 2.0)
    sinks.close()
    assert rows(tmp_path) == [*((step, 1.0) for step in range(1, 7)), (7, 2.0), (8, 2.0)]
    (_, part) = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    found = history(parse(part.read_bytes()))
    for step in (4, 5, 6):
        assert found[step]["moe/layer_01/expert_load", "values"] == snapshot(step).counts[1].tolist()


@pytest.mark.parametrize("damage", ["no header", "a byte", "sent"])
def test_a_part_that_cannot_be_read_or_was_sent_is_left_as_it_is(
    continued: Path, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    (part, *_) = sorted((continued / "wandb/superseded").rglob("*.wandb"))
    folder = tmp_path / "wandb" / part.parent.name
    folder.mkdir(parents=True)
    shutil.copyfile(continued / "wandb/run-id", tmp_path / "wandb/run-id")
    contents = bytearray(part.read_bytes())
    if damage == "sent":
        (folder / part.name).with_suffix(".wandb.synced").touch()
    else:
        contents[0 if damage == "no header" else 5000] ^= 1
    (folder / part.name).write_bytes(contents)
    sinks_of(tmp_path, 3, wandb="offline").close()
    assert (folder / part.name).read_bytes() == contents
    assert ("so W&B may show steps after 3 twice" in caplog.text) == (damage != "sent")
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 2  # and W&B is on
