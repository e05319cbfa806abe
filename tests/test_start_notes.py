"""What `plan` and the start of a run say although nothing is wrong."""

import json
import shutil
from pathlib import Path

import pytest

from finetune import cli
from finetune.commands.start_notes import start_notes
from finetune.model.config import ModelConfig
from finetune.recipe.load import load_recipe
from tests.commands import ROOT

TINY = ROOT / "recipes/tiny.yaml"
CONFIG = ModelConfig.from_folder(ROOT / "recipes/base")


def said(tmp_path: Path, *overrides: str) -> list[str]:
    return start_notes(load_recipe(TINY, overrides), CONFIG, tmp_path / "new")


def test_a_recipe_as_delivered_has_nothing_to_note(tmp_path: Path) -> None:
    assert said(tmp_path) == []


def test_sequences_longer_than_the_base_was_trained_on_are_noted(tmp_path: Path) -> None:
    longest = CONFIG.max_position_embeddings
    tokens = [f"train.{key}={2 * longest}" for key in ("sequence_tokens", "micro_batch_tokens")]
    batch = f"train.global_batch_tokens={4 * longest}"
    (sentence,) = said(tmp_path, *tokens, batch)
    assert sentence.startswith(f"train.sequence_tokens: sequences of {2 * longest:,} tokens, but the base model was")
    assert f"positions up to {longest:,} (max_position_embeddings of its config.json)" in sentence
    assert said(tmp_path, f"train.sequence_tokens={longest}", *tokens[1:], batch) == []
    drawn = "model.init=random", "lora=null", "router.train=true", "monitor.drift_every_steps=0"
    assert [note for note in said(tmp_path, *tokens, batch, *drawn) if "sequence_tokens" in note] == []


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("lora.targets=[q_proj, shared_expert]", "lora.targets: shared_expert has no peft form for this model"),
        ("lora.targets=[experts]", "lora.targets: peft loads adapters of the routed experts, but not every server"),
        ("router.train=true", "router.train: an adapter cannot hold trained routers"),
    ],
)
def test_what_the_adapter_cannot_do_is_said_in_the_plan(
    override: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", "--recipe", str(TINY), "--set", override]) == 0
    (note,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert note.startswith(f"note: {expected}")


def test_a_run_folder_that_cannot_be_used_here_is_a_note_of_the_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert cli.main(["plan", "--recipe", str(TINY), "--set", f"output.dir={tmp_path}/file"]) == 0
    assert capsys.readouterr().out.startswith(
        f"note: on this machine the run would not start: output.dir: {tmp_path}/file/tiny cannot be written, because"
    )


def test_the_plan_reads_the_positions_of_the_models_own_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    shutil.copytree(ROOT / "recipes/base", base)
    values = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**values, "max_position_embeddings": 256}))
    assert cli.main(["plan", "--recipe", str(TINY), "--set", f"model.path={base}"]) == 0
    assert "note: train.sequence_tokens: sequences of 512 tokens, but the base" in capsys.readouterr().out
