"""Every optimizer of a recipe: torch's own result on two ranks, in every stage, and from another layout.

The oracle is plain PyTorch: one process, the whole batch, torch's optimizer class, `clip_grad_norm_`.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from data.packing import Batch
from finetune.distributed import world as worlds
from finetune.distributed.expert_exchange import attach
from finetune.distributed.world import World
from finetune.engine import engine as engines
from finetune.engine.optimizer import learning_rate, parameter_groups
from finetune.model.config import ModelConfig
from finetune.plan.planner import plan
from finetune.recipe.notes import notes
from finetune.recipe.recipe import Recipe
from finetune.recipe.rules import RULES
from finetune.recipe.sections import Optim, Router
from finetune.training.step import optimize
from tests.configs import tiny_config
from tests.ranks import ranks
from tests.test_planner import CPU
from tests.test_rank_layouts import CONFIG, PACKS, TOKENS, Layout, batch_of, model_of, recipe_of

STEPS, BEFORE = (1, 2, 3), (1, 2)


class Case(NamedTuple):
    optim: dict[str, Any]
    layout: Layout
    tolerance: float = 2e-6  # of values, which are about 1 at most


def on_two(train: str = "all", **how: Any) -> Layout:
    return Layout(ranks=2, train=train, **{"expert": 2, "stage": 2} | how)


SGD, PLAIN_SGD = {"name": "sgd", "momentum": 0.8, "lr": 0.5}, {"name": "sgd", "momentum": 0.0, "lr": 0.5}
CASES = {
    "adamw": Case({"name": "adamw"}, on_two()),
    "adam": Case({"name": "adam"}, on_two()),
    "adam, stage 0": Case({"name": "adam"}, on_two(stage=0)),
    "adam on the host": Case({"name": "adam"}, on_two(offload="cpu")),
    "sgd": Case(SGD, on_two()),
    "sgd, stage 1": Case(SGD, on_two(stage=1)),
    "sgd, stage 0": Case(SGD, on_two(stage=0)),
    "sgd without momentum": Case(PLAIN_SGD, on_two()),
    # It divides every gradient by its own size, so that rounding of a small one counts as much as of a large one.
    "adafactor": Case({"name": "adafactor"}, on_two(stage=0, expert=1), 2e-5),
    "adafactor on adapters": Case({"name": "adafactor"}, on_two("lora", stage=0), 2e-5),
}


def recipe_for(case: Case) -> Recipe:
    recipe = recipe_of(case.layout)
    optim = Optim(**recipe.optim.model_dump() | {"lr": 2e-2} | case.optim)
    router = Router(train=True)
    return recipe.model_copy(update={"optim": optim, "router": router})


def in_plain_torch(case: Case) -> dict[str, Any]:
    """State after every step."""
    optim, model = recipe_for(case).optim, model_of(range(CONFIG.num_experts), Layout(train=case.layout.train))
    groups = parameter_groups(model, optim.weight_decay)
    betas = {"betas": (optim.beta1, optim.beta2), "eps": optim.eps}
    optimizer: torch.optim.Optimizer = {
        "adamw": lambda: torch.optim.AdamW(groups, **betas),
        "adam": lambda: torch.optim.Adam(groups, **betas),
        "sgd": lambda: torch.optim.SGD(groups, momentum=optim.momentum),
        "adafactor": lambda: torch.optim.Adafactor(groups),
    }[optim.name]()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    states = {}
    for step in STEPS:
        batch = batch_of(case.layout, step)
        output = model(batch.input_ids, batch.segment_ids, labels=batch.labels)
        (output.loss_sum / output.token_count).backward()
        for parameter in trained.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        torch.nn.utils.clip_grad_norm_(trained.values(), optim.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps=len(STEPS), optim=optim)
        optimizer.step()
        optimizer.zero_grad()
        states[step] = {name: p.detach().clone() for name, p in trained.items()}
    return {"states": states, "kept": {name: _kept(optimizer.state[p]) for name, p in trained.items()}}


def _kept(state: dict[str, Any]) -> dict[str, Tensor]:
    return {kind: value for kind, value in state.items() if kind != "step" and value is not None}


def start(world: World, case: Case, *, spoiled: bool = False) -> engines.ExpertEngine:
    model = model_of(world.experts(CONFIG.num_experts), case.layout)
    if spoiled:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.mul_(0.5).add_(0.1)
    if world.expert_group is not None:
        attach(model, world.expert_group)
    return engines.start(model, recipe_for(case), world, accumulation=1)


def train(engine: engines.ExpertEngine, case: Case, world: World, steps: Iterable[int]) -> dict[str, Tensor]:
    recipe = recipe_for(case)
    for step in steps:
        parts = [t.view(world.size, PACKS // world.size, TOKENS)[world.rank] for t in batch_of(case.layout, step)]
        engines.set_learning_rate(engine, learning_rate(step, steps=len(STEPS), optim=recipe.optim))
        optimize(engine, [Batch(*parts)], recipe.router, world)
    return engines.training_state(engine, world)


def all_cases(rank: int, file: Path | None) -> dict[str, Any]:
    """Every case from its first step; and, with what two ranks stored, its last step in another layout."""
    found: dict[str, Any] = {}
    stored: dict[str, dict[str, Tensor]] = torch.load(file) if file else {}
    for name, case in CASES.items():
        layout = case.layout
        if stored:
            layout = replace(layout, expert=1, stage=layout.stage and 3 - layout.stage, ranks=1, offload="none")
            case = case._replace(layout=layout)
        world = worlds.start(layout.expert)
        engine = start(world, case, spoiled=bool(stored))
        if stored:
            engines.restore(engine, stored[name].__getitem__, step=BEFORE[-1])
            found[name] = train(engine, case, world, STEPS[len(BEFORE) :])
        else:
            found[f"{name}, before"] = train(engine, case, world, BEFORE)
            found[name] = train(engine, case, world, STEPS[len(BEFORE) :])
    return found


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, Any]]:
    return ranks(2, all_cases, None)


@pytest.fixture(scope="module")
def one_rank(two_ranks: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("stored") / "states.pt"
    torch.save({name: joined(two_ranks, f"{name}, before") for name in CASES}, file)
    return ranks(1, all_cases, file)[0]


@pytest.fixture(scope="module", params=CASES)
def plain(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    return request.param, in_plain_torch(CASES[request.param])


def joined(parts: list[dict[str, Any]], name: str) -> dict[str, Tensor]:
    return {key: value for part in parts for key, value in part[name].items()}


def whole(state: dict[str, Tensor], name: str, kind: str) -> Tensor:
    if f"{name}::{kind}" in state:
        return state[f"{name}::{kind}"]
    return torch.stack([state[f"{name}::{kind}::{expert}"] for expert in range(CONFIG.num_experts)])


def assert_as_plain(state: dict[str, Tensor], name: str, plain: dict[str, Any]) -> None:
    farthest = 0.0
    values, tolerance = plain["states"][STEPS[-1]], CASES[name].tolerance
    assert {key.split("::")[0] for key in state} == values.keys()
    for parameter, value in values.items():
        moved = value - plain["states"][1][parameter]
        assert (whole(state, parameter, "fp32") - value).abs().max() <= tolerance, parameter
        farthest = max(farthest, float(moved.abs().max()))
        kinds = {key.split("::")[1] for key in state if key.split("::")[0] == parameter}
        assert kinds == {"fp32", *plain["kept"][parameter]}
        for kind, kept in plain["kept"][parameter].items():
            torch.testing.assert_close(
                whole(state, parameter, kind), kept, rtol=1e-3, atol=1e-6, msg=f"{parameter} {kind}"
            )


def test_two_ranks_train_as_plain_torch(plain: tuple[str, dict[str, Any]], two_ranks: list[dict[str, Any]]) -> None:
    name, expected = plain
    assert_as_plain(joined(two_ranks, name), name, expected)


def test_one_rank_goes_on_from_what_two_stored(plain: tuple[str, dict[str, Any]], one_rank: dict[str, Any]) -> None:
    name, expected = plain
    assert_as_plain(one_rank[name], name, expected)


@pytest.mark.parametrize("name", CASES)
def test_the_plan_counts_what_is_stored(name: str, two_ranks: list[dict[str, Any]]) -> None:
    case, stored = CASES[name], joined(two_ranks, name)
    made = plan(ModelConfig.from_dict(tiny_config()), planned(case), replace(CPU, ranks=2))
    assert made.checkpoint_bytes == 4 * sum(tensor.numel() for tensor in stored.values())


def planned(case: Case) -> Recipe:
    """The recipe with the adapters of the case's model."""
    from finetune.recipe.sections import Lora
    from tests.test_rank_layouts import TARGETS

    lora = Lora(rank=3, alpha=6.0, targets=TARGETS["lora"]) if case.layout.train == "lora" else None
    return recipe_for(case).model_copy(update={"lora": lora})


