import json
import logging
import math
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from monitoring import sinks as sink_module
from monitoring.files import MonitoringError
from monitoring.metrics import MetricsFile, read_metrics
from monitoring.routing import RoutingSnapshot, read_snapshot, routing_measures
from monitoring.sinks import RoutingFiles, Sinks, open_sinks

ROOT = Path(__file__).resolve().parent.parent
SNAPSHOT = RoutingSnapshot(50, (7, 3), np.arange(16).reshape(2, 8), 60)


def train(step, **values):
    return {"kind": "train", "step": step, "loss": 2.0} | values


class Recorder:
    """A sink that keeps what it gets and raises at the calls it is told to."""

    name = "recorder"

    def __init__(self, raises=(), error=OSError):
        self.calls, self.raises, self.error = [], raises, error

    def act(self, call):
        self.calls.append(call)
        if call in self.raises:
            raise self.error("no space left")

    def write(self, record):
        self.act(record["step"])

    def routing(self, snapshot, record):
        self.act("routing")

    def close(self):
        self.act("close")


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_sink_gets_the_same_records(tmp_path):
    recorder = Recorder()
    sinks = Sinks([MetricsFile(tmp_path / "metrics.jsonl"), recorder, RoutingFiles(tmp_path)])
    sinks.write(train(1))
    record = sinks.routing(SNAPSHOT, routing_measures(SNAPSHOT))
    sinks.write(train(2))
    sinks.close()
    assert recorder.calls == [1, "routing", 2, "close"]
    written = lines(tmp_path / "metrics.jsonl")
    assert [line["kind"] for line in written] == ["train", "routing", "train"]
    assert written[1] == json.loads(json.dumps(record))
    assert [layer["layer"] for layer in written[1]["layers"]] == [3, 7]
    assert all(abs(line["time"] - written[0]["time"]) < 60 for line in written)
    assert np.array_equal(read_snapshot(tmp_path / "routing/step-00000050.npz").counts, SNAPSHOT.counts)
    assert (tmp_path / "routing/heatmap.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("raises", "calls"), [((2,), [1, 2, "close"]), (("routing",), [1, 2, "routing", "close"]), (("close",), None)]
)
def test_a_sink_that_fails_is_off_with_one_message_and_the_others_go_on(raises, calls, caplog):
    failing, sound = Recorder(raises), Recorder()
    sinks = Sinks([failing, sound])
    for step in (1, 2):
        sinks.write(train(step))
    sinks.routing(SNAPSHOT, routing_measures(SNAPSHOT))
    sinks.write(train(3))
    sinks.close()
    assert sound.calls == [1, 2, "routing", 3, "close"]
    assert calls is None or failing.calls == calls
    assert [r.getMessage() for r in caplog.records] == [
        "recorder is off for the rest of this run: OSError: no space left"
    ]


def test_an_interrupt_in_a_sink_is_not_swallowed():
    with pytest.raises(KeyboardInterrupt):
        Sinks([Recorder((1,), KeyboardInterrupt)]).write(train(1))


class Slow(Recorder):
    """A sink that waits before it keeps what it gets, and notes on which thread that is."""

    def __init__(self, *, held, **how):
        super().__init__(**how)
        self.held, self.threads = held, set()

    def act(self, call):
        assert self.held.wait(20)
        self.threads.add(threading.current_thread())
        super().act(call)


def test_a_slow_sink_holds_up_neither_the_training_nor_the_others_and_misses_nothing():
    held = threading.Event()
    slow, quick = Slow(held=held), Recorder()
    sinks = Sinks([quick], [slow])
    for step in range(1, 4):
        sinks.write(train(step))
    sinks.routing(SNAPSHOT, routing_measures(SNAPSHOT))
    sinks.write(train(4))
    assert (quick.calls, slow.calls) == ([1, 2, 3, "routing", 4], [])
    held.set()
    sinks.close()
    sinks.close()
    sinks.write(train(5))  # goes nowhere
    assert quick.calls == slow.calls == [1, 2, 3, "routing", 4, "close"]
    assert len(slow.threads) == 1
    assert threading.current_thread() not in slow.threads


