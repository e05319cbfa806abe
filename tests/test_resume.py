import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from finetune.checkpoint import resume
from finetune.checkpoint.layout import CheckpointError
from finetune.checkpoint.resume import newest_checkpoint, open_state, write_checkpoint

CHECKOUT = Path(__file__).resolve().parents[1]


def part_of(rank, ranks, step):
    """What one rank answers for: rank 0 the dense tensors, every rank its experts of eight."""
    generator = torch.Generator().manual_seed(step)
    dense = {"norm.weight::fp32": torch.randn(5, generator=generator)}
    dense["q_proj.weight::exp_avg"] = torch.randn(3, 4, generator=generator).bfloat16()
    experts = {f"experts.down_proj::fp32::{e}": torch.randn(2, 3, generator=generator) for e in range(8)}
    share = 8 // ranks
    mine = {name: experts[name] for name in list(experts)[rank * share : (rank + 1) * share]}
    return {**dense, **mine} if rank == 0 else mine


def write(root, step, *, ranks=1, keep=3, barrier=None, part=part_of):
    """One checkpoint, each rank in a thread."""
    meet = threading.Barrier(ranks, timeout=20)
    failures = []

    def run(rank):
        state = {"loader": {"epoch": 1, "cursor": step * 10}, "rank": rank}
        try:
            write_checkpoint(
                root,
                step,
                tensors=part(rank, ranks, step),
                state=state,
                rank=rank,
                ranks=ranks,
                barrier=barrier or meet.wait,
                keep=keep,
            )
        except BaseException as error:
            failures.append(error)
            meet.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    told = [error for error in failures if not isinstance(error, threading.BrokenBarrierError)]
    if failures:
        raise (told or failures)[0]


def names(root):
    return sorted(path.name for path in root.iterdir())


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_what_any_number_of_ranks_wrote_is_read_back_whole(ranks, tmp_path):
    write(tmp_path / "checkpoints", 20, ranks=ranks)
    newest, told = newest_checkpoint(tmp_path / "checkpoints")
    assert (newest, told) == (tmp_path / "checkpoints" / "step-20", [])
    state, store = open_state(newest)
    assert state == {"loader": {"epoch": 1, "cursor": 200}, "rank": 0, "step": 20}
    expected = part_of(0, 1, 20)
    assert set(store) == set(expected)
    assert len(store) == 10
    for name, tensor in expected.items():
        assert store.read(name).dtype == tensor.dtype
        assert torch.equal(store.read(name), tensor)
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-20\n"


def test_a_tensor_that_is_not_there_is_named(tmp_path):
    write(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"step-1: holds no k_proj\.lora_A\.default\.weight::fp32; it comes from"):
        open_state(tmp_path / "step-1")[1].read("k_proj.lora_A.default.weight::fp32")


def test_only_the_newest_are_kept(tmp_path):
    for step in (5, 10, 15, 100):
        write(tmp_path, step, keep=2)
    assert names(tmp_path) == ["latest", "step-100", "step-15"]
    assert newest_checkpoint(tmp_path)[0] == tmp_path / "step-100"


def test_a_run_that_has_not_written_yet_starts_fresh(tmp_path):
    assert newest_checkpoint(tmp_path / "absent") == (None, [])
    assert newest_checkpoint(tmp_path) == (None, [])


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def change_state(path):
    path.write_text(path.read_text().replace('"cursor": 300', '"cursor": 301'))


@pytest.mark.parametrize(
    ("damage", "file", "sentence"),
    [
        (Path.unlink, "part-00001.safetensors", "part-00001.safetensors is missing"),
        (truncate, "part-00001.safetensors", "part-00001.safetensors is {less} bytes instead of {size}"),
        (flip, "part-00000.safetensors", "part-00000.safetensors was changed after it was written (its hash differs)"),
        (Path.unlink, "manifest.json", "{folder}/manifest.json: no such file; this is not a checkpoint of a run"),
        (truncate, "manifest.json", None),
        (change_state, "manifest.json", "{folder}/manifest.json: was changed after it was written (its hash differs)"),
        (
            lambda path: path.write_bytes(b""),
            "manifest.json",
            "{folder}/manifest.json: not a manifest of a checkpoint; it was changed or cut short",
        ),
    ],
    ids=[
        "part gone",
        "part cut",
        "bit flipped",
        "manifest gone",
        "only a newline cut",
        "state edited",
        "manifest empty",
    ],
)
def test_a_damaged_checkpoint_is_passed_over_with_one_sentence(damage, file, sentence, tmp_path):
    for step in (10, 20, 30):
        write(tmp_path, step, ranks=2)
    size = (tmp_path / "step-30" / file).stat().st_size
    damage(tmp_path / "step-30" / file)
    newest, told = newest_checkpoint(tmp_path)
    if sentence is None:  # the manifest still says all it said
        assert (newest, told) == (tmp_path / "step-30", [])
        return
    assert newest == tmp_path / "step-20"
    folder = tmp_path / "step-30"
    assert told == [f"{folder}: passed over, {sentence.format(folder=folder, size=size, less=size - 1)}"]
    # The run goes on from 20 and comes to 30 again.
    write(tmp_path, 30, ranks=2)
    assert newest_checkpoint(tmp_path) == (folder, [])
    assert names(tmp_path) == ["latest", "step-10", "step-20", "step-30"]


