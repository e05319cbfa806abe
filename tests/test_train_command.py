"""`deepspeed finetune/train.py` as it is typed: to the end, on other ranks, killed and typed again, and its exports.

Every run is a process of its own on a checkpoint that transformers made; the oracle of what it counted and lost is
transformers' model on the same documents, one at a time.
"""

import json
import os
import signal
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor
from transformers import Qwen3NextForCausalLM

from data.cache import identity, read_manifest
from data.dataset import Dataset
from data.files import write_json
from data.loader import Loader, epoch_order
from data.packing import Batch
from data.tokenizer import load_tokenizer
from finetune.checkpoint.part_file import hash_of
from finetune.checkpoint.resume import newest_checkpoint, open_state
from finetune.checkpoint.weights import from_pretrained
from finetune.commands.summary import recipe_of
from finetune.recipe.load import load_recipe
from finetune.run.folder import finished_step
from finetune.training.datasets import datasets
from finetune.training.lora import inject
from monitoring.routing import read_snapshot
from tests.commands import ROOT, SECONDS, TINY, Done, Place, command, files, launcher, place, records, run, start
from tests.test_wandb import history, parse, stored_records

STEPS, RANKS, MICRO_BATCHES, PACKS = 12, 2, 2, 2  # what tests.commands.SETTINGS says

# Full-parameter training with every router loss. What a run may change without changing the training differs.
FULL: dict[str, Any] = {
    "lora": "null",
    "lora__dropout": None,
    "router__train": "true",
    "router__balance__coefficient": 1e-2,
    "router__z_coefficient": 1e-3,
    "optim__lr": 1e-3,
    "data__packing": "padded",
    "train__steps": 8,
    "train__eval_every_steps": 0,
    "train__log_every_steps": 3,
    "monitor__drift_every_steps": 0,  # there is no frozen base left
    "monitor__probe_tokens": 4096,
    "monitor__routing_every_steps": 4,
    "checkpoint__every_steps": 0,
}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return place(tmp_path_factory.getbasetemp())


class Trained(NamedTuple):
    """A command that trained to the end, and its run folder."""

    done: Done
    folder: Path
    first_step_seconds: float  # from the command to the first optimizer step


def finished(done: Done, folder: Path) -> Trained:
    assert done.code == 0, done.out + done.err
    return Trained(done, folder, records(folder, "train")[0]["time"] - done.started)


@pytest.fixture(scope="module")
def trained(here: Place) -> Trained:
    """A LoRA run on two expert-parallel ranks, typed in the checkout, never disturbed."""
    typed = [*launcher(2)[:-1], "finetune/train.py", *TINY, *here.settings(name="lora", monitor__wandb="offline")]
    return finished(run(*typed, cwd=ROOT), here.run_folder("lora"))


@pytest.fixture(scope="module")
def full(here: Place) -> Trained:
    """A full-parameter run with every router loss, on two expert-parallel ranks, the slow definitions throughout.

    The optimizer's state is on the disk.
    """
    slow = {"kernels__experts": "loop", "train__recompute": "full", "parallel__zero_stage": 1}
    slow |= {"parallel__offload": "nvme", "parallel__offload_path": str(here.folder)}
    return finished(here.launch(name="full", **slow, **FULL), here.run_folder("full"))


# To the end.


def test_a_run_leaves_exactly_its_files(trained: Trained) -> None:
    folder = trained.folder
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {name for name in files if not name.startswith("wandb/")} == {
        *("recipe.yaml", "metrics.jsonl", "finished.json", ".lock", "routing/heatmap.png"),
        *(f"routing/step-{step:08d}.npz" for step in range(1, STEPS + 1)),
        f"checkpoints/step-{STEPS}/manifest.json",  # checkpoint.keep is 1
        *(f"checkpoints/step-{STEPS}/part-0000{r}.{end}" for r in range(RANKS) for end in ("safetensors", "json")),
    }
    assert not list(folder.parent.rglob("*.tmp"))
    assert finished_step(folder) == STEPS


def test_files_and_folders_of_a_run_follow_the_umask_alike(trained: Trained) -> None:
    open_to = {False: 0o666, True: 0o777}
    umask = os.umask(0)
    os.umask(umask)
    assert {
        path.relative_to(trained.folder).as_posix(): oct(stat.S_IMODE(path.stat().st_mode))
        for path in trained.folder.rglob("*")
        if not path.is_symlink() and stat.S_IMODE(path.stat().st_mode) != open_to[path.is_dir()] & ~umask
    } == {}


