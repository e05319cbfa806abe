"""DeepSpeed's silent traps: experts overwritten, state lost or stale after a restore, settings that it ignores.

What must come out is told by plain PyTorch (one process, `torch.optim.AdamW`, `clip_grad_norm_`), or by a run that was
never interrupted. Every rank is started once and goes through all the cases; the tests then look at what it found.
"""

import errno
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig
from torch import Tensor

from data.packing import Batch
from finetune.distributed import world as worlds
from finetune.distributed.expert_exchange import attach, is_expert_parameter
from finetune.distributed.world import World
from finetune.engine import engine as engines
from finetune.engine.engine import ExpertEngine, deepspeed_config
from finetune.engine.optimizer import MOMENTS, parameter_groups
from finetune.engine.zero import zeros_on_disk
from finetune.model.moe import Experts, experts_in_a_loop
from finetune.recipe.recipe import Recipe, RecipeError
from finetune.recipe.sections import MIXER_TARGETS, Router
from finetune.training.lora import inject
from finetune.training.router_loss import count_rows, router_loss
from finetune.training.step import optimize, seed_step, token_counts
from finetune.training.totals import Windows
from tests.ranks import ranks
from tests.test_rank_layouts import (
    CONFIG,
    TOKENS,
    Layout,
    batch_of_step,
    model_of,
    recipe_of,
    route_to_the_first_half,
)

SUMMED = [(0, "none"), (1, "none"), (2, "none"), (1, "cpu"), (2, "nvme")]  # stage, offload
BEFORE, AFTER = (1, 2), (3, 4)  # steps before the state is stored, and after
EXPERTS = CONFIG.num_experts


def recipe_with(stage: int = 2, offload: str = "none", **optim: float) -> Recipe:
    recipe = recipe_of(Layout(stage=stage, offload=offload))
    return recipe.model_copy(update={"optim": recipe.optim.model_copy(update=optim)})


def engine_of(
    world: World,
    recipe: Recipe,
    *,
    adapters: bool = False,
    dtype: torch.dtype = torch.float32,
    other_weights: bool = False,
    before_start: Callable[[torch.nn.Module], None] | None = None,
) -> ExpertEngine:
    """An engine on the model of the layout tests; with `other_weights`, none of those that train is right."""
    model = model_of(world.experts(EXPERTS), Layout())
    if adapters:
        inject(model, rank=3, alpha=6.0, dropout=0.0, targets=MIXER_TARGETS, seed=0)
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.data.fill_(0.02)
    model.cast(dtype)
    for parameter in model.parameters():
        if parameter.requires_grad and other_weights:
            parameter.data.mul_(0.5).add_(0.1)
    if before_start is not None:
        before_start(model)
    if world.expert_group is not None:
        attach(model, world.expert_group)
    return engines.start(model, recipe, world, accumulation=1)


def train(engine: ExpertEngine, recipe: Recipe, world: World, steps: Iterable[int]) -> dict[str, list[float]]:
    """Loss and gradient norm of some steps; the last is of all ranks."""
    found: dict[str, list[float]] = {"loss": [], "norm": []}
    for step in steps:
        mine = type(whole := batch_of_step(step))(*(t.view(world.size, -1, t.shape[1])[world.rank] for t in whole))
        windows = Windows(len(CONFIG.moe_layers), EXPERTS, world.device)
        found["norm"].append(optimize(engine, [mine], recipe.router, world, windows))
        totals, _ = windows.close(world, report=True, routing=True)
        found["loss"].append(totals.loss_sum / totals.supervised_tokens)
    return found


def undisturbed(world: World, recipe: Recipe, **how: Any) -> dict[str, Any]:
    engine = engine_of(world, recipe, **how)
    before = train(engine, recipe, world, BEFORE)
    state = engines.training_state(engine, world)
    after = train(engine, recipe, world, AFTER)
    return {"before": before, "state": state, **after, "end": engines.training_state(engine, world)}


def continued(world: World, recipe: Recipe, stored: dict[str, Tensor], **how: Any) -> dict[str, Any]:
    frozen: dict[str, Tensor] = {}

    def note(model: torch.nn.Module) -> None:
        frozen.update({name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad})

    engine = engine_of(world, recipe, other_weights=True, before_start=note, **how)
    engines.restore(engine, stored.__getitem__, step=BEFORE[-1])
    after = train(engine, recipe, world, AFTER)
    kept = {name: torch.equal(engine.module.get_parameter(name), value) for name, value in frozen.items()}
    end = engines.training_state(engine, world)
    return {**after, "end": end, "steps": engine.global_steps, "kept": kept}


