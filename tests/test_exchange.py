"""Experts shared out over ranks give what transformers' block gives with all of them: outputs and every gradient."""

import functools
import itertools
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from finetune.distributed.expert_exchange import attach
from finetune.kernels.torch.experts import experts_grouped
from finetune.model.config import ModelConfig
from finetune.model.moe import MoE, experts_in_a_loop
from tests.configs import randomise, tiny_config
from tests.ranks import ranks

HIDDEN = 32
FORMS = [(compute, recompute) for compute in ("loop", "grouped") for recompute in (False, True)]


class Case(NamedTuple):
    tokens: tuple[int, ...]  # of each of four ranks; two ranks have the first two
    top_k: int = 2
    idle: bool = False  # only experts 0 to 3 of 8 receive anything

    def config(self) -> dict[str, object]:
        return tiny_config(num_experts_per_tok=self.top_k, norm_topk_prob=self.top_k > 1)


CASES = {
    "unequal": Case((17, 5, 1, 30)),
    "one-rank-has-no-token": Case((0, 9, 0, 4)),
    "no-rank-has-a-token": Case((0, 0, 0, 0)),
    "top-1": Case((3, 12, 7, 1), top_k=1),
    "every-expert": Case((2, 6, 1, 3), top_k=8),
    "experts-that-receive-nothing": Case((6, 13, 4, 9), idle=True),
}


def reference(case: Case) -> nn.Module:
    # Imported here, because the ranks import this file too and have no use for seconds of transformers.
    from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextSparseMoeBlock

    config = Qwen3NextConfig(**case.config())
    config._experts_implementation = "eager"
    block = Qwen3NextSparseMoeBlock(config)
    randomise(block, seed=3)
    if case.idle:
        # Of x @ v and -x @ v one is above zero, which is what the others score: the best two are among the first four.
        with torch.no_grad():
            block.gate.weight[1], block.gate.weight[3] = -block.gate.weight[0], -block.gate.weight[2]
            block.gate.weight[4:] = 0
    return block


def inputs(rank: int, case: Case) -> tuple[Tensor, Tensor]:
    """Tokens of a rank, and what the loss weighs its outputs with."""
    generator = torch.Generator().manual_seed(10 + rank)
    shape = (case.tokens[rank], HIDDEN)
    return torch.randn(shape, generator=generator).requires_grad_(), torch.randn(shape, generator=generator)


@functools.cache
def expected(name: str) -> list[dict[str, Tensor]]:
    """Output and gradients on each of four ranks, by transformers' block on that rank's tokens alone."""
    case, block, found = CASES[name], reference(CASES[name]), []
    for rank in range(4):
        block.zero_grad()
        x, weight = inputs(rank, case)
        out = block(x.unsqueeze(0)).squeeze(0)
        (out * weight).sum().backward()
        gradients = {k: torch.zeros_like(p) if p.grad is None else p.grad.clone() for k, p in block.named_parameters()}
        found.append({"out": out.detach(), "x": x.grad, **gradients})
        assert not case.idle or block.gate(x)[2].max() < 4
    return found


def on_rank(
    rank: int, world: int, expert_sizes: list[int], states: dict[str, dict[str, Tensor]]
) -> dict[tuple[int, str, str, bool], dict[str, Tensor]]:
    """Output and gradients for every expert parallel size, case and form."""
    found = {}
    for size in expert_sizes:
        groups = [dist.new_group(list(range(first, first + size))) for first in range(0, world, size)]
        each = 8 // size
        mine = slice(rank % size * each, (rank % size + 1) * each)
        for name, case in CASES.items():
            block = MoE(ModelConfig.from_dict(case.config()), each)
            block.load_state_dict({k: v[mine] if k.startswith("experts.") else v for k, v in states[name].items()})
            attach(block, groups[rank // size])
            for compute, recompute in FORMS:
                block.experts.compute = {"loop": experts_in_a_loop, "grouped": experts_grouped}[compute]
                found[size, name, compute, recompute] = run(block, rank, case, recompute)
    return found


def run(block: MoE, rank: int, case: Case, recompute: bool) -> dict[str, Tensor]:
    block.zero_grad()
    x, weight = inputs(rank, case)
    out, routing = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
    assert routing.logits.shape == (case.tokens[rank], 8)
    (out * weight).sum().backward()
    return {"out": out.detach(), "x": x.grad, **{k: p.grad for k, p in block.named_parameters()}}


@pytest.mark.parametrize(("world", "expert_sizes"), [(2, [2]), (4, [4, 2])], ids=["2-ranks", "4-ranks"])
def test_shared_out_experts_equal_transformers_block(world: int, expert_sizes: list[int]) -> None:
    states = {name: dict(reference(case).state_dict()) for name, case in CASES.items()}
    parts = ranks(world, on_rank, world, expert_sizes, states)
    for size, name, form in itertools.product(expert_sizes, CASES, FORMS):
        found = [part[size, name, *form] for part in parts]
        alone = expected(name)[:world]
        for key in alone[0]:
            if not key.startswith("experts."):
                pairs = [(found[rank][key], alone[rank][key]) for rank in range(world)]
            else:  # an expert's gradient is the sum over the ranks that send it tokens, and lies where the expert is
                firsts = range(0, world, size)
                pairs = [
                    (torch.cat([f[key] for f in found[i : i + size]]), sum(e[key] for e in alone[i : i + size]))
                    for i in firsts
                ]
            for ours, theirs in pairs:
                what = f"{name}, {size} expert ranks, {form}: {key}"
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, msg=lambda m, w=what: f"{w}: {m}")
