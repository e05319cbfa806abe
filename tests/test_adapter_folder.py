"""Adapters that a run starts from: what stock peft saved on transformers' model means the same here."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetune.model.config import ModelConfig
from finetune.model.model import HybridMoEForCausalLM
from finetune.recipe.sections import MIXER_TARGETS, Lora
from finetune.training.adapter_folder import adapter_values, check_adapter
from finetune.training.lora import AdapterError, inject
from tests.configs import CONFIGS, tiny_config
from tests.test_model import LOGITS_TOLERANCE, pair

VALUES = tiny_config()
ALPHA, RANK = 5.0, 3
WITH_EXPERTS = Lora(rank=RANK, alpha=ALPHA, targets=(*MIXER_TARGETS, "experts"))


def parameters_of(model: HybridMoEForCausalLM) -> dict[str, torch.Size]:
    return {name: p.shape for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def put(model: HybridMoEForCausalLM, values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        model.get_parameter(name).copy_(value)


def adapt(model: HybridMoEForCausalLM, lora: Lora) -> HybridMoEForCausalLM:
    inject(
        model,
        rank=lora.rank,
        alpha=lora.alpha,
        dropout=0.0,
        targets=lora.targets,
        seed=1,
        rslora=lora.use_rslora,
    )
    return model


def saved_by_peft(theirs: torch.nn.Module, folder: Path, lora: Lora, **changes: Any) -> torch.nn.Module:
    """Stock peft's adapter on transformers' model, with factors that are not zero, saved as its users save it."""
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"] if "experts" in lora.targets else None
    given = {"r": lora.rank, "lora_alpha": lora.alpha, "use_rslora": lora.use_rslora, "task_type": "CAUSAL_LM"}
    linear = [target for target in lora.targets if target != "experts"]
    config = LoraConfig(**given | {"target_modules": linear, "target_parameters": experts} | changes)
    model = get_peft_model(theirs, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.05)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("name", ["base", "dense-layers"])
@pytest.mark.parametrize(
    "lora",
    [Lora(rank=RANK, alpha=ALPHA), WITH_EXPERTS, Lora(rank=RANK, alpha=ALPHA, use_rslora=True)],
    ids=["mixers", "experts", "rslora"],
)
def test_an_adapter_of_stock_peft_gives_its_logits(name: str, lora: Lora, tmp_path: Path) -> None:
    values = CONFIGS.get(name) or VALUES
    ours, theirs = pair(values)
    ids = torch.randint(values["vocab_size"], (2, 19))
    with torch.no_grad():
        plain = theirs.eval()(ids, use_cache=False).logits
        expected = saved_by_peft(theirs, tmp_path, lora)(ids, use_cache=False).logits
    adapt(ours, lora)
    found = adapter_values(tmp_path, lora, parameters_of(ours), range(values["num_experts"]))
    assert found.keys() == parameters_of(ours).keys()
    put(ours, found)
    with torch.no_grad():
        logits = ours.eval()(ids).logits
    assert (expected - plain).abs().max() > 100 * LOGITS_TOLERANCE
    torch.testing.assert_close(logits, expected, rtol=0, atol=LOGITS_TOLERANCE)


def test_a_rank_takes_the_factors_of_its_own_experts(tmp_path: Path) -> None:
    whole, theirs = pair(VALUES)
    saved_by_peft(theirs, tmp_path, WITH_EXPERTS)
    all_of_them = adapter_values(tmp_path, WITH_EXPERTS, parameters_of(adapt(whole, WITH_EXPERTS)), range(8))
    part = adapt(HybridMoEForCausalLM(ModelConfig.from_dict(VALUES), range(4, 8)), WITH_EXPERTS)
    mine = adapter_values(tmp_path, WITH_EXPERTS, parameters_of(part), range(4, 8))
    assert mine.keys() == all_of_them.keys()
    for name, value in mine.items():
        expected = all_of_them[name][4:] if ".mlp.experts." in name else all_of_them[name]
        assert torch.equal(value, expected), name


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    saved_by_peft(pair(VALUES)[1], folder, Lora(rank=RANK, alpha=ALPHA, targets=("q_proj", "o_proj")))
    return folder


@pytest.mark.parametrize(
    ("lora", "sentence"),
    [
        ({"rank": 4}, "has r 3; set lora.rank to that, it is 4"),
        ({"alpha": 6.0}, "has lora_alpha 5.0; set lora.alpha to that, it is 6.0"),
        ({"use_rslora": True}, "has use_rslora false; set lora.use_rslora to that, it is true"),
        (
            {"targets": ("q_proj",)},
            "self_attn.o_proj.lora_B.weight, which lora.targets does not adapt",
        ),
        (
            {"targets": ("q_proj", "o_proj", "v_proj")},
            "lacks base_model.model.model.layers.3.self_attn.v_proj.lora_A.weight, base_model.model.model.layers.3"
            ".self_attn.v_proj.lora_B.weight, which lora.targets adapts; take that target out",
        ),
    ],
)
def test_an_adapter_of_another_form_is_refused_by_name(lora: dict[str, Any], sentence: str, saved: Path) -> None:
    asked = Lora(**{"rank": RANK, "alpha": ALPHA, "targets": ("q_proj", "o_proj")} | lora)
    model = adapt(HybridMoEForCausalLM(ModelConfig.from_dict(VALUES)), asked)
    with pytest.raises(AdapterError) as error:
        adapter_values(saved, asked, parameters_of(model), range(8))
    assert sentence in str(error.value)
    assert str(error.value).startswith(f"lora.init_from: {saved}")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"peft_type": "LOHA"}, "holds an adapter of type LOHA, not LORA"),
        ({"use_dora": True}, "uses use_dora, which has no counterpart here"),
        (
            {"modules_to_save": ["lm_head"], "rank_pattern": {"x": 2}},
            "uses modules_to_save, rank_pattern, which",
        ),
        ({"bias": "all"}, "uses bias, which has no counterpart here"),
        ({"alora_invocation_tokens": [7]}, "uses alora_invocation_tokens, which has no counterpart here"),
        ({"kasa_config": {"beta": 0.1}}, "uses kasa_config, which has no counterpart here"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            'init_lora_weights "pissa_niter_4": its factors belong to base weights',
        ),
        ({"init_lora_weights": "olora"}, "save it from peft as a plain LoRA"),
        ({"r": "3"}, 'has r "3"; set lora.rank to that, it is 3'),
        ({"lora_alpha": None}, "has lora_alpha null; set lora.alpha to that, it is 5.0"),
    ],
)
def test_what_peft_adds_is_refused(change: dict[str, Any], sentence: str, saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "changed"))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(AdapterError) as error:
        check_adapter(folder, Lora(rank=RANK, alpha=ALPHA))
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("factor", "value", "sentence"),
    [
        ("lora_A", torch.full((3, 32), float("nan")), "holds numbers that are not finite"),
        ("lora_A", torch.ones(3, 31), "is [3, 31], which does not make [3, 32]; it belongs to another model"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    factor: str, value: Tensor, sentence: str, saved: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "changed"))
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in tensors if factor in name and "q_proj" in name)
    save_file(tensors | {name: value}, folder / "adapter_model.safetensors")
    asked = Lora(rank=RANK, alpha=ALPHA, targets=("q_proj", "o_proj"))
    model = adapt(HybridMoEForCausalLM(ModelConfig.from_dict(VALUES)), asked)
    with pytest.raises(AdapterError) as error:
        adapter_values(folder, asked, parameters_of(model), range(8))
    assert f"{name} " in str(error.value)
    assert sentence in str(error.value)


def test_a_folder_without_an_adapter_is_said(tmp_path: Path, saved: Path) -> None:
    with pytest.raises(AdapterError, match=r"not an adapter in peft's form .*export RUN --format adapter. writes one"):
        check_adapter(tmp_path, Lora())
    shutil.copy(saved / "adapter_config.json", tmp_path)
    with pytest.raises(AdapterError, match=r"holds no adapter_model\.safetensors; save the adapter with safetensors"):
        check_adapter(tmp_path, Lora(rank=RANK, alpha=ALPHA))