def broken_rules(recipe: Recipe) -> list[str]:
    return [problem for _, rule in RULES if (problem := rule(recipe)) is not None]


@pytest.mark.parametrize(
    ("layout", "sentence"),
    [
        (on_two(expert=1), "adafactor needs whole matrices, which ZeRO-1 and 2 divide over the ranks; set"),
        (on_two(stage=0), "adafactor scales its step by the norm of a layer's experts together, which"),
    ],
)
def test_where_adafactor_would_be_wrong_it_is_refused(layout: Layout, sentence: str) -> None:
    (only,) = broken_rules(recipe_for(Case({"name": "adafactor"}, layout)))
    assert only.startswith(sentence)
    assert not broken_rules(recipe_for(Case({"name": "sgd"}, layout)))


def test_settings_of_another_optimizer_are_notes() -> None:
    changed = {"beta1": 0.8, "beta2": 0.9, "eps": 1e-3, "momentum": 0.5}
    found = notes(recipe_for(Case({"name": "sgd"} | changed, on_two())))
    assert [note for note in found if "optim." in note] == [
        f"optim.{key}: no effect while optim.name is sgd" for key in ("beta1", "beta2", "eps")
    ]
    found = notes(recipe_for(Case({"name": "adam"} | changed, on_two())))
    assert [note for note in found if "optim." in note] == ["optim.momentum: no effect unless optim.name is sgd"]
