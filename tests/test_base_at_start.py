"""A base that cannot be trained is refused before anything starts: by `plan` and `data` where they can see it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.sources import DataError
from finetune.commands.data import show_data
from finetune.commands.plan import print_plan
from finetune.model.config_file import ConfigError
from finetune.plan.exchange import Links
from finetune.recipe.load import load_recipe
from finetune.recipe.recipe import Recipe
from tests.commands import ROOT, Place, place
from tests.test_bad_input import nothing_left, told


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return place(tmp_path_factory.getbasetemp())


@pytest.fixture
def base(here: Place, tmp_path: Path) -> Path:
    """One to damage."""
    return Path(shutil.copytree(here.folder / "base", tmp_path / "base"))


def recipe(here: Place, base: Path) -> Recipe:
    return load_recipe(ROOT / "recipes/tiny.yaml", here.settings(name="base", model__path=base)[1::2])


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_plan_and_data_name_tokens_without_a_row(here: Place, base: Path) -> None:
    """One token more than the embedding has rows, and it ends a completion."""
    rows = json.loads((base / "config.json").read_text())["vocab_size"]
    edit(base / "tokenizer_config.json", eos_token="<|stop|>")
    message = rf"{base}: the embedding has {rows:,} rows .* too few for 1 token\(s\): '<\|stop\|>' \({rows:,}\); use"
    with nothing_left(here.folder):
        with pytest.raises(DataError, match=message):
            print_plan(recipe(here, base), ranks=1, nodes=None, device_gib=None, links=Links())
        with pytest.raises(DataError, match=message):
            show_data(recipe(here, base), 1)


def test_plan_and_data_read_what_a_base_says_about_itself(here: Place, base: Path) -> None:
    edit(base / "config.json", quantization_config={"quant_method": "fp8"})
    with nothing_left(here.folder):
        with pytest.raises(ConfigError, match=r"config\.json: quantization_config says that the weights are quantised"):
            print_plan(recipe(here, base), ranks=1, nodes=None, device_gib=None, links=Links())
        with pytest.raises(ConfigError, match=r"config\.json: quantization_config says that the weights are quantised"):
            show_data(recipe(here, base), 1)


@pytest.mark.slow
def test_the_command_refuses_weights_before_it_prepares_the_data(here: Place, base: Path) -> None:
    path = base / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.experts.0.up_proj.weight"
    save_file({**tensors, name: tensors[name].to(torch.float8_e4m3fn)}, path)
    with nothing_left(here.folder):
        message = told(here.by_hand(name="float8", model__path=base))
    assert message.startswith(f"{base}: 1 tensors hold F8_E4M3, which does not train; float8 needs its scales")
    tensors[name][0, 0] = float("nan")
    save_file(tensors, path)
    message = told(here.by_hand(name="nan-base", model__path=base))
    assert message.startswith(f"{base}: holds numbers that are infinite or undefined in float32: {name} (in model.saf")
