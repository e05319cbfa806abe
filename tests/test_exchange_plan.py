"""What the planner says experts send, against the bytes that a real training step hands to the all-to-all."""

from dataclasses import replace
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from data.packing import Batch
from finetune.commands.plan import print_plan
from finetune.distributed import world as worlds
from finetune.distributed.expert_exchange import attach
from finetune.engine import engine as engines
from finetune.model.config import ModelConfig
from finetune.model.model import HybridMoEForCausalLM
from finetune.plan.exchange import Links, exchange
from finetune.plan.planner import plan
from finetune.plan.recompute import asked_for
from finetune.plan.report import render
from finetune.plan.workload import GIB, Machine
from finetune.recipe.recipe import Recipe, RecipeError
from finetune.training.lora import inject
from finetune.training.step import optimize
from tests.configs import randomise, tiny_config
from tests.ranks import ranks
from tests.test_planner import code, recipe_of

# Every token to every expert: load is even, which is what the planner assumes, so the figures must be equal.
CONFIG = ModelConfig.from_dict(tiny_config(num_experts_per_tok=8))
SEQUENCE, NODE = 32, 2  # tokens; ranks of a machine
BALANCE = {"coefficient": 1e-2}


class Case(NamedTuple):
    recompute: str = "none"
    accumulation: int = 1
    lora: dict[str, Any] | None = None
    router: dict[str, Any] = {}  # noqa: RUF012  # never changed

    def recipe(self, size: int) -> Recipe:
        return recipe_of(
            train={
                "steps": 1,
                "sequence_tokens": SEQUENCE,
                "micro_batch_tokens": 2 * SEQUENCE,
                "global_batch_tokens": 2 * SEQUENCE * size * self.accumulation,
                "recompute": self.recompute,
            },
            lora=self.lora,
            router=self.router,
            parallel={"ranks": size, "expert": size},
        )


CASES = {
    "full-parameter": Case(router={"train": True}),
    "adapters-recomputed": Case("full", lora={"rank": 4}),
    "experts-recomputed": Case("experts"),
    "mixers-recomputed": Case("attention", lora={"rank": 4}),
    "three-micro-batches": Case("full", 3, lora={"rank": 4}),
    "load-counted-ahead": Case("full", 2, router={"train": True, "balance": BALANCE}),
    "load-counted-ahead-not-recomputed": Case("none", 2, router={"train": True, "balance": BALANCE}),
}


def sent_in_a_step(rank: int, size: int) -> dict[str, tuple[int, int]]:
    """Bytes handed to the all-to-all for other ranks of this machine, and for those of others, by case."""
    return {name: count(rank, case.recipe(size), case.accumulation) for name, case in CASES.items()}


