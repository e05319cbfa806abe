"""Functions that a notebook calls take a folder as text, as every other library does."""

from pathlib import Path

import pytest
import torch

from data.dataset import prepare
from data.sources import Source
from data.tokenizer import load_tokenizer
from finetune.checkpoint import fingerprint, manifest, mark, resume, shards, weights
from finetune.commands.export import export_run
from finetune.commands.summary import print_summary
from finetune.model.config import ModelConfig
from finetune.recipe.load import load_recipe
from finetune.run.folder import finished_step, recipe_of, stopped_step
from monitoring.metrics import MetricsFile, read_metrics
from tests.commands import ROOT, Place, place, run_with_checkpoint


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return place(tmp_path_factory.getbasetemp())


def test_a_base_is_read_and_written_by_text(here: Place, tmp_path: Path) -> None:
    base = str(here.folder / "base")
    model = weights.from_pretrained(base, dtype=torch.float32)
    weights.save_pretrained(model, str(tmp_path / "saved"), base=base)
    weights.load_weights(model, str(tmp_path / "saved"), torch.float32)
    assert weights.resolve_model(base) == weights.resolve_model(here.folder / "base")
    assert shards.has_weights(base)
    assert shards.open_checkpoint(base).tensors == shards.open_checkpoint(here.folder / "base").tensors
    assert fingerprint.is_of(fingerprint.fingerprint(base), base)
    assert ModelConfig.from_folder(base) == model.settings
    tokenizer = load_tokenizer(base)
    dataset = prepare(
        [Source(str(here.folder / "train.jsonl"), "auto")],
        tokenizer=tokenizer,
        sequence_tokens=128,
        packing="packed",
        on_bad_row="stop",
        over_long="drop",
        cache=str(tmp_path / "cache"),
    )
    assert len(dataset)


def test_a_run_is_read_and_exported_by_text(here: Place, tmp_path: Path) -> None:
    folder = run_with_checkpoint(here, "by-text")
    run, root = str(folder), str(folder / "checkpoints")
    metrics = MetricsFile(folder / "metrics.jsonl")
    metrics.write({"kind": "start", "step": 0})
    metrics.close()
    assert load_recipe(str(ROOT / "recipes/tiny.yaml")).name == "tiny"
    assert recipe_of(run).name == "by-text"
    assert finished_step(run) is None is stopped_step(run)
    newest, _ = resume.newest_checkpoint(root)
    assert newest == resume.chosen_checkpoint(root, "newest", print)
    assert resume.open_state(str(newest))[0]["step"] == 1 == manifest.read_manifest(str(newest))["step"]
    assert read_metrics(f"{run}/metrics.jsonl") == [{"kind": "start", "step": 0}]
    for kind in ("merged", "adapter"):
        export_run(run, str(tmp_path / kind), kind=kind, base=str(here.folder / "base"))
        assert mark.read_mark(str(tmp_path / kind)) is not None
    assert print_summary(run) == 0
