import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from finetune.checkpoint import resume as resumes
from finetune.checkpoint import writer as writers
from finetune.checkpoint.layout import CheckpointError
from finetune.checkpoint.resume import check_nothing_lost, chosen_checkpoint, newest_checkpoint, open_state
from finetune.checkpoint.writer import Writer
from finetune.distributed import world as worlds
from finetune.distributed.world import RankError
from finetune.recipe.load import load_recipe
from finetune.run import starting_point as starting_points
from finetune.training import saving as savings
from tests.ranks import ranks

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


def write(root, step, *, ranks=1, keep=3, part=part_of, spare=(), best=None):
    """One checkpoint, all ranks of it in this process."""
    made = [Writer(root, rank=rank, ranks=ranks, token="t0", keep=keep) for rank in range(ranks)]
    try:
        for rank, writer in enumerate(made):
            state = {"loader": {"epoch": 1, "cursor": step * 10}, "rank": rank, "best": best}
            writer.begin(step, part(rank, ranks, step), state, spare=spare)
        for writer in reversed(made):  # rank 0 last, which without a part of another rank would wait for ever
            while writer.busy and not any(other.failed for other in made):
                writer.wait(0.05)
    finally:
        for writer in made:
            writer.close()
    failed = [writer for writer in made if writer.failed]
    written = [writer.finish() for writer in (failed or made)]
    assert [bool(one) for one in written] == [True] + [False] * (ranks - 1)
    assert written[0].folder == root / f"step-{step}"


def names(root):
    return sorted(path.name for path in root.iterdir())


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_what_any_number_of_ranks_wrote_is_read_back_whole(ranks, tmp_path):
    write(tmp_path / "checkpoints", 20, ranks=ranks)
    newest, told = newest_checkpoint(tmp_path / "checkpoints")
    assert (newest, told) == (tmp_path / "checkpoints" / "step-20", [])
    state, store = open_state(newest)
    assert state == {"loader": {"epoch": 1, "cursor": 200}, "rank": 0, "best": None, "step": 20}
    expected = part_of(0, 1, 20)
    assert set(store) == set(expected)
    assert len(store) == 10
    for name, tensor in expected.items():
        assert store.read(name).dtype == tensor.dtype
        assert torch.equal(store.read(name), tensor)


def test_a_tensor_that_is_not_there_is_named(tmp_path):
    write(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"step-1: holds no k_proj\.lora_A\.default\.weight::fp32; it comes from"):
        open_state(tmp_path / "step-1")[1].read("k_proj.lora_A.default.weight::fp32")