def count(rank: int, recipe: Recipe, accumulation: int) -> tuple[int, int]:
    world = worlds.start(recipe.parallel.expert)
    model = HybridMoEForCausalLM(CONFIG, world.experts(CONFIG.num_experts))
    randomise(model, 0)
    if recipe.lora is not None:
        lora = recipe.lora
        inject(model, rank=lora.rank, alpha=lora.alpha, dropout=0, targets=lora.targets, seed=0)
    for name, parameter in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            parameter.requires_grad_(recipe.router.train)
    assert world.expert_group is not None
    attach(model, world.expert_group)
    model.recompute = asked_for(CONFIG, recipe.train.recompute) or ()
    model.train()
    engine = engines.start(model, recipe, world, accumulation=accumulation)
    ids = torch.randint(0, CONFIG.vocab_size, (2, SEQUENCE), generator=torch.Generator().manual_seed(rank))
    batches = [Batch(ids, ids, torch.zeros_like(ids))] * accumulation
    sent = [0, 0]
    real = dist.all_to_all_single

    def counting(out: Tensor, given: Tensor, receive: Any = None, send: Any = None, **kind: Any) -> Any:
        rows = send or [len(given) // world.size] * world.size
        for peer, number in enumerate(rows):
            if peer != rank:
                sent[peer // NODE != rank // NODE] += number * given[0].numel() * given.itemsize
        return real(out, given, receive, send, **kind)

    with patch.object(dist, "all_to_all_single", counting):
        optimize(engine, batches, recipe.router, world)
    return sent[0], sent[1]


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_what_is_planned_is_what_a_step_sends(size: int) -> None:
    machine = Machine(ranks=size, ranks_per_node=NODE, device_name="CPU", device_bytes=None)
    for rank, measured in enumerate(ranks(size, sent_in_a_step, size)):
        for name, case in CASES.items():
            made = plan(CONFIG, case.recipe(size), machine).exchange
            assert made is not None
            assert measured[name] == (made.times * made.node_bytes, made.times * made.network_bytes), (rank, name)
            assert (made.network_bytes > 0) == (size > NODE)


def sizes(expert_size: int, ranks_: int, per_node: int, links: Links = Links()) -> Any:  # noqa: B008
    """One layer and micro-batch of the released model, bfloat16, with recompute."""
    return exchange(
        **{"layers": 48, "micro_batches": 1, "tokens": 8192, "hidden": 2048, "weight_bytes": 2, "num_experts": 512},
        **{"experts_per_token": 10, "forward_passes": 2},
        expert_size=expert_size,
        ranks=ranks_,
        ranks_per_node=per_node,
        links=links,
    )


ROWS = 8192 * 10 * 2048 * 2 * 6  # there and back in two forward passes and a backward pass
COUNTS = 512 * 8 * 2


@pytest.mark.parametrize(
    ("expert_size", "ranks_", "per_node", "within", "away"),
    [
        (8, 8, 8, 7 / 8, 0),  # one machine
        (8, 16, 8, 7 / 8, 0),  # a copy of the experts on each of two
        (16, 16, 8, 7 / 16, 8 / 16),  # shared out over both
        (4, 6, 3, 0, 3 / 4),  # the fourth rank is alone on the second machine
        (2, 2, 1, 0, 1 / 2),
    ],
)
def test_what_goes_over_the_network_follows_from_where_ranks_are(
    expert_size: int, ranks_: int, per_node: int, within: float, away: float
) -> None:
    made = sizes(expert_size, ranks_, per_node)
    assert made.node_bytes == pytest.approx((ROWS + COUNTS) * within)
    assert made.network_bytes == pytest.approx((ROWS + COUNTS) * away)


def test_time_is_that_of_the_slower_link_which_a_machines_ranks_share() -> None:
    whole = ROWS + COUNTS
    # 450 GB/s for each GPU; 50 GB/s for the eight of a machine.
    made = sizes(16, 16, 8, Links(node_gbit=3600, network_gbit=400))
    assert made.seconds == pytest.approx(48 * max(whole * 7 / 16 / 450e9, whole * 8 / 16 / (50e9 / 8)))
    inside = sizes(8, 16, 8, Links(node_gbit=3600))
    assert inside.seconds == pytest.approx(48 * whole * 7 / 8 / 450e9)
    assert sizes(16, 16, 8, Links(node_gbit=3600)).seconds is None
    assert sizes(16, 16, 8, Links(network_gbit=400)).seconds is None


H100S = Machine(ranks=16, ranks_per_node=8, device_name="NVIDIA H100 80GB HBM3", device_bytes=80 * GIB)
REFERENCE = ModelConfig.from_dict({"model_type": "qwen3_next"})


def test_the_plan_says_it_in_words() -> None:
    recipe = code("parallel.ranks=16", "parallel.expert=16", "train.recompute=full")
    text = render(plan(REFERENCE, recipe, replace(H100S, links=Links(network_gbit=3200))))
    assert "exchange of rows between experts, in 2 forward passes and the backward pass: a rank sends 840." in text
    assert " MiB within its machine and 960." in text
    assert "at 3,600 Gbit/s a rank within a machine and 3,200 Gbit/s a machine" in text
    assert "its time: not known; --network-gbit says" in render(plan(REFERENCE, recipe, H100S))
    other = replace(H100S, device_name="NVIDIA H100 PCIe", links=Links(network_gbit=3200))
    assert "its time: not known; --node-gbit says" in render(plan(REFERENCE, recipe, other))
    assert "exchange of rows" not in render(plan(REFERENCE, code("parallel.expert=1"), H100S))


def test_the_command_plans_for_several_machines(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = code("parallel.ranks=16", "parallel.expert=16")
    assert print_plan(recipe, ranks=16, nodes=4, device_gib=80, links=Links(network_gbit=400, node_gbit=3600)) == 0
    out = capsys.readouterr().out
    assert "16 ranks (GPU with 80 GiB, 4 a node), expert parallel 16" in out
    assert "Gbit/s a machine" in out
    with pytest.raises(RecipeError, match=r"2 rank.* cannot be spread over 3 machines"):
        print_plan(recipe, ranks=2, nodes=3, device_gib=80, links=Links())