def test_the_recipe_in_the_folder_is_the_one_that_ran(trained: Trained, here: Place) -> None:
    overrides = here.settings(name="lora", monitor__wandb="offline")[1::2]
    assert recipe_of(trained.folder) == load_recipe(ROOT / "recipes/tiny.yaml", overrides)


def test_metrics_have_their_kinds_and_fields_at_their_steps(trained: Trained) -> None:
    found = partial(records, trained.folder)
    (start_line,) = found("start")
    assert {key: start_line[key] for key in ("step", "ranks", "expert")} == {"step": 0, "ranks": 2, "expert": 2}
    assert [line["step"] for line in found("train")] == [1, 3, 6, 9, 12]
    assert [line["step"] for line in found("eval")] == [0, 6, 12]
    assert [(line["step"], line["path"]) for line in found("checkpoint")] == [
        (step, f"checkpoints/step-{step}") for step in (4, 8, 12)
    ]
    assert [line["step"] for line in found("end")] == [STEPS]
    for line in found("train"):
        assert line.keys() == {
            *("kind", "time", "step", "loss", "tokens", "tokens_per_second", "lr", "grad_norm"),
            *("balance_loss", "z_loss", "seconds", "peak_bytes"),
        }
        assert all(isinstance(value, int | float) for key, value in line.items() if key != "kind"), line
    for line in found("routing"):
        assert [layer["layer"] for layer in line["layers"]] == [0, 1, 2, 3]
        assert all(("drift" in layer) == (line["step"] % 4 == 0) for layer in line["layers"])
    assert found("routing")[-1]["layers"][3]["drift"]["load_bits"] > 0


def test_losses_fall_on_what_was_trained_and_on_what_was_held_out(trained: Trained) -> None:
    losses = [line["loss"] for line in records(trained.folder, "train")]
    evaluations = [line["loss"] for line in records(trained.folder, "eval")]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.5
    assert evaluations[2] < evaluations[1] < evaluations[0] - 0.5


def test_progress_is_told_line_by_line(trained: Trained) -> None:
    out = trained.done.out
    assert "lora: 2 rank(s), expert parallel 2; the run is in" in out
    assert "4 of 8 experts a layer on each rank" in out
    assert "adapters on 13 modules" in out
    for word in (f"step {STEPS}/{STEPS} | loss", "tokens/s", "grad norm", "balance loss", "worst load", "left"):
        assert word in out
    assert "Traceback" not in out + trained.done.err


def test_the_first_step_comes_within_two_minutes_of_the_command(trained: Trained) -> None:
    """20 s on two cores with nothing else to do; nothing may be compiled on the way."""
    assert trained.first_step_seconds < 120


# What it counted, against transformers on the same documents.


@pytest.fixture(scope="module")
def reference(here: Place) -> Qwen3NextForCausalLM:
    return Qwen3NextForCausalLM.from_pretrained(here.folder / "base", dtype=torch.float32).eval()


def data_of(folder: Path, here: Place) -> tuple[Dataset, Dataset]:
    train, held_out = datasets(recipe_of(folder), load_tokenizer(here.folder / "base"))
    assert held_out is not None
    return train, held_out


def first_step(dataset: Dataset) -> list[Batch]:
    """All micro-batches of the first step, of every rank."""
    shape: dict[str, Any] = {"packs_per_micro_batch": PACKS, "micro_batches_per_step": MICRO_BATCHES, "seed": 0}
    return [batch for rank in range(RANKS) for batch in Loader(dataset, rank=rank, ranks=RANKS, **shape).next_step()]