def test_no_more_than_so_many_records_wait_for_a_slow_sink(monkeypatch):
    monkeypatch.setattr(sink_module, "MOST_WAITING", 3)
    held = threading.Event()
    slow, quick = Slow(held=held), Recorder()
    sinks = Sinks([quick], [slow])
    writer = threading.Thread(target=lambda: [sinks.write(train(step)) for step in range(1, 9)])
    writer.start()
    writer.join(0.3)
    assert writer.is_alive()  # waits for room
    assert len(quick.calls) == 4
    held.set()
    writer.join(20)
    sinks.close()
    assert slow.calls == [*range(1, 9), "close"]


def test_a_slow_sink_that_fails_is_off_with_one_message_and_the_others_go_on(caplog):
    held = threading.Event()
    held.set()
    failing, sound, quick = Slow(held=held, raises=(2,)), Slow(held=held), Recorder()
    sinks = Sinks([quick], [failing, sound])
    for step in (1, 2, 3):
        sinks.write(train(step))
    sinks.close()
    assert quick.calls == sound.calls == [1, 2, 3, "close"]
    assert failing.calls == [1, 2, "close"]
    assert [r.getMessage() for r in caplog.records] == [
        "recorder is off for the rest of this run: OSError: no space left"
    ]


def test_a_process_that_ends_without_closing_still_writes_what_waits(tmp_path):
    """As after an error that nobody caught."""
    code = (
        "import sys, time\n"
        "from monitoring.sinks import Sinks\n"
        "class Late:\n"
        "    name = 'late'\n"
        "    def write(self, record):\n"
        "        time.sleep(0.05)\n"
        "        print(record['step'], flush=True)\n"
        "sinks = Sinks([], [Late()])\n"
        "for step in range(9):\n"
        "    sinks.write({'kind': 'train', 'step': step})\n"
        "raise SystemExit(3)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.split(), done.stderr) == (3, [str(step) for step in range(9)], "")


def test_metrics_are_on_the_disk_before_training_goes_on_whatever_the_slow_sinks_do(tmp_path):
    sinks = open_sinks(tmp_path, name="n", steps=9, wandb="off", project="p", config={})
    sinks._thread.submit(time.sleep, 1)
    sinks.write(train(1))
    sinks.routing(SNAPSHOT, routing_measures(SNAPSHOT))
    assert [line["kind"] for line in lines(tmp_path / "metrics.jsonl")] == ["train", "routing"]
    assert not (tmp_path / "routing").exists()
    sinks.close()
    assert (tmp_path / "routing/step-00000050.npz").exists()


def test_a_mistake_of_the_caller_is_not_taken_for_a_failing_sink():
    with pytest.raises(AssertionError, match="without a kind"):
        Sinks([Recorder()]).write({"step": 1})


def test_a_sink_that_cannot_be_opened_does_not_stop_the_run(tmp_path, caplog, capsys):
    (tmp_path / "metrics.jsonl").mkdir()
    sinks = open_sinks(tmp_path, name="n", steps=9, wandb="off", project="p", config={})
    sinks.write(train(1))
    sinks.routing(SNAPSHOT, routing_measures(SNAPSHOT))
    sinks.close()
    assert "metrics.jsonl is off for this run: IsADirectoryError" in caplog.text
    assert "step 1/9" in capsys.readouterr().out
    assert (tmp_path / "routing/step-00000050.npz").exists()


def test_wandb_that_is_not_installed_is_said_with_the_command_that_gets_it(tmp_path, caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # its import then fails as where there is none
    monkeypatch.delitem(sys.modules, "monitoring.wandb_sink", raising=False)
    open_sinks(tmp_path, name="n", steps=9, wandb="offline", project="p", config={}).close()
    assert caplog.messages == [
        "W&B is off for this run: the package wandb is not installed; get it with:"
        f" {sys.executable} -m pip install wandb"
    ]


def test_ranks_without_sinks_need_no_special_case():
    sinks = Sinks([])
    sinks.write(train(1))
    assert sinks.routing(SNAPSHOT, routing_measures(SNAPSHOT))["step"] == 50
    sinks.close()


def test_every_line_is_on_disk_before_the_next_and_old_lines_stay(tmp_path):
    path = tmp_path / "runs/x/metrics.jsonl"
    for part in range(2):
        file = MetricsFile(path)
        for step in range(3):
            file.write(train(10 * part + step))
            assert lines(path)[-1]["step"] == 10 * part + step
        file.close()
    assert [line["step"] for line in lines(path)] == [0, 1, 2, 10, 11, 12]


def test_lines_are_strict_json_whatever_the_numbers_are(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.write(
        {"kind": "train", "step": np.int64(3), "loss": math.nan, "lr": np.float32(0.5), "grad_norm": np.float32("inf")}
        | {"name": "naïve\nline", "path": tmp_path, "list": (1, np.nan), "array": np.arange(2), "flag": np.bool_(True)}
    )
    file.close()
    (text,) = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    record = json.loads(text, parse_constant=refuse)
    assert record == {
        "kind": "train",
        "step": 3,
        "loss": None,
        "lr": 0.5,
        "grad_norm": None,
        "name": "naïve\nline",
        "path": str(tmp_path),
        "list": [1, None],
        "array": [0, 1],
        "flag": True,
    }


@pytest.mark.parametrize("torn", [b'{"kind": "train", "st', b"{" + b"x" * 200_000, b'{"kind": "train", "step": 9}'])
@pytest.mark.parametrize("whole_lines", [0, 1, 3])
def test_a_line_torn_by_a_kill_is_cut_off_and_said(tmp_path, caplog, torn, whole_lines):
    path = tmp_path / "metrics.jsonl"
    whole = b"".join(json.dumps(train(step)).encode() + b"\n" for step in range(whole_lines))
    path.write_bytes(whole + torn)
    file = MetricsFile(path)
    assert path.read_bytes() == whole
    assert f"{path} ended in the middle of a line, which was cut off ({len(torn)} bytes)" in caplog.text
    file.write(train(3))
    file.close()
    assert [line["step"] for line in lines(path)] == [*range(whole_lines), 3]


@pytest.mark.parametrize("contents", [b"", b'{"kind": "start", "step": 0}\n'])
def test_a_whole_file_is_left_as_it_is_in_silence(tmp_path, caplog, contents):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(contents)
    caplog.set_level(logging.DEBUG)
    MetricsFile(path).close()
    assert path.read_bytes() == contents
    assert not caplog.records


def write_lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_reading_a_resumed_run_gives_each_step_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    start, resumed = {"kind": "start", "step": 0}, {"kind": "start", "step": 2}
    write_lines(path, start, *(train(n, loss=1) for n in (1, 2, 3, 4)), resumed, *(train(n, loss=9) for n in (3, 4, 5)))
    with path.open("a") as file:
        file.write('{"kind": "tra')  # being written by a run that goes on
    records = read_metrics(path)
    assert [(r["step"], r["loss"]) for r in records if r["kind"] == "train"] == [(1, 1), (2, 1), (3, 9), (4, 9), (5, 9)]
    assert [r["step"] for r in records if r["kind"] == "start"] == [0, 2]


def test_reading_a_run_that_started_over_gives_the_last_start_only(tmp_path):
    path = tmp_path / "metrics.jsonl"
    start = {"kind": "start", "step": 0}
    write_lines(
        path, start, {"kind": "eval", "step": 0, "loss": 7}, train(1), start, {"kind": "eval", "step": 0, "loss": 8}
    )
    assert [(r["kind"], r.get("loss")) for r in read_metrics(path)] == [("start", None), ("eval", 8)]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{oops", "not JSON"),
        ("3", "not an object with a `kind`"),
        ('{"step": 1}', "not an object with a `kind`"),
        ("", "not JSON"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path, line, what):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(train(1)) + "\n" + line + "\n" + json.dumps(train(2)) + "\n")
    with pytest.raises(MonitoringError, match=what) as info:
        read_metrics(path)
    assert str(info.value).startswith(f"{path}:2: ")


def test_a_missing_file_is_one_sentence(tmp_path):
    with pytest.raises(MonitoringError, match=r"metrics\.jsonl: no such file; is this the folder of a run\?"):
        read_metrics(tmp_path / "metrics.jsonl")
