"""The schedule against transformers' at every step, and decay where it belongs by the kind of module."""

import math
from typing import Any

import pytest
import torch
from torch import nn
from transformers import get_cosine_with_min_lr_schedule_with_warmup, get_scheduler

from finetune.engine.optimizer import learning_rate, optimizer_of, parameter_groups
from finetune.model.config import ModelConfig
from finetune.model.layers import GatedRMSNorm, RMSNorm
from finetune.model.model import HybridMoEForCausalLM
from finetune.recipe.sections import MIXER_TARGETS, Optim
from finetune.training.lora import inject
from tests.configs import CONFIGS, randomise

SCHEDULES = [
    (20, 5, 0.1),
    (20, 0, 0.1),
    (20, 0, 0.0),
    (20, 1, 1.0),
    (7, 6, 0.25),
    (5, 5, 0.1),
    (1, 0, 0.5),
    (1, 1, 0.5),
]


@pytest.mark.parametrize(("steps", "warmup", "final"), SCHEDULES)
def test_cosine_is_transformers_at_every_step(steps: int, warmup: int, final: float) -> None:
    optim = Optim(lr=0.3, warmup_steps=warmup, final_lr_fraction=final)
    stepped = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    schedule = get_cosine_with_min_lr_schedule_with_warmup(stepped, warmup, steps, min_lr_rate=final)
    for step in range(1, steps + 1):
        stepped.step()
        schedule.step()  # theirs counts from 0 and is then at `step`
        assert learning_rate(step, steps=steps, optim=optim) == pytest.approx(schedule.get_last_lr()[0], rel=1e-12)


# Ours, transformers' name, its further arguments.
BY_TRANSFORMERS: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    ({"schedule": "constant_with_warmup"}, "constant_with_warmup", {}),
    ({"schedule": "constant"}, "constant_with_warmup", {}),
    ({"schedule": "linear", "final_lr_fraction": 0.0}, "linear", {}),
    ({"schedule": "cosine", "final_lr_fraction": 0.0}, "cosine", {}),
    *(
        (
            {"schedule": "wsd", "decay_ratio": ratio, "final_lr_fraction": final},
            "warmup_stable_decay",
            {"num_decay_steps": decay, "decay_type": "linear", "min_lr_ratio": final},
        )
        for ratio, decay, final in ((0.1, 3, 0.0), (0.34, 8, 0.0), (0.5, 12, 0.0))
    ),
]


@pytest.mark.parametrize("warmup", [{}, {"warmup_steps": 5}, {"warmup_ratio": 0.2}, {"warmup_ratio": 0.01}])
@pytest.mark.parametrize(("ours", "name", "arguments"), BY_TRANSFORMERS)
def test_every_schedule_is_that_of_transformers_get_scheduler(
    ours: dict[str, Any], name: str, arguments: dict[str, Any], warmup: dict[str, Any]
) -> None:
    steps, peak = 23, 0.3
    optim = Optim(lr=peak, **ours, **warmup)
    stepped = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    rise = warmup.get("warmup_steps", math.ceil(warmup.get("warmup_ratio", 0) * steps))
    schedule = get_scheduler(name, stepped, rise, steps, scheduler_specific_kwargs=arguments)
    for step in range(1, steps + 1):
        stepped.step()
        schedule.step()
        assert learning_rate(step, steps=steps, optim=optim) == pytest.approx(schedule.get_last_lr()[0], rel=1e-12)


def test_a_lowest_rate_lifts_the_straight_lines_too() -> None:
    linear = Optim(lr=0.4, warmup_steps=2, schedule="linear", final_lr_fraction=0.5)
    found = [learning_rate(step, steps=6, optim=linear) for step in range(1, 7)]
    assert found == pytest.approx([0.2, 0.4, 0.35, 0.3, 0.25, 0.2])
    wsd = Optim(lr=0.4, warmup_steps=2, schedule="wsd", decay_ratio=0.3, final_lr_fraction=0.5)
    found = [learning_rate(step, steps=6, optim=wsd) for step in range(1, 7)]
    assert found == pytest.approx([0.2, 0.4, 0.4, 0.4, 0.3, 0.2])
    late = Optim(lr=0.4, warmup_steps=4, schedule="wsd", decay_ratio=1.0, final_lr_fraction=0.0)
    found = [learning_rate(step, steps=6, optim=late) for step in range(1, 7)]
    assert found == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.2, 0.0])


def test_the_ends_and_the_middle_of_the_cosine() -> None:
    optim = Optim(lr=0.4, warmup_steps=10, final_lr_fraction=0.2)
    at = {step: learning_rate(step, steps=30, optim=optim) for step in (1, 5, 10, 20, 30)}
    assert at == pytest.approx({1: 0.04, 5: 0.2, 10: 0.4, 20: 0.24, 30: 0.08})