def shared(world: World, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What all ranks stored, as a checkpoint would hold it."""
    return {key: value for part in world.gather(state) for key, value in part.items()}  # type: ignore[attr-defined]


def own_experts(world: World, *, marked: bool, frozen: bool) -> bool:
    """Whether the engine left this rank its own experts."""
    held: dict[str, Tensor] = {}

    def note(model: torch.nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if is_expert_parameter(name):
                parameter.requires_grad_(not frozen)
                held[name] = parameter.detach().clone()

    with pytest.MonkeyPatch.context() as patch:
        if not marked:
            patch.setattr(engines, "mark_experts", lambda model, world: None)
        engine = engine_of(world, recipe_with(), before_start=note)
    return all(torch.equal(engine.module.get_parameter(name).detach(), value) for name, value in held.items())


def in_a_loop(model: torch.nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, Experts):
            module.compute = experts_in_a_loop


def step_with_idle_rank(world: World, compute: Callable[[torch.nn.Module], None]) -> tuple[Tensor, dict[str, Tensor]]:
    """Rows of every expert, and the state, after a step in which rank 1's experts received nothing.

    Gradients are reduced whenever so many have come together. The buckets are so small here that the model fills many
    of them, as a large model does: a rank that had no gradient for its experts would reduce at other moments than the
    others, and wait for them for ever.
    """
    recipe, config_of = recipe_with(), engines.deepspeed_config

    def config_with_small_buckets(*args: Any, **options: Any) -> dict[str, Any]:
        config = config_of(*args, **options)
        return config | {"zero_optimization": config["zero_optimization"] | {"reduce_bucket_size": 6_000}}

    def before_start(model: torch.nn.Module) -> None:
        route_to_the_first_half(model)
        compute(model)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "deepspeed_config", config_with_small_buckets)
        engine = engine_of(world, recipe, before_start=before_start)
    batch = batch_of_step(1)
    with torch.no_grad():
        rows = count_rows(engine.module(batch.input_ids, batch.segment_ids).routings)
    train(engine, recipe, world, [1])
    return rows, engines.training_state(engine, world)


def on_two_ranks(rank: int, stored_by_plain_torch: Path) -> dict[str, Any]:
    world = worlds.start(expert_size=2)
    found: dict[str, Any] = {
        f"own experts: {marked=} {frozen=}": own_experts(world, marked=marked, frozen=frozen)
        for marked in (True, False)
        for frozen in (True, False)
    }
    for name, how in {
        "all": {},
        "adapters": {"adapters": True},
        "bfloat16": {"dtype": torch.bfloat16},
        "bfloat16 stage 1": {"stage": 1, "dtype": torch.bfloat16},
        "stage 0": {"stage": 0},
        "bfloat16 stage 0": {"stage": 0, "dtype": torch.bfloat16},
        "bfloat16 on the host": {"stage": 1, "offload": "cpu", "dtype": torch.bfloat16},
        "bfloat16 on a disk": {"offload": "nvme", "dtype": torch.bfloat16},
    }.items():
        recipe = recipe_with(how.pop("stage", 2), how.pop("offload", "none"))
        found[name] = undisturbed(world, recipe, **how)
        found[f"{name} continued"] = continued(world, recipe, shared(world, found[name]["state"]), **how)
    found["to stage 0"] = continued(world, recipe_with(0), shared(world, found["all"]["state"]))
    found["to stage 1"] = continued(world, recipe_with(1), shared(world, found["all"]["state"]))
    found["to a disk"] = continued(world, recipe_with(2, "nvme"), shared(world, found["stage 0"]["state"]))
    for stage in (0, 1, 2):
        found[f"from plain torch, stage {stage}"] = continued(
            world, recipe_with(stage), torch.load(stored_by_plain_torch)
        )
    for name, compute in {"loop": in_a_loop, "grouped": lambda model: None}.items():
        found[f"idle {name}"] = step_with_idle_rank(world, compute)
    every_expert = worlds.start(expert_size=1)
    for stage, offload in SUMMED:
        found[f"sums {stage} {offload}"] = summed_gradients(every_expert, stage, offload)
    return found


def bfloat16_recipe(stage: int, offload: str) -> Recipe:
    recipe = recipe_of(Layout(ranks=2, accumulation=3, stage=stage, offload=offload))
    return recipe.model_copy(update={"router": Router(train=True)})


def summed_gradients(world: World, stage: int, offload: str) -> dict[str, Any]:
    """State and weights after one step over three micro-batches a rank with bfloat16 weights."""
    recipe = bfloat16_recipe(stage, offload)
    model = model_of(world.experts(EXPERTS), Layout())
    model.cast(torch.bfloat16)
    engine = engines.start(model, recipe, world, accumulation=3)
    parts = [t.view(3, 2, -1, TOKENS)[:, world.rank] for t in batch_of_step(1)]
    optimize(engine, [Batch(*(part[m] for part in parts)) for m in range(3)], recipe.router, world)
    return {
        "state": engines.training_state(engine, world),
        "weights": {name: p.detach().clone() for name, p in model.named_parameters()},
        "adamw": type(engine.optimizer.optimizer).__name__,
    }


def summed_in_plain_torch() -> tuple[dict[str, Tensor], float]:
    """The clipped gradient of the same step, its six parts summed in float32; and how far a bfloat16 sum is off."""
    model = model_of(range(EXPERTS), Layout())
    model.cast(torch.bfloat16)
    batch = batch_of_step(1)
    supervised, _ = token_counts([batch]).unbind()
    parameters = dict(model.named_parameters())
    exact = {name: torch.zeros(p.shape) for name, p in parameters.items()}
    rounded = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for part in range(6):
        ids, labels, segments = (t.view(6, -1, TOKENS)[part] for t in batch)
        loss = model(ids, segments, labels=labels).loss_sum / supervised
        for (name, _), gradient in zip(
            parameters.items(), torch.autograd.grad(loss.float(), list(parameters.values())), strict=True
        ):
            exact[name] += gradient.float()
            rounded[name] += gradient
    off = max(float((rounded[name] - value).norm() / value.norm()) for name, value in exact.items())
    norm = torch.stack([value.norm() for value in exact.values()]).norm()
    clip = min(1.0, bfloat16_recipe(2, "none").optim.clip_norm / float(norm))
    return {name: clip * value for name, value in exact.items()}, off


def moments_after_clipping(world: World, clip: float) -> tuple[float, float]:
    """Norm that the first step reports, and the norm of the gradient that reached the optimizer."""
    recipe = recipe_with(clip_norm=clip)
    engine = engine_of(world, recipe)
    norm = train(engine, recipe, world, [1])["norm"][0]
    state = engines.training_state(engine, world)
    used = torch.stack([v.norm() for k, v in state.items() if "::exp_avg" in k and "_sq" not in k]).norm()
    return norm, float(used) / (1 - recipe.optim.beta1)


def spoiled_step(world: World, recipe: Recipe, **how: Any) -> dict[str, Any]:
    """A step whose gradient is not a number."""
    engine = engine_of(world, recipe, **how)
    train(engine, recipe, world, [1])
    before = engines.training_state(engine, world)
    weight = engine.module.lm_head.weight.data
    kept = weight[0, 0].clone()
    weight[0, 0] = torch.nan
    norm = train(engine, recipe, world, [2])["norm"][0]
    weight[0, 0] = kept  # at stage 0 a float32 weight is its own master
    return {"norm": norm, "before": before, "after": engines.training_state(engine, world)}


def on_one_rank(rank: int, stored_by_two: Path) -> dict[str, Any]:
    world = worlds.start(expert_size=1)
    found: dict[str, Any] = {"clip": {clip: moments_after_clipping(world, clip) for clip in (0.0, 0.5, 1e6)}}
    found["all stage 1"] = undisturbed(world, recipe_with(1))
    stored = found["all stage 1"]["state"]
    found["all stage 1 continued"] = continued(world, recipe_with(1), stored)
    found["to stage 2"] = continued(world, recipe_with(2), stored)
    found["from two ranks"] = continued(world, recipe_with(2), torch.load(stored_by_two))
    found["spoiled"] = spoiled_step(world, recipe_with())
    found["spoiled stage 0"] = spoiled_step(world, recipe_with(0))
    found["spoiled bfloat16 stage 1"] = spoiled_step(world, recipe_with(1), dtype=torch.bfloat16)
    engine = engine_of(world, recipe_with())
    train(engine, recipe_with(), world, [1])
    engines.set_learning_rate(engine, 0.0)
    found["standing"] = [engines.training_state(engine, world)]
    train(engine, recipe_with(), world, [2])
    found["standing"].append(engines.training_state(engine, world))
    return found


def as_stored(parameters: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Tensors of whole parameters under the keys of a training state."""
    found = {}
    for name, value in parameters.items():
        if is_expert_parameter(name):
            found |= {f"{name}::{kind}::{expert}": value[expert].clone() for expert in range(EXPERTS)}
        else:
            found[f"{name}::{kind}"] = value.clone()
    return found


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    """The oracle: four steps in plain torch, with the state after the second and the fourth."""
    recipe = recipe_with()
    optim = recipe.optim
    model = model_of(range(EXPERTS), Layout())
    optimizer = torch.optim.AdamW(
        parameter_groups(model, optim.weight_decay), lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps
    )
    found: dict[str, Any] = {"loss": [], "norm": [], "state": []}
    for step in (*BEFORE, *AFTER):
        batch = batch_of_step(step)
        supervised, tokens = token_counts([batch]).unbind()
        output = model(batch.input_ids, batch.segment_ids, labels=batch.labels)
        rows = count_rows(output.routings)
        shares = (rows / rows.sum(1, keepdim=True)).float()
        router = router_loss(output.routings, batch.segment_ids, recipe.router, step_shares=shares, step_tokens=tokens)
        (output.loss_sum / supervised + router).float().backward()
        found["norm"].append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm)))
        found["loss"].append(float(output.loss_sum.detach() / supervised))
        optimizer.step()
        optimizer.zero_grad()
        parameters = dict(model.named_parameters())
        state = as_stored({name: p.detach() for name, p in parameters.items()}, "fp32")
        for moment in MOMENTS:
            state |= as_stored({name: optimizer.state[p][moment] for name, p in parameters.items()}, moment)
        found["state"].append(state)
    return found