def documents(batches: list[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens and labels of each document by itself; padding belongs to none."""
    for batch in batches:
        for tokens, labels, segments in zip(batch.input_ids, batch.labels, batch.segment_ids, strict=True):
            for segment in segments.unique():
                if segment >= 0:
                    yield tokens[segments == segment], labels[segments == segment]


@torch.no_grad()
def by_transformers(model: Qwen3NextForCausalLM, batches: list[Batch]) -> tuple[np.ndarray, float, int, int]:
    """Rows per layer and expert, mean loss over supervised tokens, tokens, supervised tokens."""
    counts = torch.zeros(4, 8, dtype=torch.long)
    loss, tokens, supervised = 0.0, 0, 0
    for ids, labels in documents(batches):
        out = model(ids[None], output_router_logits=True)
        for layer, logits in enumerate(out.router_logits):
            counts[layer] += torch.bincount(logits.topk(2).indices.flatten(), minlength=8)
        loss += float(F.cross_entropy(out.logits[0], labels, ignore_index=-100, reduction="sum").double())
        tokens, supervised = tokens + len(ids), supervised + int((labels != -100).sum())
    return counts.numpy(), loss / supervised, tokens, supervised


def test_the_first_window_holds_what_transformers_routes(
    trained: Trained, here: Place, reference: Qwen3NextForCausalLM
) -> None:
    counts, loss, tokens, _ = by_transformers(reference, first_step(data_of(trained.folder, here)[0]))
    snapshot = read_snapshot(trained.folder / "routing/step-00000001.npz")
    assert np.array_equal(snapshot.counts, counts)
    assert (snapshot.layers, snapshot.tokens) == ((0, 1, 2, 3), tokens)
    line = records(trained.folder, "train")[0]
    assert line["tokens"] == tokens
    assert line["loss"] == pytest.approx(loss, abs=1e-5)


def test_the_held_out_loss_before_training_is_that_of_transformers(
    trained: Trained, here: Place, reference: Qwen3NextForCausalLM
) -> None:
    held_out = data_of(trained.folder, here)[1]
    _, loss, _, supervised = by_transformers(reference, [held_out.batch(range(len(held_out)))])
    line = records(trained.folder, "eval")[0]
    assert line["tokens"] == supervised
    assert line["loss"] == pytest.approx(loss, abs=1e-5)


def test_every_histogram_of_the_wandb_run_holds_the_counted_rows(trained: Trained) -> None:
    (folder,) = (trained.folder / "wandb").glob("offline-run-*")
    rows = history(stored_records(folder))
    for step in range(1, STEPS + 1):
        snapshot = read_snapshot(trained.folder / f"routing/step-{step:08d}.npz")
        assert snapshot.counts.sum(1).tolist() == [2 * snapshot.tokens] * 4
        for layer, counts in zip(snapshot.layers, snapshot.counts, strict=True):
            assert rows[step][f"moe/layer_{layer:02d}/expert_load", "values"] == counts.tolist()
    for line in records(trained.folder, "train"):
        assert rows[line["step"]]["train/loss"] == line["loss"]


# Other layouts, other settings.


def test_full_training_proves_its_router_losses_and_keeps_to_its_recipe(full: Trained) -> None:
    done, folder, _ = full
    assert "experts: loop (the definition), as the recipe asks" in done.out
    assert "96 documents in 96 packs" in done.out  # padded: a document is a pack
    for key in ("router.balance.coefficient", "router.z_coefficient"):
        assert f"proved: the loss of {key} reaches what trains (gradient norm 0." in done.out
    assert [line["step"] for line in records(folder, "train")] == [1, 3, 6, 8]
    assert [line["step"] for line in records(folder, "eval")] == [0, 8]
    assert [line["step"] for line in records(folder, "routing")] == [4, 8]
    assert [line["step"] for line in records(folder, "checkpoint")] == [8]
    assert not (folder / "wandb").exists()
    _, tensors = open_state(folder / "checkpoints/step-8")
    moved = tensors["model.layers.0.mlp.gate.weight::fp32"] - from_pretrained(
        folder.parent.parent / "base", dtype=torch.float32
    ).get_parameter("model.layers.0.mlp.gate.weight")
    assert moved.abs().max() > 1e-4


def test_one_rank_says_so_and_loses_the_same(full: Trained, here: Place) -> None:
    """Other micro-batches, grouped experts, nothing recomputed, other ZeRO stage: all that is left is rounding."""
    done = here.launch(name="one-rank", ranks=None, **FULL, train__micro_batch_tokens=512)
    alone = finished(done, here.run_folder("one-rank")).folder
    assert "running on one rank with every expert on it, although the recipe says parallel.ranks 2" in done.out
    assert "one-rank: 1 rank(s), expert parallel 1" in done.out
    for kind, keys in (("train", ("loss", "balance_loss", "z_loss", "grad_norm")), ("eval", ("loss",))):
        theirs, ours = records(full.folder, kind), records(alone, kind)
        assert [line["step"] for line in ours] == [line["step"] for line in theirs]
        for key in keys:
            assert [line[key] for line in ours] == pytest.approx([line[key] for line in theirs], abs=1e-5)
    for step in (4, 8):
        one, two = (read_snapshot(folder / f"routing/step-{step:08d}.npz") for folder in (alone, full.folder))
        assert np.array_equal(one.counts, two.counts)


# Killed, and typed again.


@dataclass(frozen=True)
class Killed:
    """A run like `trained` that was killed with SIGKILL, and what happened when its command was typed again."""

    folder: Path
    kept: Path  # the checkpoint that was whole when it was killed
    again: Done


@pytest.fixture(scope="module")
def killed(here: Place) -> Killed:
    folder = here.run_folder("killed")
    settings = [*TINY, *here.settings(name="killed", monitor__wandb="offline")]
    process = start(*launcher(2), *settings, cwd=here.folder)
    metrics, end = folder / "metrics.jsonl", time.monotonic() + SECONDS
    while not (metrics.exists() and '"kind": "routing", "step": 5,' in metrics.read_text()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert finished_step(folder) is None
    kept, _ = newest_checkpoint(folder / "checkpoints")
    assert kept is not None
    elsewhere = here.folder / "elsewhere"
    elsewhere.mkdir()
    return Killed(folder, kept, run(*launcher(2), *settings, cwd=elsewhere))


def test_a_killed_run_goes_on_from_its_checkpoint_and_says_so(killed: Killed) -> None:
    """Typed in another folder: `recipes/tiny.yaml` is found in the checkout."""
    assert killed.again.code == 0, killed.again.err
    step = int(killed.kept.name.removeprefix("step-"))  # 4, or 8 if the kill came late
    assert f"continuing after step {step} from {killed.kept}\n" in killed.again.out
    assert [line["step"] for line in records(killed.folder, "start")] == [0, step]
    assert finished_step(killed.folder) == STEPS
    assert not list(killed.folder.parent.rglob("*.tmp"))


def test_a_killed_run_trains_exactly_as_one_that_was_never_killed(killed: Killed, trained: Trained) -> None:
    """The report after the resumption is of steps 4 to 6, the first of them taken by the killed process."""
    both = [killed.folder, trained.folder]
    for kind, keys in (("eval", ("step", "loss", "parts")), ("routing", ("step", "tokens", "layers"))):
        ours, theirs = ([[line[key] for key in keys] for line in records(folder, kind)] for folder in both)
        assert ours == theirs
    for key in ("step", "tokens", "lr", "grad_norm"):
        ours, theirs = ([line[key] for line in records(folder, "train")] for folder in both)
        assert ours == theirs
    for key in ("loss", "z_loss", "balance_loss"):  # means of a window: its sums are added in another order
        ours, theirs = ([line[key] for line in records(folder, "train")] for folder in both)
        assert ours == pytest.approx(theirs, rel=1e-14)
    for path in (trained.folder / "routing").glob("*.npz"):
        one, other = read_snapshot(path), read_snapshot(killed.folder / "routing" / path.name)
        assert np.array_equal(one.counts, other.counts)
    states = [dict(open_state(folder / f"checkpoints/step-{STEPS}")[1]) for folder in both]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_every_reader_of_a_killed_run_sees_every_step_once(killed: Killed) -> None:
    lines = [json.loads(line) for line in (killed.folder / "metrics.jsonl").read_text().splitlines()]
    for kind, every in (("routing", 1), ("train", 3)):
        expected = sorted({1, *range(every, STEPS + 1, every)})
        assert [line["step"] for line in lines if line["kind"] == kind] == expected
    rows: list[int] = []
    for folder in sorted((killed.folder / "wandb").glob("offline-run-*")):
        (path,) = folder.glob("*.wandb")
        rows += history(parse(path.read_bytes()))
    assert rows == list(range(STEPS + 1))  # step 0 is the held-out loss of the base


def test_a_finished_run_is_told_to_be_complete_and_left_as_it_is(killed: Killed, here: Place) -> None:
    before = files(killed.folder)
    done = here.launch(name="killed", monitor__wandb="offline")
    assert (done.code, done.out) == (
        0,
        f"{killed.folder}: this run is complete; `python -m finetune summary {killed.folder}` shows it\n",
    )
    assert files(killed.folder) == before


# What comes out of it.


@torch.no_grad()
def logits_after_training(here: Place, folder: Path, ids: Tensor) -> Tensor:
    """Those of our model: the base, adapters put in place, and the values that training left in the checkpoint."""
    recipe = recipe_of(folder)
    model = from_pretrained(here.folder / "base", dtype=torch.float32)
    lora = recipe.lora
    if lora is not None:
        inject(model, rank=lora.rank, alpha=lora.alpha, dropout=0, targets=lora.targets, seed=0)
    checkpoint, _ = newest_checkpoint(folder / "checkpoints")
    assert checkpoint is not None
    _, tensors = open_state(checkpoint)
    for name, parameter in model.named_parameters():
        if f"{name}::fp32" in tensors:
            parameter.copy_(tensors[f"{name}::fp32"])
        elif f"{name}::fp32::0" in tensors:
            parameter.copy_(torch.stack([tensors[f"{name}::fp32::{expert}"] for expert in range(8)]))
        else:
            assert lora is not None, f"{name} was not trained"
    return model.eval()(ids).logits


def some_tokens() -> Tensor:
    return torch.randint(0, 4000, (2, 50), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def farthest(theirs: Qwen3NextForCausalLM, ours: Tensor) -> float:
    return float((theirs.eval()(some_tokens()).logits - ours).abs().max())


@pytest.mark.parametrize("name", ["trained", "full"])
def test_merged_export_gives_transformers_our_logits(
    name: str, request: pytest.FixtureRequest, here: Place, reference: Qwen3NextForCausalLM, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(name).folder
    done = command("export", str(folder), "--to", str(tmp_path / "merged"), "--format", "merged")
    assert done.code == 0, done.err
    assert "tensors merged, " in done.out
    theirs = Qwen3NextForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    ours = logits_after_training(here, folder, some_tokens())
    assert farthest(theirs, ours) <= 2e-5
    assert farthest(reference, ours) > 0.1  # training moved them


def test_adapter_export_gives_peft_our_logits(trained: Trained, here: Place, tmp_path: Path) -> None:
    done = command("export", str(trained.folder), "--to", str(tmp_path / "adapter"), "--format", "adapter")
    assert done.code == 0, done.err
    assert "adapter on 13 modules" in done.out
    base = Qwen3NextForCausalLM.from_pretrained(here.folder / "base", dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert farthest(theirs, logits_after_training(here, trained.folder, some_tokens())) <= 2e-5


# What is our fault.


def test_a_crash_is_kept_with_its_traceback(here: Place, trained: Trained) -> None:
    """A pack that names a document that does not exist, in the step after the first: no user's mistake, a bug."""
    cache = here.folder / "cache-of-crash"
    recipe = load_recipe(ROOT / "recipes/tiny.yaml", here.settings(name="crash", data__cache=cache)[1::2])
    train, _ = datasets(recipe, load_tokenizer(here.folder / "base"))
    per_step = RANKS * MICRO_BATCHES * PACKS
    pack = int(epoch_order(len(train), seed=0, epoch=0)[per_step + PACKS])  # the second step's first pack of rank 1
    packs = np.load(train.folder / "pack_documents.npy")
    packs[np.load(train.folder / "pack_offsets.npy")[pack]] = 10**6
    np.save(train.folder / "pack_documents.npy", packs)
    manifest = read_manifest(train.folder)  # which is made to fit, else the data would be made again
    manifest["files"]["pack_documents.npy"]["sha256"] = hash_of(train.folder / "pack_documents.npy")
    write_json(train.folder / "manifest.json", {**manifest, "sha256": identity(manifest["files"])})

    done = here.launch(name="crash", data__cache=cache, monitor__drift_every_steps=None, monitor__probe_tokens=None)

    # The launcher's is the code of the rank that it finds ended first: the one with the bug, or one that lost it.
    assert done.code in (1, 2)
    assert "Traceback" in done.err
    kept = json.loads((here.run_folder("crash") / "crash/rank1.json").read_text())
    assert kept["exception"].startswith("IndexError: ")
    assert "next_step" in "".join(kept["traceback"])
    assert (kept["rank"], kept["step"], kept["host"]) == (1, 2, os.uname().nodename)
    assert kept["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert kept.keys() == {"time", "rank", "host", "step", "exception", "traceback", "versions"}
    assert not list(here.run_folder("crash").rglob("*.tmp"))