def test_constant_rises_and_stays() -> None:
    optim = Optim(lr=0.4, warmup_steps=4, schedule="constant")
    found = [learning_rate(step, steps=8, optim=optim) for step in range(1, 9)]
    assert found == pytest.approx([0.1, 0.2, 0.3] + [0.4] * 5)


def test_a_warm_up_longer_than_the_run_is_cut_to_it() -> None:
    for schedule in ("constant", "cosine"):
        optim = Optim(lr=0.4, warmup_steps=10, schedule=schedule)
        assert [learning_rate(step, steps=4, optim=optim) for step in range(1, 5)] == pytest.approx(
            [0.1, 0.2, 0.3, 0.4]
        )


def decayed_by_kind(model: nn.Module) -> dict[str, bool]:
    """For every parameter, whether weight decay may pull it to zero, told by the modules that it is in."""
    plain = {
        parameter
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if isinstance(module, RMSNorm | GatedRMSNorm | nn.Embedding) or name in ("A_log", "dt_bias")
    }
    return {name: parameter not in plain for name, parameter in model.named_parameters()}


def groups_by_name(model: nn.Module, weight_decay: float = 0.1) -> dict[str, tuple[str, float]]:
    """For every parameter that is in a group, the group's name and decay; none may be in two."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    found: dict[str, tuple[str, float]] = {}
    for group in parameter_groups(model, weight_decay):
        for parameter in group["params"]:
            assert names[parameter] not in found
            found[names[parameter]] = (group["name"], group["weight_decay"])
    return found


@pytest.mark.parametrize("values", CONFIGS.values(), ids=CONFIGS)
def test_norms_decay_rates_and_embeddings_are_not_decayed_and_all_else_is(values: dict[str, Any]) -> None:
    model = HybridMoEForCausalLM(ModelConfig.from_dict(values))
    expected = {name: ("decayed", 0.1) if decay else ("plain", 0.0) for name, decay in decayed_by_kind(model).items()}
    rates = [name for name in expected if name.endswith(("A_log", "dt_bias"))]  # float32 when others are not
    found = groups_by_name(model)
    assert found == expected | dict.fromkeys(rates, ("decay rates", 0.0))
    assert all(model.get_parameter(name).ndim >= 2 for name, (kind, _) in found.items() if kind == "decayed")
    assert ("lm_head.weight" in found) is not values["tie_word_embeddings"]  # tied, it is the embedding


def test_adapters_are_decayed_and_nothing_frozen_is_in_a_group() -> None:
    model = HybridMoEForCausalLM(ModelConfig.from_dict(CONFIGS["base"]))
    adapted = inject(model, rank=2, alpha=4.0, dropout=0.0, targets=MIXER_TARGETS, seed=0)
    expected = {f"{name}.lora_{factor}.default.weight": ("decayed", 0.1) for name in adapted for factor in "AB"}
    assert groups_by_name(model) == expected


def test_experts_have_a_group_of_their_own_only_where_they_are_marked() -> None:
    model = HybridMoEForCausalLM(ModelConfig.from_dict(CONFIGS["base"]))
    assert not [name for name, (kind, _) in groups_by_name(model).items() if kind == "experts"]
    marked = [(name, p) for name, p in model.named_parameters() if ".mlp.experts." in name]
    for _, parameter in marked:
        parameter.allreduce = False
    found = groups_by_name(model)
    assert {name for name, (kind, _) in found.items() if kind == "experts"} == {name for name, _ in marked}
    assert {found[name] for name, _ in marked} == {("experts", 0.1)}
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    assert groups_by_name(model) == {"lm_head.weight": ("decayed", 0.1)}


def test_a_step_without_gradient_shrinks_exactly_what_is_decayed() -> None:
    model = HybridMoEForCausalLM(ModelConfig.from_dict(CONFIGS["base"]))
    randomise(model, seed=1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optim = Optim(lr=0.01, weight_decay=0.5, beta1=0.8, beta2=0.7, eps=1e-3)
    optimizer = optimizer_of(parameter_groups(model, optim.weight_decay), optim, fused=False)
    assert optimizer.defaults["betas"] == (0.8, 0.7)
    assert optimizer.defaults["eps"] == 1e-3
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, decay in decayed_by_kind(model).items():
        kept = 1 - 0.01 * 0.5 if decay else 1.0
        torch.testing.assert_close(model.get_parameter(name).detach(), kept * before[name], msg=name)
