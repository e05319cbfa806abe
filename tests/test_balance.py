"""Router losses of a whole step: the same however its documents are laid out, and proved to reach what trains."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data.packing import Batch
from finetune.distributed.world import World
from finetune.model import model as models
from finetune.model.model import PADDING, HybridMoEForCausalLM
from finetune.recipe.sections import MIXER_TARGETS, Balance, Router
from finetune.training.lora import inject
from finetune.training.router_loss import (
    RouterLossError,
    count_ahead,
    count_rows,
    prove_reach,
    router_loss,
    shares_of_step,
)
from finetune.training.step import token_counts
from tests.configs import CONFIGS, tiny_config
from tests.test_model import random_model
from tests.test_window import alone

KINDS = ["global", "micro", "sequence"]
LENGTHS = [9, 1, 14, 5, 3, 8]
DOCUMENTS = [
    torch.randint(96, (length,), generator=torch.Generator().manual_seed(i)) for i, length in enumerate(LENGTHS)
]
# Which documents make which pack. Micro-batches of one step, all on one rank.
LAYOUTS = {
    "packed": ([[[0, 1, 2], [3, 4, 5]]], 24, False),
    "recomputed": ([[[0, 1, 2], [3, 4, 5]]], 24, True),
    "in-another-order": ([[[5, 2, 1], [0], [4, 3]]], 24, False),
    "padded": ([[[0], [1], [2], [3], [4], [5]]], 14, True),
    "padding-appended": ([[[0, 1, 2], [], [3, 4, 5], []]], 40, True),
}
DIVIDED = {
    "a-pack-at-a-time": ([[[0, 1, 2]], [[3, 4, 5]]], 24, False),
    "with-a-batch-of-padding": ([[[0, 1, 2]], [[], []], [[3, 4], [5]]], 30, True),
}


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with alone() as found:
        yield found


def router_of(kind: str = "global", balance: float = 0.3, z: float = 0.02) -> Router:
    return Router(train=True, balance=Balance(kind=kind, coefficient=balance), z_coefficient=z)


def batch_of(packs: list[list[int]], time: int) -> Batch:
    ids, segments = torch.zeros(len(packs), time, dtype=torch.long), torch.full((len(packs), time), PADDING)
    for row, documents in enumerate(packs):
        start = 0
        for segment, document in enumerate(documents):
            end = start + LENGTHS[document]
            ids[row, start:end], segments[row, start:end] = DOCUMENTS[document], segment
            start = end
    return Batch(ids, torch.full_like(ids, -100), segments)


def step_of(
    model: HybridMoEForCausalLM, layout: tuple[list[list[list[int]]], int, bool], router: Router, world: World
) -> tuple[float, dict[str, Tensor]]:
    """Router loss of a step, and the gradient that it gives to every parameter."""
    micro_batches, time, model.recompute = layout
    model.zero_grad()
    batches = [batch_of(packs, time) for packs in micro_batches]
    tokens = token_counts(batches)[1]
    shares = shares_of_step(count_ahead(model, batches), world)
    total = 0.0
    for batch in batches:
        routings = model(batch.input_ids, batch.segment_ids).routings
        loss = router_loss(routings, batch.segment_ids, router, step_shares=shares, step_tokens=tokens)
        loss.float().backward()
        total += loss.item()
    return total, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@torch.no_grad()
def by_hand(model: HybridMoEForCausalLM, kind: str, micro_batches: list[list[int]]) -> float:
    """The loss as its equations say, in float64, from every document run alone.

    Args:
        micro_batches: the documents of each, over which `micro` balances.
    """
    alone = [list(model(ids.unsqueeze(0)).routings.values()) for ids in DOCUMENTS]
    groups = {"global": [list(range(6))], "micro": micro_batches, "sequence": [[i] for i in range(6)]}[kind]
    loss = 0.0
    for layer in range(len(alone[0])):
        logits = [document[layer].logits.double().numpy() for document in alone]
        chosen = [document[layer].experts.numpy() for document in alone]
        everything = np.concatenate(logits)
        for group in groups:
            rows = np.concatenate([chosen[i].ravel() for i in group])
            z = np.concatenate([logits[i] for i in group])
            share = np.bincount(rows, minlength=z.shape[1]) / rows.size
            p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
            loss += 0.3 * z.shape[1] * (share @ p.sum(0)) / len(everything)
        loss += 0.02 * (np.log(np.exp(everything).sum(1)) ** 2).mean()
    return loss


@pytest.mark.parametrize("name", ["base", "dense-layers", "layer-types-top-1"])
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradients_do_not_depend_on_the_layout(name: str, kind: str, world: World) -> None:
    model, router = random_model({**CONFIGS[name], "vocab_size": 96}), router_of(kind)
    expected, gradients = step_of(model, LAYOUTS["packed"], router, world)
    gradients = {name: gradient.clone() for name, gradient in gradients.items()}
    assert expected == pytest.approx(by_hand(model, kind, [list(range(6))]), rel=1e-6)
    assert {n for n, _ in model.named_parameters() if n.endswith("mlp.gate.weight")} < gradients.keys()
    layouts = LAYOUTS if kind == "micro" else LAYOUTS | DIVIDED
    for layout in layouts:
        value, found = step_of(model, layouts[layout], router, world)
        assert value == pytest.approx(expected, rel=1e-6), layout
        assert found.keys() == gradients.keys()
        for parameter, gradient in gradients.items():
            worst = (found[parameter] - gradient).abs().max() / gradient.abs().max()
            assert worst < 1e-4, f"{layout}: {parameter} is off by {worst:.1e} of its largest entry"


def test_each_kind_balances_over_tokens_of_its_own(world: World) -> None:
    model = random_model(tiny_config())
    layout = DIVIDED["a-pack-at-a-time"]
    values = {kind: step_of(model, layout, router_of(kind), world)[0] for kind in KINDS}
    for kind, value in values.items():
        assert value == pytest.approx(by_hand(model, kind, [[0, 1, 2], [3, 4, 5]]), rel=1e-6), kind
    # The fewer tokens, the less evens out.
    assert values["global"] + 0.02 < values["micro"] < values["sequence"] - 0.02
    one_each = ([[[i]] for i in range(6)], 14, False)
    alike = {kind: step_of(model, one_each, router_of(kind), world)[0] for kind in KINDS}
    assert alike["micro"] == pytest.approx(alike["sequence"], rel=1e-6)
    assert alike["global"] == pytest.approx(values["global"], rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_micro_batch_of_padding_has_no_part_in_the_loss(kind: str) -> None:
    model = random_model(tiny_config())
    batch = batch_of([[], []], 9)
    routings = model(batch.input_ids, batch.segment_ids).routings
    shares = torch.full((4, 8), 1 / 8)
    tokens = torch.tensor(40.0, dtype=torch.float64)
    loss = router_loss(routings, batch.segment_ids, router_of(kind), step_shares=shares, step_tokens=tokens)
    loss.float().backward()
    assert loss.item() == 0
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("recompute", [False, True])
def test_counting_ahead_sees_the_routing_that_is_differentiated(recompute: bool) -> None:
    """With dropout on, which changes what the routers see: the same random numbers are drawn again."""
    model = random_model(tiny_config())
    model.recompute = recompute
    inject(model, rank=4, alpha=8.0, dropout=0.5, targets=MIXER_TARGETS, seed=0)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.3)
    batches = [batch_of(packs, 24) for packs in ([[0, 1, 2]], [[3, 4, 5]], [[5, 2]])]
    torch.manual_seed(11)
    ahead = count_ahead(model.train(), batches)
    counted = torch.zeros_like(ahead)
    for batch in batches:  # in the order of a step: forward, backward, forward, backward
        routings = model(batch.input_ids, batch.segment_ids).routings
        counted += count_rows(routings)
        sum(r.logits.square().sum() for r in routings.values()).backward()
    assert torch.equal(ahead, counted)
    assert not torch.equal(ahead, count_ahead(model, batches))  # other random numbers would have been seen
    expected = [np.bincount(r.experts.flatten().numpy(), minlength=8) for r in routings.values()]
    assert np.array_equal(count_rows(routings).numpy(), np.stack(expected))


BATCH = batch_of([[0, 1, 2], [3, 4, 5]], 24)


def gradient_norm(model: HybridMoEForCausalLM, **router: Any) -> float:
    """Norm of the gradient that a router loss gives to what trains, over one batch."""
    model.zero_grad()
    routings = model(BATCH.input_ids, BATCH.segment_ids).routings
    rows = count_rows(routings)
    shares = rows / rows.sum(1, keepdim=True)
    tokens = token_counts([BATCH])[1]
    router_loss(
        routings, BATCH.segment_ids, router_of(**router), step_shares=shares, step_tokens=tokens
    ).float().backward()
    return float(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("trained", ["router", "adapters", "everything"])
def test_the_proof_finds_the_gradient_norm_of_each_loss(trained: str, recompute: bool, world: World) -> None:
    model = random_model(tiny_config())
    model.recompute = recompute
    if trained == "adapters":
        inject(model, rank=2, alpha=4.0, dropout=0.0, targets=MIXER_TARGETS, seed=0)
    for name, parameter in model.named_parameters():
        if trained == "router":
            parameter.requires_grad_(name.endswith("mlp.gate.weight"))
    found = prove_reach(model, BATCH, router_of(), world)
    expected = {
        "router.balance.coefficient": gradient_norm(model, z=0.0),
        "router.z_coefficient": gradient_norm(model, balance=0.0),
    }
    assert found == pytest.approx(expected, rel=1e-4)
    assert min(found.values()) > 1e-4


def test_nothing_is_proved_of_a_loss_that_is_off(world: World) -> None:
    model = random_model(tiny_config())
    assert list(prove_reach(model, BATCH, router_of(balance=0.0), world)) == ["router.z_coefficient"]
    assert list(prove_reach(model, BATCH, router_of(z=0.0), world)) == ["router.balance.coefficient"]
    assert prove_reach(model, BATCH, router_of(balance=0.0, z=0.0), world) == {}


@pytest.mark.parametrize("trained", ["lm_head.weight", "model.layers.3.mlp.experts.down_proj", "nothing"])
def test_a_loss_that_reaches_nothing_that_trains_is_refused(trained: str, world: World) -> None:
    model = random_model(tiny_config())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == trained)  # each comes after the last router
    sentence = r"^router\.z_coefficient is 0\.02, but its loss gives a gradient of 0 to everything that trains; train"
    with pytest.raises(RouterLossError, match=sentence):
        prove_reach(model, BATCH, router_of(balance=0.0), world)


def test_a_loss_that_is_not_finite_is_refused(world: World) -> None:
    model = random_model(tiny_config())
    model.get_parameter("model.layers.0.mlp.gate.weight").data *= 1e30
    with pytest.raises(
        RouterLossError, match=r"router\.z_coefficient is 0\.02, but its loss gives a gradient of (inf|nan)"
    ):
        prove_reach(model, BATCH, router_of(balance=0.0), world)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("trained", ["router", "everything"])
def test_reentrant_checkpointing_would_be_caught(trained: str, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs each layer without gradient first, so that the returned router logits lead nowhere."""
    model = random_model(tiny_config())
    model.recompute = True
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained == "everything" or name.endswith("mlp.gate.weight"))
    assert prove_reach(model, BATCH, router_of(), world)
    checkpoint = models.checkpoint
    monkeypatch.setattr(models, "checkpoint", lambda *args, **_: checkpoint(*args, use_reentrant=True))
    with pytest.raises(RouterLossError, match="gives a gradient of 0"):
        prove_reach(model, BATCH, router_of(), world)