def test_a_damaged_later_checkpoint_never_costs_the_one_just_written(tmp_path):
    write(tmp_path, 10)
    write(tmp_path, 30)
    flip(tmp_path / "step-30" / "part-00000.safetensors")
    write(tmp_path, 20, keep=1)
    newest, told = newest_checkpoint(tmp_path)
    assert newest == tmp_path / "step-20"
    assert len(told) == 1


class KilledError(BaseException):
    """Stands for the process ending at this point."""


@pytest.mark.parametrize("survived", [0, 1])
def test_a_run_killed_between_two_ranks_keeps_the_previous_checkpoint(survived, tmp_path):
    write(tmp_path, 10, keep=1)
    passed = []

    def barrier():
        if len(passed) == survived:
            raise KilledError
        passed.append(True)

    with pytest.raises(KilledError):
        write(tmp_path, 20, keep=1, barrier=barrier)
    newest, told = newest_checkpoint(tmp_path)
    assert newest == tmp_path / "step-10"
    assert told == [f"{tmp_path / 'step-20.tmp'}: passed over, the run stopped while it was being written or deleted"]
    write(tmp_path, 20, keep=1)
    assert names(tmp_path) == ["latest", "step-20"]


@pytest.mark.parametrize("call", range(1, 5))
def test_a_run_killed_at_any_rename_leaves_a_whole_checkpoint(call, tmp_path, monkeypatch):
    """Writing step 20 again and pruning step 10: old 20 aside, new 20 in place, `latest`, 10 aside."""
    write(tmp_path, 10)
    write(tmp_path, 20)
    calls = []

    def killed_at(operation):
        def rename(source, target):
            if Path(target).suffix != ".json":  # files of the folder that is being written
                calls.append(operation)
                if len(calls) == call:
                    raise KilledError
            operation(source, target)

        return rename

    with monkeypatch.context() as patch:
        patch.setattr(resume.os, "rename", killed_at(os.rename))
        patch.setattr(resume.os, "replace", killed_at(os.replace))
        with pytest.raises(KilledError):
            write(tmp_path, 20, keep=1)
    newest, _ = newest_checkpoint(tmp_path)
    assert newest == tmp_path / ("step-10" if call == 2 else "step-20")
    write(tmp_path, 30, keep=1)
    assert names(tmp_path) == ["latest", "step-30"]


def test_a_rank_whose_part_does_not_arrive_is_named_and_nothing_is_committed(tmp_path, monkeypatch):
    write(tmp_path, 10, ranks=2)
    monkeypatch.setattr(resume, "_write_part", lambda partial, rank, tensors: None)
    with pytest.raises(CheckpointError, match=r"step-20\.tmp: holds no part of rank 0; output\.dir must be on a disk"):
        write(tmp_path, 20, ranks=2)
    assert newest_checkpoint(tmp_path)[0] == tmp_path / "step-10"


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    def full(tensors, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(resume, "save_file", full)
    with pytest.raises(CheckpointError, match=r"step-20: rank 0 could not write it \(.*No space left") as caught:
        write(tmp_path, 20)
    assert "\n" not in str(caught.value)


def test_a_tensor_that_two_ranks_answer_for_is_our_fault(tmp_path):
    with pytest.raises(AssertionError, match=r"holds tensors of another rank: a::fp32 \(also in part-00000"):
        write(tmp_path, 1, ranks=2, part=lambda rank, ranks, step: {"a::fp32": torch.zeros(1)})


def test_a_state_that_json_cannot_hold_fails_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError):
        write_checkpoint(
            tmp_path / "root", 1, tensors={}, state={"x": object()}, rank=0, ranks=1, barrier=lambda: None, keep=1
        )
    assert not (tmp_path / "root").exists()


WRITER = """
import sys, torch
from pathlib import Path
from finetune.checkpoint.resume import write_checkpoint
for step in range(int(sys.argv[2]), 10_000):
    tensors = {f"{name}::fp32": torch.full((200_000,), float(step)) for name in "abcd"}
    write_checkpoint(Path(sys.argv[1]), step, tensors=tensors, state={"cursor": step}, rank=0, ranks=1,
                     barrier=lambda: None, keep=2)
"""


def test_sigkill_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    reached, latest = 0, tmp_path / "latest"
    for delay in (0.003, 0.017, 0.041):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), str(reached + 1)], cwd=CHECKOUT)
        deadline = time.monotonic() + 60
        while not latest.exists() or int(latest.read_text().removeprefix("step-")) <= reached:
            assert time.monotonic() < deadline, "the writer wrote nothing"
            time.sleep(0.001)
        time.sleep(delay)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        newest, _ = newest_checkpoint(tmp_path)
        assert newest is not None
        state, store = open_state(newest)
        assert newest.name == f"step-{state['cursor']}"
        assert state["cursor"] > reached
        reached = state["cursor"]
        assert all(bool((store.read(f"{name}::fp32") == state["cursor"]).all()) for name in "abcd")
        manifest = json.loads((newest / "manifest.json").read_text())
        assert [part["tensors"] for part in manifest["parts"]] == [4]
