import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from wandb.proto import wandb_internal_pb2 as protocol

from monitoring.charts import heatmap
from monitoring.health import Finding
from monitoring.routing import RoutingSnapshot, routing_drift, routing_measures
from monitoring.sinks import Sinks, open_sinks
from monitoring.wandb_sink import Wandb, binned

ROOT = Path(__file__).resolve().parent.parent
LAYERS = (0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 47)  # layer 4 is dense
EXPERTS = 512
STEPS = (10, 20)


def snapshot(step):
    # Counts beyond 32 bits and with zeros: any rounding or rescaling on the way would show.
    counts = np.random.default_rng(step).integers(0, 2**40, (len(LAYERS), EXPERTS))
    counts[:, ::7] = 0
    return RoutingSnapshot(step, LAYERS, counts, int(counts[0].sum()) // 10)


def stored_records(folder):
    """Every record of the one offline run in `folder`, once it is complete."""
    (path,) = folder.glob("run-*.wandb")
    for _ in range(100):  # finishing a run returns a little before its last block is written
        records = list(parse(path.read_bytes()))
        if records and records[-1].WhichOneof("record_type") == "exit":
            return records
        time.sleep(0.1)
    raise AssertionError(f"{path} never got its exit record")


def parse(contents):
    """The protobuf records in a .wandb file: 32 KiB blocks of chunks, each with checksum, length and type."""
    if len(contents) < 7:
        return
    assert struct.unpack("<4sHB", contents[:7])[:2] == (b":W&B", 0xBEE1)
    at, pending = 7, b""
    while at + 7 <= len(contents):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, size, part = struct.unpack("<IHB", contents[at : at + 7])
        if part == 0 or at + 7 + size > len(contents):
            return
        chunk, at = contents[at + 7 : at + 7 + size], at + 7 + size
        if part in (2, 3):  # first, middle
            pending = chunk if part == 2 else pending + chunk
            continue
        record = protocol.Record()
        record.ParseFromString(chunk if part == 1 else pending + chunk)
        yield record


def history(records):
    """Logged values by step: {step: {key or (key, field): value}}."""
    rows = {}
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = {i.key or "\0".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            rows[items["_step"]] = {tuple(k.split("\0")) if "\0" in k else k: v for k, v in items.items()}
    return rows


def of_type(records, kind):
    return [getattr(record, kind) for record in records if record.WhichOneof("record_type") == kind]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A short offline run, read back: (run folder, folder of the W&B run, its records)."""
    run = tmp_path_factory.mktemp("run")
    config = {"optim": {"lr": 1e-4}, "path": run}
    sinks = open_sinks(run, name="tiny", steps=20, wandb="offline", project="nextune", config=config)
    for step in STEPS:
        taken = snapshot(step)
        moved = routing_drift(
            layers=LAYERS,
            base_counts=snapshot(99).counts,
            counts=taken.counts,
            kept=np.linspace(0.1, 0.9, len(LAYERS)),
        )
        sinks.write({"kind": "train", "step": step, "loss": 1 / step, "lr": 1e-4, "z_loss": None, "tokens": 4096})
        sinks.routing(taken, routing_measures(taken), moved if step == 20 else None)
        sinks.write({"kind": "eval", "step": step, "loss": 2 / step})
    for level in ("info", "warn", "stop"):
        sinks.write(Finding(20, level, f"{level}_rule", 3, f"what {level} says").record())
    sinks.write({"kind": "end", "step": 20})
    sinks.close()
    (folder,) = (run / "wandb").glob("offline-run-*")
    return run, folder, stored_records(folder)


@pytest.mark.parametrize("step", STEPS)
def test_the_histograms_hold_exactly_the_counted_numbers(recorded, step):
    row, taken = history(recorded[2])[step], snapshot(step)
    for layer, counts in zip(LAYERS, taken.counts, strict=True):
        key = f"moe/layer_{layer:02d}/expert_load"
        assert row[key, "_type"] == "histogram"
        assert row[key, "values"] == counts.tolist()
        assert row[key, "bins"] == list(range(EXPERTS + 1))
    assert {key[0] for key in row if isinstance(key, tuple) and key[1] == "values"} == {
        f"moe/layer_{layer:02d}/expert_load" for layer in LAYERS
    }


def test_scalars_are_those_of_the_records_on_our_own_step_axis(recorded):
    rows = history(recorded[2])
    assert list(rows) == list(STEPS)
    for step in STEPS:
        row = rows[step]
        assert (row["train/step"], row["train/loss"], row["train/tokens"], row["eval/loss"]) == (
            step,
            1 / step,
            4096,
            2 / step,
        )
        assert "train/z_loss" not in row
        for measure in routing_measures(snapshot(step)):
            for name in ("max_vio", "effective_experts", "max_share", "cv", "dead", "starved"):
                assert row[f"moe/layer_{measure.layer:02d}/{name}"] == pytest.approx(getattr(measure, name))
        worst = max(measure.max_vio for measure in routing_measures(snapshot(step)))
        assert row["routing/highest_max_vio"] == pytest.approx(worst)
    assert "moe/layer_47/drift_kept" not in rows[10]
    assert rows[20]["moe/layer_47/drift_kept"] == pytest.approx(0.9)
    assert rows[20]["moe/layer_00/drift_kept"] == pytest.approx(0.1)
    axes = {metric.glob_name: metric.step_metric for metric in of_type(recorded[2], "metric")}
    assert axes["train/*"] == axes["eval/*"] == axes["moe/*"] == axes["routing/*"] == "train/step"


def test_histograms_are_not_stored_a_second_time_as_summary(recorded):
    keys = {u.key or u.nested_key[0] for s in of_type(recorded[2], "summary") for u in s.update}
    assert {"train/loss", "routing/highest_max_vio"} <= keys
    assert not [key for key in keys if key.startswith("moe/")]


def test_the_heatmap_is_stored_as_an_image(recorded):
    _, folder, records = recorded
    stored = folder / "files" / history(records)[20]["moe/load_heatmap", "path"]
    assert np.array_equal(np.asarray(Image.open(stored)), np.asarray(heatmap(snapshot(20))))


def test_findings_become_alerts_except_information(recorded):
    alerts = of_type(recorded[2], "alert")
    assert [(a.title, a.level, a.text) for a in alerts] == [
        ("warn_rule, layer 3", "WARN", "what warn says"),
        ("stop_rule, layer 3", "ERROR", "what stop says"),
    ]


def test_the_run_carries_name_project_recipe_and_how_it_ended(recorded):
    run, folder, records = recorded
    (described,) = of_type(records, "run")
    config = {item.key: json.loads(item.value_json) for item in described.config.update}
    assert (described.display_name, described.project) == ("tiny", "nextune")
    assert described.run_id == (run / "wandb/run-id").read_text() == folder.name.rpartition("-")[2]
    assert (config["optim"], config["path"]) == ({"lr": 1e-4}, str(run))
    assert of_type(records, "exit")[0].exit_code == 0


def test_a_resumed_run_keeps_its_id_and_its_steps(tmp_path):
    for steps in ((1, 2), (2, 3)):
        sink = Wandb(tmp_path, name="n", mode="offline", project="p", config={})
        for step in steps:
            sink.write({"kind": "train", "step": step, "loss": 1.0})
        sink.close()  # no `end` record: the run did not finish
    parts = [stored_records(folder) for folder in sorted((tmp_path / "wandb").glob("offline-run-*"))]
    assert [list(history(records)) for records in parts] == [[1, 2], [2, 3]]
    ids = [run.run_id for records in parts for run in of_type(records, "run")]
    assert ids == [(tmp_path / "wandb/run-id").read_text()] * 2
    assert [records[-1].exit.exit_code for records in parts] == [1, 1]


@pytest.mark.parametrize(("experts", "width"), [(32, 1), (512, 1), (513, 2), (1024, 2), (1500, 3)])
def test_more_experts_than_bins_share_bins_and_lose_no_row(experts, width):
    counts = np.random.default_rng(0).integers(0, 99, experts)
    values, edges = binned(counts)
    assert len(values) <= 512
    assert len(edges) == len(values) + 1
    assert (edges[0], edges[-1]) == (0, experts)
    assert values.tolist() == [counts[i : i + width].sum() for i in range(0, experts, width)]


def in_a_process_of_its_own(run, mode):
    """Open a sink, log and close, with neither key nor network; returns what the process printed."""
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from monitoring.sinks import open_sinks\n"
        f"sinks = open_sinks(Path(sys.argv[1]), name='n', steps=1, wandb={mode!r}, project='p', config={{}})\n"
        "sinks.write({'kind': 'train', 'step': 1, 'loss': 1.0})\n"
        "sinks.close()\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "NETRC"))}
    environment |= {"HOME": str(run), "PYTHONPATH": str(ROOT), "WANDB_BASE_URL": "http://127.0.0.1:9"}
    command = [sys.executable, "-c", code, str(run)]
    done = subprocess.run(command, env=environment, cwd=run, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout, done.stderr


def test_an_offline_run_prints_nothing_of_its_own(tmp_path):
    out, err = in_a_process_of_its_own(tmp_path, "offline")
    assert out.splitlines() == ["step 1/1 | loss 1.0000"]
    assert err == ""


def test_online_without_a_key_is_recorded_offline_and_says_so(tmp_path):
    _, err = in_a_process_of_its_own(tmp_path, "online")
    (line,) = err.splitlines()
    assert line.startswith("W&B cannot be reached (No API key configured.")
    assert f"wandb sync {tmp_path}/wandb/offline-run-*" in line
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert list(history(stored_records(folder))) == [1]


def test_off_leaves_no_trace(tmp_path):
    open_sinks(tmp_path, name="n", steps=1, wandb="off", project="p", config={}).close()
    assert not (tmp_path / "wandb").exists()


def test_a_broken_run_is_switched_off_and_the_training_goes_on(tmp_path, caplog):
    sink = Wandb(tmp_path, name="n", mode="offline", project="p", config={})
    sink._run.finish()  # as if the W&B process had died
    sinks = Sinks([sink])
    for step in (1, 2):
        sinks.write({"kind": "train", "step": step, "loss": 1.0})
    assert caplog.text.count("W&B is off for the rest of this run") == 1