def test_only_the_newest_are_kept(tmp_path):
    for step in (5, 10, 15, 100):
        write(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-100", "step-15"]
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


def without_hashes(line):
    """The sentence without the two checksums in its brackets, which differ."""
    found = re.search(r"\((?:its sha256 is|it names its own sha256) (\w{12})\.\.\., .* (\w{12})\.\.\.\)", line)
    if found is None:
        return line
    assert found[1] != found[2]
    return line.replace(found[0], "(HASHES)")


def change_state(path):
    path.write_text(path.read_text().replace('"cursor": 300', '"cursor": 301'))


def into_folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("damage", "file", "sentence"),
    [
        (Path.unlink, "part-00001.safetensors", "part-00001.safetensors is missing"),
        (truncate, "part-00001.safetensors", "part-00001.safetensors is {less} bytes instead of {size}"),
        (flip, "part-00000.safetensors", "part-00000.safetensors was changed after it was written (HASHES)"),
        (Path.unlink, "manifest.json", "{folder}/manifest.json: no such file; this is not a checkpoint of a run"),
        (truncate, "manifest.json", None),
        (change_state, "manifest.json", "{folder}/manifest.json: was changed after it was written (HASHES)"),
        (
            lambda path: path.write_bytes(b""),
            "manifest.json",
            "{folder}/manifest.json:1:1: not JSON (Expecting value); it was changed or cut short",
        ),
        (
            lambda path: path.write_text("[]"),
            "manifest.json",
            "{folder}/manifest.json: holds a list where an object is expected; it was changed or cut short",
        ),
        (
            into_folder,
            "manifest.json",
            "{folder}/manifest.json: is a folder, not a regular file; it was changed or cut short",
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
        "manifest a list",
        "manifest a folder",
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
    assert [without_hashes(line) for line in told] == [
        f"{folder}: passed over, {sentence.format(folder=folder, size=size, less=size - 1)}"
    ]
    # The run goes on from 20 and comes to 30 again.
    write(tmp_path, 30, ranks=2)
    assert newest_checkpoint(tmp_path) == (folder, [])
    assert names(tmp_path) == ["step-10", "step-20", "step-30"]


def test_a_checkpoint_whose_disk_gives_up_is_passed_over(tmp_path, monkeypatch):
    for step in (10, 20):
        write(tmp_path, step)

    def broken(path, progress, hash_of=resumes.hash_of):
        if path.parent.name == "step-20":
            raise OSError(5, "Input/output error")
        return hash_of(path, progress)

    monkeypatch.setattr(resumes, "hash_of", broken)
    told = [f"{tmp_path}/step-20: passed over, cannot be read ([Errno 5] Input/output error)"]
    assert newest_checkpoint(tmp_path) == (tmp_path / "step-10", told)


def no_list(root, *_):
    raise CheckpointError(f"{root}: cannot be read ([Errno 5] Input/output error); check the folder and its disk")


def told_of_a_root_that_cannot_be_read(rank, root):
    starting_points.newest_checkpoint = no_list  # in this process, which is the rank's own
    world = worlds.start(1)
    tiny = load_recipe(Path("recipes/tiny.yaml"), check_paths=False)
    try:
        savings.resume(root.parent, tiny, None, None, world, base="", base_now="", say=print)
    except RankError as error:
        return str(error)


def test_all_ranks_are_told_that_the_checkpoints_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "iterdir", lambda path: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    sentence = f"{tmp_path}: cannot be read ([Errno 5] Input/output error); check the folder and its disk"
    with pytest.raises(CheckpointError, match=re.escape(sentence)):
        newest_checkpoint(tmp_path)
    monkeypatch.undo()
    root = tmp_path / "checkpoints"
    sentence = sentence.replace(str(tmp_path), str(root))
    assert ranks(2, told_of_a_root_that_cannot_be_read, root) == [sentence] * 2


def test_a_slow_rank_does_nothing_in_a_folder_that_rank_0_has_renamed(tmp_path, monkeypatch):
    """Rank 1 stands still as soon as its part is announced; rank 0 makes the checkpoint whole meanwhile."""
    real = os.replace

    def replace(source, target):
        real(source, target)
        if Path(target).name == "part-00001.json":
            time.sleep(0.5)

    monkeypatch.setattr(os, "replace", replace)
    write(tmp_path, 10, ranks=2)
    assert newest_checkpoint(tmp_path) == (tmp_path / "step-10", [])
    assert not list(tmp_path.rglob("*.new"))


def test_an_older_checkpoint_that_cannot_be_deleted_does_not_end_the_run(tmp_path, monkeypatch):
    write(tmp_path, 10)
    monkeypatch.setattr(writers, "_delete", lambda folder: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    writer = Writer(tmp_path, rank=0, ranks=1, token="t0", keep=1)
    writer.begin(20, part_of(0, 1, 20), {})
    writer.wait()
    written = writer.finish()
    writer.close()
    assert (written.step, written.not_deleted) == (20, "[Errno 5] Input/output error")
    assert newest_checkpoint(tmp_path) == (tmp_path / "step-20", [])


def test_a_file_of_the_user_in_an_older_checkpoint_keeps_it(tmp_path):
    write(tmp_path, 10)
    (tmp_path / "step-10/notes.txt").write_text("mine")
    writer = Writer(tmp_path, rank=0, ranks=1, token="t0", keep=1)
    writer.begin(20, part_of(0, 1, 20), {})
    writer.wait()
    written = writer.finish()
    writer.close()
    assert written.not_deleted == "step-10 holds notes.txt, which no run wrote"
    assert names(tmp_path) == ["step-10", "step-20"]


def test_what_an_orphan_still_writes_into_waits_for_the_next_write(tmp_path, monkeypatch):
    """Between the list of a folder's files and its own deletion a rank of the killed run adds a file."""
    left = tmp_path / "step-10.old1.tmp"
    left.mkdir()
    rmdir = os.rmdir

    def and_one_more(path, **more):
        (left / "part-00001.safetensors").touch()
        rmdir(path, **more)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", and_one_more)
        write(tmp_path, 20)
    assert names(tmp_path) == ["step-10.old1.tmp", "step-20"]
    write(tmp_path, 30)
    assert names(tmp_path) == ["step-20", "step-30"]


def seconds_to_close(rank, root):
    """After rank 0 failed before it made the folder that rank 1 waits for."""
    if rank == 0:
        writers._clear = no_list  # in this process, which is the rank's own
    saving = savings.Saving(root, worlds.start(1), keep=1)
    saving.begin(1, part_of(rank, 2, 1), {}, began=time.perf_counter(), spare=[])
    with pytest.raises(RankError, match="cannot be read"):
        saving.settle()
    began = time.perf_counter()
    saving.close()
    return time.perf_counter() - began


def test_ranks_that_know_of_a_failed_write_do_not_wait_for_it(tmp_path):
    assert max(ranks(2, seconds_to_close, tmp_path)) < writers.SECONDS_FOR_OTHERS / 2


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


@pytest.mark.parametrize("alive", [0, 1])
def test_a_run_that_lost_a_rank_keeps_the_previous_checkpoint(alive, tmp_path, monkeypatch):
    monkeypatch.setattr(writers, "SECONDS_FOR_OTHERS", 0.2)
    write(tmp_path, 10, keep=1)
    left = Writer(tmp_path, rank=alive, ranks=2, token="a1", keep=1)
    left.begin(20, part_of(alive, 2, 20), {})
    left.close()
    assert left.failed
    what = {0: "not finished, the part of rank 1 did not arrive", 1: "rank 1 does not see it; output.dir must be on"}
    with pytest.raises(CheckpointError, match=rf"step-20\.a1\.tmp: {what[alive]}"):
        left.finish()
    newest, told = newest_checkpoint(tmp_path)
    assert newest == tmp_path / "step-10"
    assert told == []
    assert names(tmp_path) == ["step-10"]  # rank 0 takes away what can no longer become whole
    write(tmp_path, 20, keep=1)
    assert names(tmp_path) == ["step-20"]


def test_a_rank_of_a_killed_run_that_still_writes_does_not_reach_the_next_run(tmp_path):
    """Rank 1 outlives rank 0 by a moment; its part is of other numbers than those of the run that follows."""
    (tmp_path / "step-20.old1.tmp").mkdir()
    orphan = Writer(tmp_path, rank=1, ranks=2, token="old1", keep=1)
    write(tmp_path, 10)
    (tmp_path / "step-20.old1.tmp").mkdir()
    orphan.begin(20, part_of(1, 2, 99), {})
    write(tmp_path, 20, ranks=2)
    orphan.close()
    assert torch.equal(
        open_state(tmp_path / "step-20")[1].read("experts.down_proj::fp32::7"),
        part_of(1, 2, 20)["experts.down_proj::fp32::7"],
    )


@pytest.mark.parametrize("call", range(1, 4))
def test_a_run_killed_at_any_rename_leaves_a_whole_checkpoint(call, tmp_path, monkeypatch):
    """Writing step 20 again and pruning step 10: old 20 aside, new 20 in place, 10 aside."""
    write(tmp_path, 10)
    write(tmp_path, 20)
    calls = []

    def killed_at(operation):
        def rename(source, target):
            calls.append(operation)
            if len(calls) == call:
                raise KilledError
            operation(source, target)

        return rename

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", killed_at(os.rename))
        with pytest.raises(KilledError):
            write(tmp_path, 20, keep=1)
    newest, _ = newest_checkpoint(tmp_path)
    assert newest == tmp_path / ("step-10" if call == 2 else "step-20")
    write(tmp_path, 30, keep=1)
    assert names(tmp_path) == ["step-30"]


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    def full(path, tensors, progress):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writers, "write_part", full)
    with pytest.raises(CheckpointError, match=r"step-20: rank 0 could not write it \(.*No space left") as caught:
        write(tmp_path, 20)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.getuid() != 0, reason="mounts a small disk")
def test_a_disk_that_is_really_full_keeps_the_checkpoint_before_and_nothing_of_the_new_one(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]).returncode:
        pytest.skip("may not mount a small disk here")
    try:
        many = {f"{name}::fp32": torch.zeros(40_000) for name in "abc"}
        write(disk, 10, keep=3, part=lambda rank, ranks, step: many)  # 480 kB
        more = {f"{name}::fp32": torch.zeros(40_000) for name in "abcd"}  # 640 kB
        with pytest.raises(CheckpointError, match=r"step-20: rank 0 could not write it \(.*No space left on device"):
            write(disk, 20, part=lambda rank, ranks, step: more)
        assert newest_checkpoint(disk) == (disk / "step-10", [])
        assert names(disk) == ["step-10"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_run_whose_checkpoints_are_all_damaged_or_gone_does_not_begin_anew(tmp_path):
    root = tmp_path / "checkpoints"
    check_nothing_lost(root)
    (root / "step-10.t0.tmp").mkdir(parents=True)
    check_nothing_lost(root)  # killed while its first one was written
    for step in (10, 20):
        write(root, step)
        flip(root / f"step-{step}" / "part-00000.safetensors")
    assert newest_checkpoint(root)[0] is None
    with pytest.raises(CheckpointError, match=r"none of its checkpoints is whole \(step-10, step-20\); put one back"):
        check_nothing_lost(root)
    shutil.rmtree(root)
    (tmp_path / "metrics.jsonl").write_text('{"kind": "start", "step": 0}\n')
    check_nothing_lost(root)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "checkpoint", "step": 20}\n')
    with pytest.raises(
        CheckpointError, match=r"checkpoints: the checkpoint of step 20 is gone; put one back from a copy, or"
    ):
        check_nothing_lost(root)


def test_a_tensor_that_two_ranks_answer_for_is_our_fault(tmp_path):
    with pytest.raises(AssertionError, match=r"holds tensors of another rank: a::fp32 \(also in part-00000"):
        write(tmp_path, 1, ranks=2, part=lambda rank, ranks, step: {"a::fp32": torch.zeros(1)})


def test_a_state_that_json_cannot_hold_fails_before_anything_is_written(tmp_path):
    writer = Writer(tmp_path / "root", rank=0, ranks=1, token="t0", keep=1)
    with pytest.raises(TypeError):
        writer.begin(1, {}, {"x": object()})
    writer.close()
    assert not (tmp_path / "root").exists()


def test_what_is_not_finite_is_never_stored(tmp_path):
    write(tmp_path, 10)
    broken = {"a::fp32": torch.zeros(3), "b::fp32": torch.tensor([1.0, torch.nan]), "n": torch.tensor([3])}
    with pytest.raises(CheckpointError, match=r"step-20\.t0\.tmp: not written, not finite on rank 0: b::fp32$"):
        write(tmp_path, 20, part=lambda rank, ranks, step: broken)
    assert newest_checkpoint(tmp_path)[0] == tmp_path / "step-10"


def test_the_step_goes_on_while_the_disk_is_slow(tmp_path, monkeypatch):
    """`begin` returns while the file is not written; the fault of the write is kept until it is asked for."""
    held = threading.Event()

    def slow(*arguments, write_part=writers.write_part):
        assert held.wait(20)
        return write_part(*arguments)

    monkeypatch.setattr(writers, "write_part", slow)
    writer = Writer(tmp_path, rank=0, ranks=1, token="t0", keep=1)
    for step in (10, 20):
        held.clear()
        writer.begin(step, part_of(0, 1, step), {})
        assert (writer.busy, writer.failed, writer.finish()) == (True, False, None)
        assert newest_checkpoint(tmp_path)[0] == (tmp_path / "step-10" if step == 20 else None)
        with pytest.raises(AssertionError, match="one checkpoint at a time"):
            writer.begin(step + 1, {}, {})
        held.set()
        writer.wait()
        written = writer.finish()
        assert (written.step, written.folder, written.seconds > 0) == (step, tmp_path / f"step-{step}", True)
        assert writer.finish() is None
    monkeypatch.setattr(writers, "write_part", lambda *_: (_ for _ in ()).throw(OSError(5, "I/O error")))
    writer.begin(30, part_of(0, 1, 30), {})
    writer.wait()
    assert (writer.busy, writer.failed) == (False, True)
    with pytest.raises(
        CheckpointError, match=r"step-30: rank 0 could not write it .*I/O error.*before it were not touched"
    ):
        writer.finish()
    writer.close()
    first = Writer(tmp_path / "new", rank=0, ranks=1, token="test", keep=1)
    first.begin(30, part_of(0, 1, 30), {})
    first.wait()
    with pytest.raises(CheckpointError, match=r"I/O error.*; there is no checkpoint before it$"):
        first.finish()
    first.close()


def test_the_best_stays_and_can_be_chosen(tmp_path):
    told = []
    chosen = functools.partial(chosen_checkpoint, say=told.append)
    with pytest.raises(CheckpointError, match="holds no whole checkpoint to export; train it first"):
        chosen(tmp_path, "best")
    for step in (5, 10, 15, 20):
        write(tmp_path, step, keep=2, spare=[5], best={"step": 5, "loss": 1.5, "measured": 4})
    assert names(tmp_path) == ["step-15", "step-20", "step-5"]
    assert chosen(tmp_path, "best") == tmp_path / "step-5"
    assert chosen(tmp_path, "newest") == tmp_path / "step-20"
    assert chosen(tmp_path, "step-15") == tmp_path / "step-15"
    for name in ("step-16", "steps", "../x"):
        with pytest.raises(CheckpointError, match=r"no such checkpoint; there are step-5, step-15, step-20"):
            chosen(tmp_path, name)
    flip(tmp_path / "step-5" / "part-00000.safetensors")
    with pytest.raises(CheckpointError, match=r"step-5: part-00000.safetensors was changed after it was written"):
        chosen(tmp_path, "best")
    write(tmp_path, 25, keep=2)
    assert names(tmp_path) == ["step-20", "step-25"]
    with pytest.raises(CheckpointError, match=r"no best checkpoint, since no held-out loss was measured; .*data\.eval"):
        chosen(tmp_path, "best")
    measured = "step-5: the held-out loss was measured at step 4, while one before was still being saved"
    assert told == [measured, measured]


@pytest.mark.parametrize("which", ["newest", "best"])
@pytest.mark.parametrize("lost", ["damaged", "gone", "gone with its lines"])
def test_an_older_checkpoint_is_exported_only_when_it_is_named(which, lost, tmp_path):
    root, told = tmp_path / "run" / "checkpoints", []
    for step in (10, 20):
        write(root, step, best={"step": 10, "loss": 1.5})
    lines = [{"kind": "start", "step": 0}, *({"kind": "checkpoint", "step": step} for step in (10, 20))]
    (root.parent / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if lost == "damaged":
        flip(root / "step-20" / "part-00000.safetensors")
    else:
        shutil.rmtree(root / "step-20")
    if lost == "gone with its lines":
        (root.parent / "metrics.jsonl").unlink()
        assert chosen_checkpoint(root, which, told.append) == root / "step-10"  # nothing is left that tells of step 20
    first = "once its folder is moved away, " if lost == "damaged" else ""
    sentence = (
        f"{root}/step-20: the newest checkpoint of the run is {lost.split()[0]}; {first}the training command makes it"
        " again from step-10; an older one is used only by its name; there are step-10"
    )
    with pytest.raises(CheckpointError, match=re.escape(sentence)):
        chosen_checkpoint(root, which, told.append, finished=20)
    assert chosen_checkpoint(root, "step-10", told.append, finished=20) == root / "step-10"
    assert len(told) == (lost == "damaged")


@pytest.mark.parametrize("which", ["newest", "best"])
def test_a_run_whose_checkpoints_are_all_damaged_is_not_told_to_train_first(which, tmp_path):
    root = tmp_path / "run" / "checkpoints"
    with pytest.raises(CheckpointError, match="holds no whole checkpoint to export; train it first"):
        chosen_checkpoint(root, which, print)
    for step in (10, 20):
        write(root, step)
        flip(root / f"step-{step}" / "part-00000.safetensors")
    with pytest.raises(CheckpointError, match=r"none of its checkpoints is whole \(step-10, step-20\); put one back"):
        chosen_checkpoint(root, which, print, finished=20)


def test_a_checkpoint_of_one_step_is_not_taken_for_another(tmp_path):
    for step in (10, 20):
        write(tmp_path, step)
    (tmp_path / "step-20").rename(tmp_path / "step-30")
    sentence = "its manifest is of step 20; rename the folder to step-20"
    assert newest_checkpoint(tmp_path) == (tmp_path / "step-10", [f"{tmp_path}/step-30: passed over, {sentence}"])
    with pytest.raises(CheckpointError, match=sentence):
        chosen_checkpoint(tmp_path, "step-30", print)
    (tmp_path / "step-30").rename(tmp_path / "step-20")
    assert newest_checkpoint(tmp_path) == (tmp_path / "step-20", [])


def test_where_training_never_improved_there_is_no_best_and_it_is_said(tmp_path):
    for step in (10, 20):
        write(tmp_path, step, best={"step": 0, "loss": 2.5})
    sentence = "training never improved on the base (the held-out loss of 2.5000 before the first step is the lowest)"
    with pytest.raises(CheckpointError, match=re.escape(sentence) + r".* there are step-10, step-20$"):
        chosen_checkpoint(tmp_path, "best", print)


def test_a_best_that_was_not_kept_is_said(tmp_path):
    for step in (10, 20):
        write(tmp_path, step, keep=1, best={"step": 10, "loss": 2.5})
    sentence = r"step-10: the checkpoint with the lowest held-out loss \(2\.5000\) is gone; only checkpoint\.keep_best"
    with pytest.raises(CheckpointError, match=sentence):
        chosen_checkpoint(tmp_path, "best", print)


WRITER = """
import sys, torch
from pathlib import Path
from finetune.checkpoint.writer import Writer
writer = Writer(Path(sys.argv[1]), rank=0, ranks=1, token="w", keep=2)
for step in range(int(sys.argv[2]), 10_000):
    writer.begin(step, {f"{name}::fp32": torch.full((200_000,), float(step)) for name in "abcd"}, {"cursor": step})
    writer.wait()
    writer.finish()
"""


def test_sigkill_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    reached = 0
    for delay in (0.003, 0.017, 0.041):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), str(reached + 1)], cwd=CHECKOUT)
        deadline = time.monotonic() + 60
        while (
            max((int(path.name[5:]) for path in tmp_path.glob("step-*") if path.suffix != ".tmp"), default=0) <= reached
        ):
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


