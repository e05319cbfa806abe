"""Held-out loss and drift against plain loops over transformers' model, on one rank and on two."""

import math
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data.dataset import Dataset
from data.loader import EvaluationBatches
from data.packing import Batch
from finetune.distributed.world import World
from finetune.model.config import ModelConfig
from finetune.model.model import HybridMoEForCausalLM, initialise
from finetune.recipe.sections import MIXER_TARGETS
from finetune.training.evaluation import HeldOut, compare_routing, held_out, probe_routing
from finetune.training.lora import base_model, inject
from finetune.training.nonfinite import broken_weights
from monitoring.paired import paired_change
from monitoring.routing import jensen_shannon_bits, routing_drift
from tests.configs import CONFIGS, randomise
from tests.ranks import ranks
from tests.test_window import alone, batch_of, documents

VALUES = CONFIGS["dense-layers"]  # layers 1 and 2 route, 3 experts of 8 a token
CONFIG = ModelConfig.from_dict(VALUES)
# In the order of the rows; the last one is filled up with padding.
HELD_OUT = [
    batch_of([[7, 1, 9], [20]], 0),
    batch_of([[4, 4], [3]], 1),
    batch_of([[20], [11]], 2),
    batch_of([[], []], 3),
]
PROBES = [batch_of([[20], [5, 6]], 4), batch_of([[13], []], 5)]
PROBE = Batch(*(torch.cat(parts) for parts in zip(*PROBES, strict=True)))


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with alone() as found:
        yield found


def model_with_adapters(experts: range = range(8), strength: float = 0.0) -> HybridMoEForCausalLM:
    """The same on every rank; factor B is drawn `strength` large, 0 as adapters start."""
    whole, model = HybridMoEForCausalLM(CONFIG), HybridMoEForCausalLM(CONFIG, experts)
    randomise(whole, seed=1)
    mine = slice(experts.start, experts.stop)
    model.load_state_dict({k: v[mine] if ".mlp.experts." in k else v for k, v in whole.state_dict().items()})
    inject(model, rank=2, alpha=4.0, dropout=0.3, targets=MIXER_TARGETS, seed=0)
    generator = torch.Generator().manual_seed(9)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data.copy_(strength * torch.randn(parameter.shape, generator=generator))
    return model.train()


@torch.no_grad()
def losses_by_hand(model: HybridMoEForCausalLM) -> list[tuple[float, int]]:
    """Summed loss and supervised tokens of every held-out batch, document by document."""
    parts = []
    for batch in HELD_OUT:
        found = [
            F.cross_entropy(model(ids).logits[0].double(), labels[0], reduction="sum")
            for ids, labels in documents(batch)
        ]
        parts.append((float(sum(found)), int((batch.labels != -100).sum())))
    return parts


def test_held_out_loss_is_that_of_every_document_alone(world: World) -> None:
    model = model_with_adapters(strength=0.05)
    result = held_out(model, HELD_OUT, world)
    assert model.training  # as it was; and yet no dropout:
    expected = losses_by_hand(model.eval())
    assert expected[3] == (0, 0)
    assert [n for _, n in result.parts] == [n for _, n in expected[:3]]
    assert [loss for loss, _ in result.parts] == pytest.approx([loss for loss, _ in expected[:3]], rel=1e-5)
    total, tokens = sum(loss for loss, _ in expected), sum(n for _, n in expected)
    assert result.tokens == tokens
    assert result.loss == pytest.approx(total / tokens, rel=1e-5)
    held_out(model, HELD_OUT[:1], world)
    assert not model.training


def routed_by_hand(model: HybridMoEForCausalLM) -> tuple[list[list[list[set[int]]]], np.ndarray, np.ndarray]:
    """Of every layer: the experts of each probe token, rows of each expert, and mean probabilities; without dropout."""
    model.eval()
    chosen: list[list[list[set[int]]]] = [[], []]
    logits: list[list[np.ndarray]] = [[], []]
    with torch.no_grad():
        for ids, _ in documents(PROBE):
            for layer, routing in enumerate(model(ids).routings.values()):
                chosen[layer] += [set(token) for token in routing.logits.topk(3, dim=-1).indices.tolist()]
                logits[layer].append(routing.logits.double().numpy())
    model.train()
    rows = np.array([[sum(e in token for token in layer) for e in range(8)] for layer in chosen])
    z = [np.exp(np.concatenate(layer)) for layer in logits]
    return chosen, rows, np.stack([(p / p.sum(1, keepdims=True)).mean(0) for p in z])


