"""AdamW in 8 bits: the library's own result on two ranks, a resume bit for bit, other layouts, and the plan's bytes.

The oracle is one process with the whole batch and bitsandbytes' optimizer by its defaults, every expert a parameter of
its own. Two ranks add gradients in another order, so a moment that lies between two codes may fall to the other one.
"""

import sys
from dataclasses import replace
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from data.packing import Batch
from finetune.commands.plan import _refusals_here
from finetune.distributed import world as worlds
from finetune.distributed.expert_exchange import attach
from finetune.engine import engine as engines
from finetune.engine.eight_bit import initial_codes
from finetune.engine.optimizer import learning_rate, parameter_groups
from finetune.kernels.torch.experts import experts_grouped
from finetune.model.config import ModelConfig
from finetune.model.model import HybridMoEForCausalLM
from finetune.model.moe import Experts
from finetune.plan.planner import plan
from finetune.recipe.notes import notes
from finetune.recipe.recipe import Recipe, RecipeError
from finetune.recipe.rules import RULES
from finetune.recipe.sections import Lora, Optim, Router
from finetune.run.packages import check_packages
from finetune.training.step import optimize
from tests.configs import randomise, tiny_config
from tests.ranks import ranks
from tests.test_planner import CPU
from tests.test_rank_layouts import PACKS, TOKENS, Layout, batch_of, recipe_of

needs_library = pytest.mark.skipif(
    find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed; it is in the extras optim8bit and dev",
)
# The expert's gate_up_proj has 4,096 numbers and its down_proj 2,048; the embedding ends in a part of a block.
CONFIG = ModelConfig.from_dict(tiny_config(hidden_size=64, moe_intermediate_size=32, vocab_size=97))
STEPS, BEFORE = (1, 2, 3), (1, 2)
KINDS = {"state1", "state2", "absmax1", "absmax2"}


def recipe_for(layout: Layout) -> Recipe:
    recipe = recipe_of(layout)
    optim = Optim(**recipe.optim.model_dump() | {"name": "adamw_8bit"})
    return recipe.model_copy(update={"optim": optim, "router": Router(train=True)})


def model_of(experts: range) -> HybridMoEForCausalLM:
    whole, model = HybridMoEForCausalLM(CONFIG), HybridMoEForCausalLM(CONFIG, experts)
    randomise(whole, seed=1)
    model.load_state_dict(
        {
            name: value[experts.start : experts.stop] if ".mlp.experts." in name else value
            for name, value in whole.state_dict().items()
        }
    )
    for module in model.modules():
        if isinstance(module, Experts):
            module.compute = experts_grouped
    return model


def start(layout: Layout, *, spoiled: bool = False) -> tuple[engines.ExpertEngine, worlds.World]:
    world = worlds.start(layout.expert)
    model = model_of(world.experts(CONFIG.num_experts))
    if spoiled:
        for parameter in model.parameters():
            parameter.data.mul_(0.5).add_(0.1)
    if world.expert_group is not None:
        attach(model, world.expert_group)
    return engines.start(model, recipe_for(layout), world, accumulation=1), world