def test_a_part_that_is_cut_short_while_it_is_read_is_a_sentence_and_no_signal(tmp_path):
    """In a process of its own: a mapped file would end it with SIGBUS."""
    write(tmp_path, 20, ranks=2)
    part = sorted((tmp_path / "step-20").glob("part-*.safetensors"))[1]
    script = f"""
import os
from pathlib import Path
from finetune.checkpoint.layout import CheckpointError
from finetune.checkpoint.resume import open_state
state, store = open_state(Path({str(tmp_path / "step-20")!r}))
for cut in (1, 200, 8, 0):
    os.truncate({str(part)!r}, cut if cut != 1 else os.stat({str(part)!r}).st_size - 1)
    told = []
    for name in store:
        try:
            store.read(name)
        except CheckpointError as error:
            told.append(str(error))
    print(told[-1])
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr)
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    for line in lines:
        assert line.startswith(f"{part}: ends at byte ")
        assert "in the middle of a tensor; the same command again continues from the newest checkpoint" in line


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"[]", "manifest.json: holds a list where an object is expected; it was changed or cut short"),
        (b"{", "manifest.json:1:2: not JSON"),
        (b'{"a":' * 100_000, "manifest.json: nested more than 100 deep"),
        (b'{"step": ' + b"9" * 5000 + b"}", "manifest.json: holds a number of 5,000 digits"),
        (b'{"step": "3", "parts": [], "state": {}}', "not a manifest of a checkpoint (step is missing or wrong)"),
        (b'{"step": 3, "parts": {}, "state": {}}', "not a manifest of a checkpoint (parts is missing or wrong)"),
        (b'{"step": 3, "parts": [{"file": "../part-00000.safetensors", "bytes": 1, "sha256": ""}]}', "(parts.0.file"),
        (b'{"step": 3, "parts": [{"file": "part-00000.safetensors", "bytes": "1"}]}', "(parts.0.bytes is"),
        (b'{"step": 3, "parts": [], "state": []}', "not a manifest of a checkpoint (state is missing or wrong)"),
        (b'{"step": 3, "parts": [], "state": {}, "sha256": 5}', "(sha256 is missing or wrong)"),
    ],
)  # fmt: skip
def test_a_manifest_that_is_none_is_passed_over_with_a_sentence(tmp_path, contents, message):
    write(tmp_path, 10)
    write(tmp_path, 20)
    (tmp_path / "step-20/manifest.json").write_bytes(contents)
    newest, told = newest_checkpoint(tmp_path)
    assert newest == tmp_path / "step-10"
    assert len(told) == 1
    assert told[0].startswith(f"{tmp_path / 'step-20'}: passed over, ")
    assert message in told[0]
    assert "\n" not in told[0]


def test_a_manifest_or_a_part_that_is_a_fifo_is_passed_over_at_once(tmp_path):
    for step, name in ((10, None), (20, "manifest.json"), (30, "part-00000.safetensors")):
        write(tmp_path, step)
        if name:
            (tmp_path / f"step-{step}" / name).unlink()
            os.mkfifo(tmp_path / f"step-{step}" / name)
    newest, told = newest_checkpoint(tmp_path)
    assert newest == tmp_path / "step-10"
    assert len(told) == 2
