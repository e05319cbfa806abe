import pytest
import torch
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

from finetune.checkpoint.layout import is_carried, is_fused, parameter_shapes, stored_tensors
from finetune.checkpoint.shards import open_checkpoint
from finetune.model.config import ModelConfig
from finetune.model.model import HybridMoEForCausalLM
from tests.configs import CONFIGS
from tests.tiny_checkpoints import save_released, transformers_model

REAL = ModelConfig.from_dict(
    {"model_type": "qwen3_next", "num_hidden_layers": 48, "num_experts": 512, "rope_theta": 5e6}
)


def on_meta(values):
    with torch.device("meta"):
        return Qwen3NextForCausalLM(Qwen3NextConfig(**values))


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_those_of_transformers_and_of_our_model(name):
    config = ModelConfig.from_dict(CONFIGS[name])
    with torch.device("meta"):
        ours = HybridMoEForCausalLM(config)
    for model in (on_meta(CONFIGS[name]), ours):
        expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        assert parameter_shapes(config) == expected


@pytest.mark.parametrize("name", CONFIGS)
def test_stored_tensors_are_those_that_transformers_saves(name, tmp_path):
    config = ModelConfig.from_dict(CONFIGS[name])
    folder = save_released(transformers_model(CONFIGS[name]), tmp_path / "released", shard="1GB", mtp=False)
    saved = {name: stored.shape for name, stored in open_checkpoint(folder).tensors.items()}
    assert {name: slot.shape for name, slot in stored_tensors(config).items()} == saved


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_stored_tensors_fill_every_number_once(name, fused):
    config = ModelConfig.from_dict(CONFIGS[name])
    filled = {name: torch.zeros(shape) for name, shape in parameter_shapes(config).items()}
    for slot in stored_tensors(config, fused=fused).values():
        part = slot.of(filled[slot.parameter])
        assert part.shape == slot.shape
        part += 1
    assert all(bool((count == 1).all()) for count in filled.values())
    assert sum(count.numel() for count in filled.values()) == sum(config.parameter_counts().values())


def test_the_released_80b_has_74391_tensors():
    slots = stored_tensors(REAL)
    per_layer = [sum(name.startswith(f"model.layers.{layer}.") for name in slots) for layer in (0, 3)]
    assert per_layer == [1550, 1549]  # DeltaNet, attention
    assert len(slots) == 36 * 1550 + 12 * 1549 + 3 == 74_391
    assert sum(torch.Size(shape).numel() for shape in parameter_shapes(REAL).values()) == 79_674_391_296
    assert slots["model.layers.47.mlp.experts.511.up_proj.weight"].shape == (512, 2048)
    assert slots["model.layers.47.self_attn.q_proj.weight"].shape == (8192, 2048)
    assert slots["model.layers.46.linear_attn.conv1d.weight"].shape == (8192, 1, 4)


def test_stacked_experts_are_recognised_by_their_names():
    config = ModelConfig.from_dict(CONFIGS["base"])
    assert is_fused(stored_tensors(config, fused=True))
    assert not is_fused(stored_tensors(config))


def test_only_mtp_tensors_are_carried_through():
    assert is_carried("mtp.layers.0.mlp.experts.3.up_proj.weight")
    assert not any(is_carried(name) for name in stored_tensors(REAL))