def train(engine: engines.ExpertEngine, layout: Layout, world: worlds.World, steps: tuple[int, ...]) -> dict[str, Any]:
    recipe = recipe_for(layout)
    for step in steps:
        parts = [t.view(world.size, PACKS // world.size, TOKENS)[world.rank] for t in batch_of(layout, step)]
        engines.set_learning_rate(engine, learning_rate(step, steps=len(STEPS), optim=recipe.optim))
        optimize(engine, [Batch(*parts)], recipe.router, world)
    mine = engines.training_state(engine, world)
    return {name: value for part in world.gather(mine) for name, value in part.items()}


def undisturbed_and_resumed(rank: int) -> dict[str, dict[str, Tensor]]:
    layout = Layout(ranks=2, expert=2, stage=0)
    engine, world = start(layout)
    stored = train(engine, layout, world, BEFORE)
    found = {"stored": stored, "undisturbed": train(engine, layout, world, STEPS[len(BEFORE) :])}
    for name, other in (("resumed", layout), ("resumed elsewhere", replace(layout, expert=1))):
        engine, world = start(other, spoiled=True)
        engines.restore(engine, stored.__getitem__, step=BEFORE[-1])
        found[name] = train(engine, other, world, STEPS[len(BEFORE) :])
    return found


@pytest.fixture(scope="module")
def two_ranks() -> dict[str, dict[str, Tensor]]:
    return ranks(2, undisturbed_and_resumed)[0]


@pytest.fixture(scope="module")
def plain() -> dict[str, Tensor]:
    """The last state of bitsandbytes' optimizer in a loop of its own, by the names of a checkpoint."""
    from bitsandbytes.optim import AdamW8bit

    optim, model = recipe_for(Layout(stage=0)).optim, model_of(range(CONFIG.num_experts))
    decay = {
        id(parameter): group["weight_decay"]
        for group in parameter_groups(model, optim.weight_decay)
        for parameter in group["params"]  # type: ignore[attr-defined]
    }
    pieces: dict[str, tuple[Tensor, torch.nn.Parameter]] = {}  # a view of the model's parameter, and what is stepped on
    groups = []
    for name, parameter in model.named_parameters():
        whole = [(f"::{e}", parameter[e]) for e in range(len(parameter))] if ".experts." in name else [("", parameter)]
        for ending, view in whole:
            own = torch.nn.Parameter(view.detach().clone())
            pieces[f"{name}::KIND{ending}"] = view, own
            groups.append({"params": [own], "weight_decay": decay[id(parameter)]})
    optimizer = AdamW8bit(groups, betas=(optim.beta1, optim.beta2), eps=optim.eps)
    for step in STEPS:
        batch = batch_of(Layout(stage=0), step)
        output = model(batch.input_ids, batch.segment_ids, labels=batch.labels)
        (output.loss_sum / output.token_count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm)
        for name, parameter in model.named_parameters():
            for expert in range(len(parameter)) if ".experts." in name else [None]:
                key = f"{name}::KIND" + ("" if expert is None else f"::{expert}")
                assert parameter.grad is not None
                pieces[key][1].grad = (parameter.grad if expert is None else parameter.grad[expert]).clone()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps=len(STEPS), optim=optim)
        optimizer.step()
        model.zero_grad()
        with torch.no_grad():
            for view, own in pieces.values():
                view.copy_(own)
    state = {key.replace("KIND", "fp32"): own.detach() for key, (_, own) in pieces.items()}
    for key, (_, own) in pieces.items():
        kept = optimizer.state[own]
        state |= {key.replace("KIND", kind): kept[kind] for kind in KINDS if kind in kept}
    return state


def assert_near(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal but for the rounding of sums: it moves one code in a thousand at most, by the largest step between codes.

    Near zero that is many codes, which lie as close together as rounding errors.
    """
    from bitsandbytes.functional import create_dynamic_map

    values = {"state1": create_dynamic_map(signed=True), "state2": create_dynamic_map(signed=False)}
    assert state.keys() == expected.keys()
    moved = codes = 0
    for name, value in state.items():
        assert value.dtype == expected[name].dtype, name
        assert value.shape == expected[name].shape, name
        if value.dtype == torch.uint8:
            of_code = values[name.split("::")[1]]
            difference = (of_code[value.long()] - of_code[expected[name].long()]).abs()
            assert difference.max() <= 1.01 * of_code.diff().max(), name
            moved, codes = moved + int((difference > 0).sum()), codes + value.numel()
        else:
            torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=2e-6, msg=name)
    assert moved < codes / 1000
    assert codes > 100_000


@needs_library
def test_two_ranks_train_as_the_library_alone(two_ranks: dict[str, Any], plain: dict[str, Tensor]) -> None:
    assert_near(two_ranks["undisturbed"], plain)
    kept = {name for name, value in plain.items() if value.dtype == torch.uint8}
    assert {name.split("::")[0].rpartition("layers.")[2] for name in kept} >= {
        "model.embed_tokens.weight",
        "0.mlp.experts.gate_up_proj",
    }
    assert "model.layers.0.mlp.experts.down_proj::absmax1::0" not in plain  # it has 2,048 numbers


@needs_library
def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(two_ranks: dict[str, Any]) -> None:
    undisturbed, resumed = two_ranks["undisturbed"], two_ranks["resumed"]
    assert undisturbed.keys() == resumed.keys()
    assert all(torch.equal(resumed[name], value) for name, value in undisturbed.items())
    assert not all(torch.equal(two_ranks["stored"][name], value) for name, value in undisturbed.items())


@needs_library
def test_another_expert_parallel_size_goes_on_from_what_is_stored(two_ranks: dict[str, Any]) -> None:
    assert_near(two_ranks["resumed elsewhere"], two_ranks["undisturbed"])


@needs_library
def test_an_expert_that_would_share_a_block_with_the_next_one_keeps_float32() -> None:
    from bitsandbytes.optim import AdamW8bit

    optimizer = AdamW8bit([torch.nn.Parameter(torch.zeros(1))])
    apart, across = torch.zeros(3, 64, 68), torch.zeros(3, 65, 67)  # 17 blocks an expert, and 17.01
    assert initial_codes(optimizer, apart, 3)["absmax2"].shape == (3 * 17,)
    assert initial_codes(optimizer, across, 3)["state1"].dtype == torch.float32
    assert initial_codes(optimizer, across, 0)["absmax1"].shape == (52,)  # no expert's: the last block is a part


@needs_library
def test_the_plan_counts_what_is_stored(two_ranks: dict[str, Any]) -> None:
    made = plan(CONFIG, recipe_for(Layout(ranks=2, expert=2, stage=0)), replace(CPU, ranks=2))
    stored = two_ranks["undisturbed"]
    assert made.checkpoint_bytes == sum(value.nbytes for value in stored.values())
    first = [
        value for name, value in stored.items() if not name.endswith(("::4", "::5", "::6", "::7"))
    ]  # expert rank 0
    kept = sum(value.nbytes for value in first) - sum(
        value.nbytes for name, value in stored.items() if "::fp32" in name and any(value is one for one in first)
    )
    assert made.memory["AdamW moments in 8 bits"] == kept
    assert made.host_save_bytes == sum(value.nbytes for value in first)


def test_the_plan_counts_adapters_of_experts_one_by_one() -> None:
    recipe = recipe_for(Layout(stage=0)).model_copy(
        update={"lora": Lora(rank=64, alpha=1.0, targets=("experts",)), "router": Router()}
    )
    made = plan(CONFIG, recipe, replace(CPU, ranks=1))
    # Factors of each expert's gate_up_proj: 64 x 64 twice; of its down_proj: 64 x 32, which stays float32, and 64 x 64.
    codes, numbers = 3 * 4096, 2048
    expected = CONFIG.num_experts * len(CONFIG.moe_layers) * (2 * (codes + 4 * codes // 256) + 2 * 4 * numbers)
    assert made.memory["AdamW moments in 8 bits"] == expected


def problems(layout: Layout) -> list[str]:
    return [problem for _, rule in RULES if (problem := rule(recipe_for(layout))) is not None]


def test_where_blocks_would_be_cut_apart_it_is_refused() -> None:
    told = "adamw_8bit quantises matrices in blocks, which ZeRO-1 and 2 would cut apart; set parallel.zero_stage to 0"
    assert problems(Layout(stage=2)) == [f"{told}, or take adamw"]
    assert problems(Layout(stage=1, offload="cpu")) == [f"{told} and parallel.offload to none, or take adamw"]
    assert problems(Layout(ranks=2, expert=2, stage=0)) == []


def test_its_settings_are_those_of_adamw() -> None:
    recipe = recipe_for(Layout(stage=0))
    changed = recipe.optim.model_copy(update={"beta1": 0.8, "beta2": 0.9, "eps": 1e-3})
    assert not [note for note in notes(recipe.model_copy(update={"optim": changed})) if "optim." in note]


@pytest.mark.parametrize(("installed", "state"), [(None, "is not installed"), ("0.46.1", "is version 0.46.1 here")])
def test_a_missing_library_is_one_sentence(installed: str | None, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if installed is None:
            raise metadata.PackageNotFoundError(name)
        return installed

    recipe = recipe_for(Layout(stage=0))
    monkeypatch.setattr("finetune.run.packages.version", version)
    with pytest.raises(RecipeError) as caught:
        check_packages(recipe)
    sentence = (
        f"optim.name: adamw_8bit needs the package bitsandbytes, which {state}; install it with"
        f" `{sys.executable} -m pip install 'bitsandbytes>=0.50'`, or set optim.name to adamw"
    )
    assert str(caught.value) == sentence
    assert _refusals_here(recipe) == [f"on this machine the run would not start: {sentence}"]
    check_packages(recipe_of(Layout(stage=0)))