def test_routing_of_the_base_comes_back_when_trained_adapters_are_off() -> None:
    model = model_with_adapters()
    before = probe_routing(model, PROBE)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(4):
        model(PROBE.input_ids, PROBE.segment_ids, labels=PROBE.labels).loss_sum.backward()
        optimizer.step()
        optimizer.zero_grad()
    with base_model(model):
        off = probe_routing(model, PROBE)
    on = probe_routing(model, PROBE)
    assert model.training
    for field in ("experts", "counts", "probability_sums"):
        assert torch.equal(getattr(off, field), getattr(before, field)), field
        assert not torch.equal(getattr(on, field), getattr(before, field)), field


def test_comparison_is_counted_token_by_token(world: World) -> None:
    model = model_with_adapters(strength=0.15)
    with base_model(model):
        base, (base_chosen, base_rows, base_p) = probe_routing(model, PROBE), routed_by_hand(model)
    now, (chosen, rows, p) = probe_routing(model, PROBE), routed_by_hand(model)
    both = compare_routing(base, now, world)
    kept = [
        np.mean([len(a & b) / 3 for a, b in zip(before, after, strict=True)])
        for before, after in zip(base_chosen, chosen, strict=True)
    ]
    assert all(0.2 < fraction < 0.95 for fraction in kept)
    np.testing.assert_allclose(both.kept.numpy(), kept)
    assert np.array_equal(both.base_counts.numpy(), base_rows)
    assert np.array_equal(both.counts.numpy(), rows)
    np.testing.assert_allclose(both.base_probabilities.numpy(), base_p, rtol=1e-5)
    np.testing.assert_allclose(both.probabilities.numpy(), p, rtol=1e-5)
    drifts = routing_drift(
        layers=CONFIG.moe_layers,
        base_counts=both.base_counts.numpy(),
        counts=both.counts.numpy(),
        kept=both.kept.numpy(),
        base_probabilities=both.base_probabilities.numpy(),
        probabilities=both.probabilities.numpy(),
    )
    for row, drift in enumerate(drifts):
        assert drift.load_bits == pytest.approx(
            divergence(base_rows[row] / base_rows[row].sum(), rows[row] / rows[row].sum())
        )
        assert drift.probability_bits == pytest.approx(divergence(base_p[row], p[row]), rel=1e-4)


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    """Jensen-Shannon, as the mean of two Kullback-Leibler divergences from the middle."""
    return sum(0.5 * x * math.log2(2 * x / (x + y)) for x, y in [*zip(p, q, strict=True), *zip(q, p, strict=True)] if x)


def test_a_model_compared_with_itself_has_not_moved(world: World) -> None:
    routing = probe_routing(model_with_adapters(strength=0.15), PROBE)
    both = compare_routing(routing, routing, world)
    assert both.kept.tolist() == [1, 1]
    assert torch.equal(both.base_counts, both.counts)
    assert jensen_shannon_bits(both.base_probabilities[0].numpy(), both.probabilities[0].numpy()) == 0


def measured(rank: int, size: int) -> tuple[HeldOut, dict[str, Any]]:
    """Held-out loss and drift, with data and experts divided over the ranks."""
    from finetune.distributed import world as worlds
    from finetune.distributed.expert_exchange import attach

    world = worlds.start(size)
    model = model_with_adapters(world.experts(8), strength=0.15)
    attach(model, world.expert_group)
    evaluated = held_out(model, HELD_OUT[rank::size], world)
    with base_model(model):
        base = probe_routing(model, PROBES[rank])
    return evaluated, vars(compare_routing(base, probe_routing(model, PROBES[rank]), world))


def test_two_ranks_measure_what_one_does(world: World) -> None:
    model = model_with_adapters(strength=0.15)
    expected = held_out(model, HELD_OUT, world)
    with base_model(model):
        base = probe_routing(model, PROBE)
    comparison = vars(compare_routing(base, probe_routing(model, PROBE), world))
    for evaluated, both in ranks(2, measured, 2):
        assert evaluated.loss == pytest.approx(expected.loss, rel=1e-6)
        assert evaluated.tokens == expected.tokens
        assert [n for _, n in evaluated.parts] == [n for _, n in expected.parts]
        assert np.allclose([loss for loss, _ in evaluated.parts], [loss for loss, _ in expected.parts])
        for field, value in comparison.items():
            torch.testing.assert_close(both[field], value, msg=lambda m, field=field: f"{field}: {m}")


# Packs of as many supervised tokens each, so that their order shows in the losses alone.
PACKS = [batch_of([[16]], seed) for seed in range(10, 17)]


class Packs:
    """The held-out set of `PACKS`."""

    def __len__(self) -> int:
        return len(PACKS)

    def batch(self, packs: Any, *, at_least: int) -> Batch:
        chosen = [PACKS[int(pack)] for pack in packs]
        chosen += [batch_of([[]], 0)] * (at_least - len(chosen))
        return Batch(*(torch.cat(parts) for parts in zip(*chosen, strict=True)))


