"""Adapters are where the recipe says and nowhere else, start as nothing, switch off whole, and mean what peft means."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor

from finetune.model.config import ModelConfig
from finetune.model.model import HybridMoEForCausalLM, initialise
from finetune.plan.adapter_targets import all_linear_sentence, meant_targets
from finetune.recipe.sections import MIXER_TARGETS, Lora
from finetune.training.lora import AdapterError, base_model, inject, target_modules
from tests.configs import CONFIGS, tiny_config
from tests.test_model import LOGITS_TOLERANCE, pair, random_model

# 12 layers have more targets than peft takes by name before it shortens the list.
VALUES = {**CONFIGS, "twelve-layers": tiny_config(num_hidden_layers=12, mlp_only_layers=[1, 4], vocab_size=20)}
EVERYTHING = (*MIXER_TARGETS, "shared_expert")
RANK, ALPHA = 3, 5.0


@pytest.fixture(params=list(VALUES))
def values(request: pytest.FixtureRequest) -> dict[str, Any]:
    return VALUES[request.param]


def expected_modules(values: dict[str, Any]) -> list[str]:
    """Every linear layer that can have an adapter, from the numbers of the configuration."""
    names = []
    for layer in range(values["num_hidden_layers"]):
        interval = values.get("full_attention_interval", 4)
        attends = (layer + 1) % interval == 0
        if "layer_types" in values:
            attends = values["layer_types"][layer] == "full_attention"
        last = ["q_proj", "k_proj", "v_proj", "o_proj"] if attends else ["in_proj_qkvz", "in_proj_ba", "out_proj"]
        names += [f"model.layers.{layer}.{'self_attn' if attends else 'linear_attn'}.{name}" for name in last]
        if (layer + 1) % values["decoder_sparse_step"] == 0 and layer not in values["mlp_only_layers"]:
            names += [f"model.layers.{layer}.mlp.shared_expert.{n}" for n in ("gate_proj", "up_proj", "down_proj")]
    return names


def adapted(model: HybridMoEForCausalLM, targets: tuple[str, ...] = EVERYTHING, **changes: Any) -> list[str]:
    """Put adapters into `model`, with factors that are not zero; return the names of the adapted modules."""
    names = inject(model, **{"rank": RANK, "alpha": ALPHA, "dropout": 0.0, "targets": targets, "seed": 0} | changes)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(0.04 * torch.randn(parameter.shape, generator=generator))
    return names


def factors(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if ".lora_" in name}


def some_ids(values: dict[str, Any]) -> Tensor:
    return torch.randint(values["vocab_size"], (2, 19))


@torch.no_grad()
def logits(model: torch.nn.Module, ids: Tensor) -> Tensor:
    return model(ids).logits


def test_exactly_the_asked_modules_are_adapted_and_all_else_is_frozen(values: dict[str, Any]) -> None:
    expected = expected_modules(values)
    model = random_model(values)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert sorted(inject(model, rank=RANK, alpha=ALPHA, dropout=0.0, targets=EVERYTHING, seed=0)) == sorted(expected)
    parameters = dict(model.named_parameters())
    trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
    assert trained == {f"{name}.lora_{factor}.default.weight" for name in expected for factor in "AB"}
    for name in expected:
        out, width = before[f"{name}.weight"].shape
        assert parameters[f"{name}.lora_A.default.weight"].shape == (RANK, width)
        assert parameters[f"{name}.lora_B.default.weight"].shape == (out, RANK)
    frozen = {name.replace(".base_layer", ""): p for name, p in parameters.items() if name not in trained}
    assert frozen.keys() == before.keys()
    assert all(torch.equal(frozen[name], value) for name, value in before.items())


@pytest.mark.parametrize("target", EVERYTHING)
def test_one_target_alone(target: str) -> None:
    values = VALUES["dense-layers"]  # its dense layers have a gate_proj that is no shared expert's
    parts = ("gate_proj", "up_proj", "down_proj") if target == "shared_expert" else (target,)
    expected = [name for name in expected_modules(values) if name.rpartition(".")[2] in parts]
    model = random_model(values)
    assert target_modules(model, [target]) == expected
    assert inject(model, rank=1, alpha=1.0, dropout=0.0, targets=[target], seed=0) == expected


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"layer_types": ["linear_attention"] * 4}, "q_proj, k_proj, v_proj, o_proj"),
        ({"layer_types": ["full_attention"] * 4}, "in_proj_qkvz, in_proj_ba, out_proj"),
        ({"mlp_only_layers": [0, 1, 2, 3]}, "shared_expert"),
    ],
    ids=["no-attention", "no-deltanet", "no-experts"],
)
def test_a_target_that_no_layer_has_is_named(changes: dict[str, Any], missing: str) -> None:
    model = HybridMoEForCausalLM(ModelConfig.from_dict(tiny_config(**changes)))
    with pytest.raises(AdapterError) as caught:
        inject(model, rank=RANK, alpha=ALPHA, dropout=0.0, targets=EVERYTHING, seed=0)
    assert str(caught.value) == f"lora.targets: no layer of this model has {missing}; leave it out"
    assert all(parameter.requires_grad for parameter in model.parameters())  # nothing was touched


def test_a_router_or_a_matrix_of_experts_is_no_target() -> None:
    model = HybridMoEForCausalLM(ModelConfig.from_dict(tiny_config()))
    for name in ("gate", "lm_head", "shared_expert_gate", "gate_proj", "gate_up_proj"):
        with pytest.raises(AdapterError, match=f"has {name};"):
            target_modules(model, [name])


def test_adapters_start_as_nothing(values: dict[str, Any]) -> None:
    model, ids = random_model(values), some_ids(values)
    before = logits(model, ids)
    inject(model, rank=RANK, alpha=ALPHA, dropout=0.5, targets=EVERYTHING, seed=0)
    for name, value in factors(model).items():
        assert bool(value.any()) is (".lora_A." in name), name
    assert torch.equal(logits(model.train(), ids), before)


def test_base_model_switches_every_adapter_off_and_on_again(values: dict[str, Any]) -> None:
    model, ids = random_model(values), some_ids(values)
    base = logits(model, ids)
    adapted(model)
    changed = logits(model, ids)
    assert (changed - base).abs().max() > 0.1  # what the tolerances of this file are measured against
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    with base_model(model):
        assert torch.equal(logits(model, ids), base)
    assert torch.equal(logits(model, ids), changed)
    with pytest.raises(KeyError), base_model(model):
        raise KeyError
    assert torch.equal(logits(model, ids), changed)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained


@pytest.mark.parametrize("values", CONFIGS.values(), ids=CONFIGS)
def test_an_adapter_adds_alpha_over_rank_times_its_factors(values: dict[str, Any]) -> None:
    model, plain, ids = random_model(values), random_model(values), some_ids(values)
    names = adapted(model)
    found = factors(model)
    with torch.no_grad():
        for name in names:
            a, b = (found[f"{name}.lora_{factor}.default.weight"] for factor in "AB")
            plain.get_parameter(f"{name}.weight").add_(ALPHA / RANK * b @ a)
    torch.testing.assert_close(logits(model, ids), logits(plain, ids), rtol=0, atol=LOGITS_TOLERANCE)


def test_all_linear_is_every_target_that_the_model_has_but_the_routed_experts(values: dict[str, Any]) -> None:
    model, config = random_model(values), ModelConfig.from_dict(values)
    assert sorted(target_modules(model, ("all-linear",))) == sorted(expected_modules(values))
    meant = meant_targets(config, Lora(targets=("all-linear",)))
    assert sorted(target_modules(model, meant)) == sorted(expected_modules(values))
    with_experts = target_modules(model, ("all-linear", "experts"))
    assert {name.rpartition(".")[2] for name in set(with_experts) - set(expected_modules(values))} == {"experts"}
    assert sorted(target_modules(model, meant_targets(config, Lora(targets=("all-linear", "experts"))))) == sorted(
        with_experts
    )


def test_all_linear_leaves_out_what_a_model_does_not_have() -> None:
    values = tiny_config(num_hidden_layers=1, layer_types=["full_attention"])
    config = ModelConfig.from_dict(values)
    assert sorted(target_modules(random_model(values), ("all-linear",))) == sorted(expected_modules(values))
    lora = Lora(targets=("all-linear",))
    assert meant_targets(config, lora) == ("q_proj", "k_proj", "v_proj", "o_proj", "shared_expert")
    assert all_linear_sentence(config, lora).startswith(
        "lora.targets all-linear: q_proj, k_proj, v_proj, o_proj, shared_expert; not the router,"
    )


def test_a_rank_stabilised_adapter_is_that_of_peft_on_transformers() -> None:
    values = CONFIGS["base"]
    ours, theirs = pair(values)
    adapted(ours, targets=MIXER_TARGETS, rslora=True)
    ids = some_ids(values)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, use_rslora=True, target_modules=list(MIXER_TARGETS))
    inject_adapter_in_model(config, theirs)
    assert not theirs.load_state_dict(factors(ours), strict=False).unexpected_keys
    with torch.no_grad():
        expected = theirs.eval()(ids, use_cache=False).logits
    found = logits(ours.eval(), ids)
    torch.testing.assert_close(found, expected, rtol=0, atol=LOGITS_TOLERANCE)
    adapted(plain := random_model(values), targets=MIXER_TARGETS)
    assert (logits(plain, ids) - found).abs().max() > 100 * LOGITS_TOLERANCE


def test_dropout_is_on_in_training_alone() -> None:
    model = random_model(CONFIGS["base"])
    adapted(model, dropout=0.5)
    ids = some_ids(CONFIGS["base"])
    model.eval()
    assert torch.equal(logits(model, ids), logits(model, ids))
    model.train()
    assert not torch.equal(logits(model, ids), logits(model, ids))


def test_the_same_seed_draws_the_same_factors_on_every_expert_rank() -> None:
    config = ModelConfig.from_dict(CONFIGS["base"])
    drawn = []
    for seed, experts, noise in ((7, None, 1), (7, range(4, 8), 2), (8, None, 1)):
        model = HybridMoEForCausalLM(config, experts)
        initialise(model, seed=0)
        torch.manual_seed(noise)  # what was drawn before makes no difference
        state = torch.get_rng_state()
        inject(model, rank=RANK, alpha=ALPHA, dropout=0.0, targets=EVERYTHING, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)  # and what is drawn later makes no difference either
        drawn.append(factors(model))
    same, other = drawn[1], drawn[2]
    for name, value in drawn[0].items():
        assert torch.equal(same[name], value), name
        assert torch.equal(other[name], value) is (".lora_B." in name), name


@pytest.mark.parametrize("values", CONFIGS.values(), ids=CONFIGS)
def test_logits_equal_peft_on_transformers(values: dict[str, Any]) -> None:
    ours, theirs = pair(values)
    names, ids = adapted(ours), some_ids(values)
    # Inside a module that has no `config`, peft takes the names as they are; for this model type it would take the
    # shared expert's `gate_proj` for that of the routed experts.
    bare = torch.nn.ModuleDict({"bare": theirs})
    modules = [f"bare.{name}" for name in expected_modules(values)]
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=modules), bare)
    missing, unexpected = theirs.load_state_dict(factors(ours), strict=False)
    assert not unexpected
    assert not [name for name in missing if ".lora_" in name]
    assert len(factors(theirs)) == 2 * len(names)
    with torch.no_grad():
        expected = theirs.eval()(ids, use_cache=False).logits
    torch.testing.assert_close(logits(ours.eval(), ids), expected, rtol=0, atol=LOGITS_TOLERANCE)