@pytest.fixture(scope="module")
def plain_sums() -> tuple[dict[str, Tensor], float]:
    return summed_in_plain_torch()


@pytest.fixture(scope="module")
def two_ranks(plain: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    path = tmp_path_factory.mktemp("state") / "plain.pt"
    torch.save(plain["state"][1], path)
    return ranks(2, on_two_ranks, path, deadline_seconds=480)


@pytest.fixture(scope="module")
def one_rank(two_ranks: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("state") / "two-ranks.pt"
    torch.save(joined(two_ranks, "all", "state"), path)
    return ranks(1, on_one_rank, path)[0]


def joined(parts: list[dict[str, Any]], case: str, what: str) -> dict[str, Tensor]:
    """The training state that all ranks stored together."""
    return joined_states(part[case][what] for part in parts)


def joined_states(states: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for state in states:
        assert not found.keys() & state.keys(), "two ranks stored the same tensor"
        found |= state
    return found


def assert_state_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=tolerance, msg=lambda m, key=key: f"{key}: {m}")


def assert_goes_on(found: dict[str, Any], plain: dict[str, Any]) -> None:
    """Loss, norm and state of the steps after the restore, as if there had been none.

    The first loss shows which weights it was computed with. The rest is a matter of rounding: the gradient's norm moves
    by 2e-4 of itself when every parameter of this model moves by 1e-7; and 2e-6 is a thousandth of a step.
    """
    assert found["loss"] == pytest.approx(plain["loss"][2:], rel=1e-6)
    assert found["norm"] == pytest.approx(plain["norm"][2:], rel=1e-3)
    assert found["steps"] == 4


@pytest.mark.parametrize("frozen", [False, True])
def test_every_rank_keeps_its_own_experts(two_ranks: list[dict[str, Any]], frozen: bool) -> None:
    assert [part[f"own experts: marked=True {frozen=}"] for part in two_ranks] == [True, True]
    # What happens otherwise, without an error: rank 1 gets the experts of rank 0.
    assert [part[f"own experts: marked=False {frozen=}"] for part in two_ranks] == [True, False]


@pytest.mark.parametrize("where", ["two ranks", "one rank"])
def test_the_stored_state_is_that_of_plain_torch(
    where: str, plain: dict[str, Any], two_ranks: list[dict[str, Any]], one_rank: dict[str, Any]
) -> None:
    """Values and both moments of every parameter, so of every parameter group."""
    parts, case = (two_ranks, "all") if where == "two ranks" else ([one_rank], "all stage 1")
    state = joined(parts, case, "state")
    assert_state_close(state, plain["state"][1], tolerance=1e-6)
    for kind in ("exp_avg", "exp_avg_sq"):
        moved = {key for key, value in state.items() if f"::{kind}" in key and value.abs().max() > 0}
        assert {key for key in state if f"::{kind}" in key} == moved


RESUMED = ["all", "adapters", "bfloat16", "bfloat16 stage 1", "stage 0", "bfloat16 stage 0"]


@pytest.mark.parametrize("case", [*RESUMED, "bfloat16 on the host", "bfloat16 on a disk"])
def test_a_restored_run_is_the_undisturbed_one_bit_for_bit(case: str, two_ranks: list[dict[str, Any]]) -> None:
    for part in two_ranks:
        assert part[f"{case} continued"]["loss"] == part[case]["loss"]
        assert part[f"{case} continued"]["norm"] == part[case]["norm"]
    end = joined(two_ranks, case, "end")
    assert_state_close(joined(two_ranks, f"{case} continued", "end"), end, tolerance=0)
    moved = [key for key, value in joined(two_ranks, case, "state").items() if torch.equal(value, end[key])]
    assert not moved, f"did not train: {moved[:3]}"
    if case == "adapters":
        assert all(".lora_" in key for key in end)


def test_frozen_experts_are_each_ranks_own_after_a_restore(two_ranks: list[dict[str, Any]]) -> None:
    """DeepSpeed's own checkpoint puts rank 0's into every rank, without an error."""
    for part in two_ranks:
        kept = part["adapters continued"]["kept"]
        assert len([name for name in kept if is_expert_parameter(name)]) == 2 * len(CONFIG.moe_layers)
        assert all(kept.values())


@pytest.mark.parametrize(("stage", "offload"), SUMMED)
def test_bfloat16_gradients_are_summed_in_float32(
    stage: int, offload: str, two_ranks: list[dict[str, Any]], plain_sums: tuple[dict[str, Tensor], float]
) -> None:
    """Over micro-batches and over ranks. AdamW's first moment after one step is a tenth of the clipped gradient."""
    expected, off = plain_sums
    assert off > 1e-3  # what a sum in bfloat16 would lose
    case = f"sums {stage} {offload}"
    moment = 1 - bfloat16_recipe(stage, offload).optim.beta1
    state = joined_states(part[case]["state"] for part in two_ranks)
    for key, value in as_stored(expected, "exp_avg").items():
        assert (state[key] / moment - value).norm() <= 1e-5 * value.norm(), key
    assert {part[case]["adamw"] for part in two_ranks} == {"AdamW"}  # torch's: DeepSpeed's would be compiled here


@pytest.mark.parametrize(("stage", "offload"), SUMMED)
def test_decay_rates_are_float32_and_other_weights_rounded_masters(
    stage: int, offload: str, two_ranks: list[dict[str, Any]]
) -> None:
    case = f"sums {stage} {offload}"
    state = joined_states(part[case]["state"] for part in two_ranks)
    for part in two_ranks:
        for name, weight in part[case]["weights"].items():
            kept = name.endswith((".A_log", ".dt_bias"))
            assert weight.dtype == (torch.float32 if kept else torch.bfloat16), name
            for key, value in as_stored({name: weight}, "fp32").items():
                assert torch.equal(value, state[key] if kept else state[key].bfloat16()), key
            if kept:
                assert not torch.equal(weight, weight.bfloat16().float()), f"{name} is rounded"


@pytest.mark.parametrize(
    "case",
    [
        "to stage 0",
        "to stage 1",
        "to a disk",
        "from plain torch, stage 0",
        "from plain torch, stage 1",
        "from plain torch, stage 2",
    ],
)
def test_two_ranks_go_on_from_another_layout(case: str, plain: dict[str, Any], two_ranks: list[dict[str, Any]]) -> None:
    for part in two_ranks:
        assert_goes_on(part[case], plain)
    assert_state_close(joined(two_ranks, case, "end"), plain["state"][3], tolerance=2e-6)


@pytest.mark.parametrize("case", ["all stage 1 continued", "to stage 2", "from two ranks"])
def test_one_rank_goes_on_from_another_layout(case: str, plain: dict[str, Any], one_rank: dict[str, Any]) -> None:
    assert_goes_on(one_rank[case], plain)
    assert_state_close(one_rank[case]["end"], plain["state"][3], tolerance=2e-6)


@pytest.mark.parametrize("compute", ["loop", "grouped"])
def test_a_rank_whose_experts_receive_nothing_takes_part(compute: str, two_ranks: list[dict[str, Any]]) -> None:
    for rows, _ in (part[f"idle {compute}"] for part in two_ranks):
        assert rows[:, 4:].sum() == 0
        assert rows[:, :4].sum() > 0
    for rank, (_, state) in enumerate(part[f"idle {compute}"] for part in two_ranks):
        moments = [value for key, value in state.items() if ".mlp.experts." in key and "::exp_avg" in key]
        assert len(moments) == 2 * 2 * len(CONFIG.moe_layers) * 4
        assert any(value.any() for value in moments) is (rank == 0)


def test_the_gradient_is_clipped_as_the_recipe_says(plain: dict[str, Any], one_rank: dict[str, Any]) -> None:
    norm = plain["norm"][0]
    assert norm > 2  # DeepSpeed clips at 1 where nothing is said
    for clip, (reported, used) in one_rank["clip"].items():
        assert reported == pytest.approx(norm, rel=1e-5)
        assert used == pytest.approx(min(norm, clip) if clip else norm, rel=1e-4), f"clip_norm {clip}"


@pytest.mark.parametrize("case", ["spoiled", "spoiled stage 0", "spoiled bfloat16 stage 1"])
def test_a_gradient_that_is_not_a_number_is_reported_and_changes_nothing(case: str, one_rank: dict[str, Any]) -> None:
    found = one_rank[case]
    assert found["norm"] == float("inf")
    assert_state_close(found["after"], found["before"], tolerance=0)


def test_the_learning_rate_reaches_every_group(one_rank: dict[str, Any]) -> None:
    before, after = one_rank["standing"]
    for key, value in before.items():
        assert torch.equal(after[key], value) is ("::fp32" in key), key


class Noting(dict[str, Any]):
    """A configuration that notes which keys are asked for."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.asked: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offload", ["none", "cpu", "nvme"])
@pytest.mark.parametrize("stage", [1, 2])
def test_deepspeed_reads_every_key_of_its_configuration(stage: int, offload: str, dtype: torch.dtype) -> None:
    config = Noting(deepspeed_config(recipe_with(stage, offload, clip_norm=0.25), accumulation=3, dtype=dtype))
    config["gradient_clippingg"] = 1.0
    read = DeepSpeedConfig(config)
    assert set(config) - config.asked == {"gradient_clippingg"}  # it says nothing about a key that it does not know
    assert read.gradient_clipping == 0.25
    assert read.gradient_accumulation_steps == 3
    assert read.zero_optimization_stage == stage
    assert read.grad_accum_dtype == "fp32"
    assert read.communication_data_type == torch.float32
    offloaded = read.zero_config.offload_optimizer
    assert (offloaded.device if offloaded else "none") == offload
    assert read.bfloat16_config.enabled is (dtype == torch.bfloat16)
    assert read.zero_config.contiguous_gradients
    assert read.zero_config.reduce_scatter
    assert read.zero_config.overlap_comm is False


def test_a_state_on_disk_leaves_no_file_and_names_a_disk_that_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zeros = zeros_on_disk(tmp_path, torch.empty(3, 5))
    assert (zeros.shape, zeros.dtype, zeros.any()) == ((3, 5), torch.float32, False)
    zeros.add_(1)
    assert zeros.sum() == 15
    assert zeros_on_disk(tmp_path, torch.empty(0)).shape == (0,)  # a rank without a share of a group
    assert not list(tmp_path.iterdir())
    with pytest.raises(RecipeError, match=r"^parallel\.offload_path: .*absent: cannot hold 0\.00 GB more"):
        zeros_on_disk(tmp_path / "absent", torch.empty(2))

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(RecipeError, match=r"cannot hold 4\.00 GB more .*\(No space left on device\); free space"):
        zeros_on_disk(tmp_path, torch.empty(10**9, device="meta"))


def test_no_clipping_is_written_out() -> None:
    config = deepspeed_config(recipe_with(clip_norm=0.0), accumulation=1, dtype=torch.float32)
    assert DeepSpeedConfig(config).gradient_clipping == 0
    del config["gradient_clipping"]
    assert DeepSpeedConfig(config).gradient_clipping == 1  # why it is


def test_every_step_and_rank_draws_its_own_numbers_and_the_same_again() -> None:
    def drawn(seed: int, step: int, rank: int) -> float:
        seed_step(seed, step, rank)
        return float(torch.rand(()))

    places = [(seed, step, rank) for seed in (0, 1) for step in (1, 2, 12) for rank in (0, 1, 2)]
    found = [drawn(*place) for place in places]
    assert len(set(found)) == len(places)
    torch.rand(5)
    assert [drawn(*place) for place in places] == found