def parts_on(rank: int, size: int, expert: int) -> list[tuple[float, int]]:
    """The parts that this rank of so many records, of a held-out set that does not divide over them."""
    from finetune.distributed import world as worlds
    from finetune.distributed.expert_exchange import attach

    world = worlds.start(expert)
    model = model_with_adapters(world.experts(8), strength=0.15)
    if world.expert_group is not None:
        attach(model, world.expert_group)
    batches = EvaluationBatches(cast(Dataset, Packs()), packs_per_micro_batch=1, rank=rank, ranks=size)
    return held_out(model, batches, world).parts


@pytest.mark.parametrize(("size", "expert"), [(2, 2), pytest.param(4, 1, marks=pytest.mark.slow)])
def test_the_parts_do_not_depend_on_the_number_of_ranks(world: World, size: int, expert: int) -> None:
    """So that a run measured on some ranks, then continued on others, is compared row by row with itself."""
    model = model_with_adapters(strength=0.15)
    before = held_out(model, PACKS, world).parts
    losses = [loss for loss, _ in before]
    assert len({n for _, n in before}) == 1
    assert min(abs(a - b) for i, a in enumerate(losses) for b in losses[:i]) > 0.1  # a mistaken order shows
    for after in ranks(size, parts_on, size, expert):
        assert [n for _, n in after] == [n for _, n in before]
        # On other ranks an expert multiplies other rows at once, which rounds otherwise.
        assert [loss for loss, _ in after] == pytest.approx(losses, rel=1e-6 if expert > 1 else 0)
        change = paired_change(before, after)
        assert change is not None
        assert change == pytest.approx((0, 0), abs=1e-6)


def parts_of(tokens: np.ndarray, losses: np.ndarray) -> list[tuple[float, int]]:
    return [(float(loss * n), int(n)) for loss, n in zip(losses, tokens, strict=True)]


def test_change_and_error_are_those_of_a_bootstrap_over_micro_batches() -> None:
    draw = np.random.default_rng(0)
    tokens = draw.integers(20, 400, 60)
    before = 2.5 + draw.normal(0, 0.5, 60)  # what makes a micro-batch hard is much more than what training changes
    after = before - 0.2 + draw.normal(0, 0.05, 60)
    change, error = paired_change(parts_of(tokens, before), parts_of(tokens, after))
    assert change == pytest.approx((tokens * (after - before)).sum() / tokens.sum())
    assert change == pytest.approx(-0.2, abs=0.03)  # the loss fell
    again = draw.integers(0, 60, (20_000, 60))
    resampled = (tokens * (after - before))[again].sum(1) / tokens[again].sum(1)
    assert error == pytest.approx(resampled.std(), rel=0.05)


def test_with_equal_tokens_the_error_is_that_of_a_mean() -> None:
    before, after = np.array([3.0, 2.0, 4.0, 2.5]), np.array([2.5, 1.9, 3.1, 2.6])
    change, error = paired_change(parts_of(np.full(4, 50), before), parts_of(np.full(4, 50), after))
    assert change == pytest.approx((after - before).mean())
    assert error == pytest.approx((after - before).std(ddof=1) / 2)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([(5.0, 3), (4.0, 2)], [(5.0, 3), (4.0, 1)]),
        ([(5.0, 3), (4.0, 2)], [(5.0, 3)]),
        ([(5.0, 3)], [(4.0, 3)]),
        ([], []),
    ],
    ids=["other-tokens", "other-number", "one-part", "nothing"],
)
def test_what_cannot_be_paired_has_no_error(before: list[tuple[float, int]], after: list[tuple[float, int]]) -> None:
    assert paired_change(before, after) is None


def broken_on_rank_1(rank: int) -> str | None:
    from finetune.distributed import world as worlds

    world = worlds.start(2)
    model = HybridMoEForCausalLM(CONFIG, world.experts(8))
    initialise(model, 0)
    assert broken_weights(model, world) is None
    if rank == 1:
        with torch.no_grad():
            model.model.layers[2].mlp.experts.down_proj[1, 2, 3] = math.nan
            model.lm_head.weight[5, 6] = math.inf
    return broken_weights(model, world)


def test_weights_that_are_no_longer_finite_are_named_on_every_rank() -> None:
    found, same = ranks(2, broken_on_rank_1)
    assert found == same
    assert found.startswith("2 weights hold infinite or undefined numbers, which they did not when they were loaded: ")
    assert "layers.2.mlp.experts.down_proj (1 of 2,048 numbers, the first at [1, 2, 3]) on rank 1" in found
    assert "lm_head.weight (1 of 3,072 numbers, the first at [5, 6]) on rank 1" in found
