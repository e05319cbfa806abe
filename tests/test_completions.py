"""What the summary of the default job shows: the embedded base knows turns, and the fine-tune ends its own."""

import ast
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data.tokenizer import load_tokenizer
from finetune import cli
from finetune.checkpoint.layout import CheckpointError
from finetune.commands.completions import MOST_TOKENS, complete, completion_lines, held_out_rows
from finetune.commands.export import export_run
from finetune.commands.summary import print_summary
from finetune.recipe.load import load_recipe
from tests.commands import ROOT, Place, place, run, run_with_checkpoint

BASE = ROOT / "recipes" / "base"


@pytest.fixture(scope="module")
def recipe() -> Any:
    return load_recipe(ROOT / "recipes" / "tiny.yaml")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return place(tmp_path_factory.getbasetemp())


def test_the_base_has_learned_the_tokens_of_a_conversation() -> None:
    """A row of the head that no training text contains is only pushed away, and then is that of every such token."""
    tokenizer = load_tokenizer(BASE)
    head = load_file(BASE / "model.safetensors")["lm_head.weight"].float()
    written, never = (head[tokenizer.control_id(token)] for token in ("<|im_end|>", "<|vision_pad|>"))
    other = head[tokenizer.control_id("<|quad_end|>")]
    assert torch.cosine_similarity(other, never, dim=0) > 0.99
    assert torch.cosine_similarity(written, never, dim=0) < 0.9


def test_the_base_ends_a_turn_that_it_was_pretrained_on(recipe: Any) -> None:
    tokenizer = load_tokenizer(BASE)
    start, end = tokenizer.control_id("<|im_start|>"), tokenizer.eos_id
    asked = 'user\nDescribe this function.\n\ndef close(self):\n    """Close the file."""\n    self.file.close()'
    turn = [start, *tokenizer.encode_plain(asked), end, *tokenizer.encode_plain("\n"), start]
    (made,) = complete(BASE, [[*turn, *tokenizer.encode_plain("assistant\n")]], [end])
    assert tokenizer.decode(made) == "Close the file.<|im_end|>"


def test_rows_that_are_shown_are_short_and_end_with_the_end_of_their_turn(recipe: Any) -> None:
    tokenizer = load_tokenizer(BASE)
    for row in held_out_rows(recipe, tokenizer, 20):
        assert row.answer[-1] == tokenizer.eos_id
        assert tokenizer.decode(row.prompt).endswith("<|im_start|>assistant\n")
        ast.parse(tokenizer.decode(row.answer[:-1]))


def test_the_summary_shows_what_base_and_export_write(
    here: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(run_with_checkpoint(here, "of-completions"), tmp_path / "run"))
    (folder / "metrics.jsonl").touch()
    assert cli.main(["summary", str(folder), "--model", str(here.folder / "base")]) == 0
    out = capsys.readouterr().out
    for words in ("\n  prompt\n    | <|im_start|>user", "\n  base, ", "\n  fine-tuned, "):
        assert out.count(words) == 2, out
    ends = re.findall(r"(?:base|fine-tuned), (?:ends after|no end within) (\d+) tokens", out)
    assert len(ends) == 4
    assert all(0 < int(count) <= MOST_TOKENS for count in ends)
    with pytest.raises(CheckpointError, match=r"nowhere: no merged export here"):
        print_summary(folder, tmp_path / "nowhere")


def test_a_recipe_without_short_rows_says_so(recipe: Any) -> None:
    texts = recipe.data.model_copy(update={"eval": ()})
    lines = completion_lines(recipe.model_copy(update={"data": texts}), BASE)
    assert lines == ["completions: none, since no held-out row has a short prompt and a short answer"]


@pytest.mark.slow
def test_the_fine_tuned_model_writes_functions_and_ends_its_turns(recipe: Any, here: Place, tmp_path: Path) -> None:
    """The default job on one rank; two minutes of one idle core."""
    settings = ["parallel.ranks=1", "parallel.expert=1", "monitor.wandb=off", f"output.dir={tmp_path}", "name=whole"]
    words = [word for setting in settings for word in ("--set", setting)]
    command = [sys.executable, str(ROOT / "finetune/train.py"), "--recipe", "recipes/tiny.yaml", *words]
    done = run(*command, cwd=ROOT)
    assert done.code == 0, done.err
    export_run(tmp_path / "whole", tmp_path / "merged", kind="merged")
    tokenizer = load_tokenizer(BASE)
    rows = held_out_rows(recipe, tokenizer, 20)
    prompts = [row.prompt for row in rows]
    counts = {}
    for folder in (BASE, tmp_path / "merged"):
        texts = [tokenizer.decode(ids) for ids in complete(folder, prompts, [tokenizer.eos_id])]
        answers = [tokenizer.decode(row.answer) for row in rows]
        names = sum(text.split("(")[0] == answer.split("(")[0] for text, answer in zip(texts, answers, strict=True))
        counts[folder.name] = names, sum(text.endswith("<|im_end|>") for text in texts)
    assert counts["base"][0] == 0
    assert min(counts["merged"]) >= 10, counts
