"""Settings under the names that other tools have for them are answered by meaning."""

import dataclasses
import re
from pathlib import Path

import pytest
from peft import LoraConfig
from transformers import TrainingArguments

from finetune.recipe import familiar
from finetune.recipe import messages as wording
from finetune.recipe.load import json_schema, load_recipe
from finetune.recipe.recipe import RecipeError

SETTINGS = wording.settings_of(json_schema())
OURS = {key.rpartition(".")[2] for key in SETTINGS}
RECIPE = "model: {path: Qwen/Qwen3-Coder-Next}\ndata: {train: [{path: .}]}\ntrain: {steps: 100}\n"


def told(text: str, tmp_path: Path) -> str:
    path = tmp_path / "x.yaml"
    path.write_text(RECIPE + text)
    with pytest.raises(RecipeError) as error:
        load_recipe(path, check_paths=False)
    return str(error.value).removeprefix(f"{path}:4: ")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("load_in_4bit: true\n", "load_in_4bit: unknown key; there is no training on quantised weights here"),
        ("model: {load_in_4bit: true}\n", "there is no training on quantised weights here"),
        ("gradient_checkpointing: true\n", "unknown key; this is train.recompute here"),
        ("gradient_accumulation_steps: 4\n", "unknown key; this follows from train.global_batch_tokens here"),
        ("per_device_train_batch_size: 4\n", "unknown key; this is train.micro_batch_tokens here, in tokens"),
        ("max_seq_length: 4\n", "unknown key; this is train.sequence_tokens here"),
        ("lora_r: 4\n", "unknown key; this is lora.rank here"),
        ("lora: {r: 4}\n", "unknown key; this is lora.rank here"),
        ("learning_rate: 1e-4\n", "unknown key; this is optim.lr here"),
        ("optim: {learning-rate: 1e-4}\n", "unknown key; this is optim.lr here"),
        ("num_train_epochs: 3\n", "unknown key; this is train.epochs here"),
        ("bf16: true\n", "unknown key; this is model.dtype here"),
        ("weight_decay: 0.1\n", "unknown key (there is optim.weight_decay)"),
        ("optim: {schedule: warmup_stable_decay}\n", "linear, cosine, wsd; that is wsd here"),
        ("lora: {targets: [gate_proj]}\n", "all-linear; experts means all three matrices of every routed expert"),
        ("lora: {targets: all}\n", "all-linear; that is all-linear here"),
        ("optim: sgd\n", "optim: a section; write optim: {name: sgd} if that is its kind"),
        ("optim: {name: paged_adamw_8bit}\n", "adamw_8bit; there is no paged optimizer here"),
        ("optim: {name: adamw_bnb_8bit}\n", "adafactor, adamw_8bit; that is adamw_8bit here"),
        ("optim: {xyzzy: 1}\n", "unknown key; known here: "),
        ("optim: {shedule: cosine}\n", "unknown key (did you mean 'schedule'?)"),
    ],
)
def test_the_answer_is_by_meaning(text: str, answer: str, tmp_path: Path) -> None:
    if text.startswith("model:"):
        text = text.replace("model", "kernels")
    assert answer in told(text, tmp_path)


@pytest.mark.parametrize("of", [TrainingArguments, LoraConfig], ids=lambda of: of.__name__)
def test_every_setting_of_these_classes_is_answered(of: type) -> None:
    of_the_files_alone = {"auto_mapping", "peft_version", "inference_mode"}
    names = {field.name for field in dataclasses.fields(of)} - of_the_files_alone  # type: ignore[arg-type]
    assert not [name for name in names if name not in OURS and familiar.familiar(name) is None]


def test_every_key_that_an_answer_names_exists_and_no_name_of_ours_is_answered() -> None:
    answers = {*(answer for answer, _ in familiar._ANSWERS), *familiar._VALUES.values()}
    keys = {key for answer in answers for key in re.findall(r"\b[a-z]+\.[a-z_0-9.]*[a-z_0-9]", answer)}
    assert not {key for key in keys if key not in SETTINGS} - {"launch.sh", "metrics.jsonl", "chat_template.jinja"}
    names = [name for _, group in familiar._ANSWERS for name in group.split()]
    assert len(names) == len(set(names)) > 500
    assert not OURS & set(names)


def test_every_answered_value_is_refused_by_its_setting() -> None:
    for name, value in familiar._VALUES:
        of_this_name = [setting for key, setting in SETTINGS.items() if key.rpartition(".")[2] == name]
        assert of_this_name, name
        for setting in of_this_name:
            assert value not in wording.choices_of(setting) + wording.choices_of(setting.get("items", {}))
