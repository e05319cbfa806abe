"""A window holds what transformers gives for the same documents, each alone; padding and recompute add nothing."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers.models.qwen3_next.modeling_qwen3_next import load_balancing_loss_func

from data.packing import Batch
from finetune.distributed.world import World
from finetune.model.model import PADDING, HybridMoEForCausalLM
from finetune.training.router_loss import count_rows
from finetune.training.totals import Totals, Windows
from tests.configs import CONFIGS
from tests.test_model import pair

VALUES = CONFIGS["dense-layers"]  # layers 1 and 2 route, 3 experts of 8 a token
EXPERTS, TOP_K, LAYERS, TIME = 8, 3, 2, 20
# Documents of every pack of every micro-batch; one pack, and one whole micro-batch, hold nothing but padding.
MICRO_BATCHES = [[[7, 1, 9], [20]], [[4, 4], []], [[], []], [[1], [19, 1]]]


@contextmanager
def alone() -> Iterator[World]:
    """A world of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield World(
            rank=0,
            size=1,
            device=torch.device("cpu"),
            expert_size=1,
            expert_rank=0,
            expert_data_rank=0,
            expert_group=None,
        )
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with alone() as found:
        yield found


def batch_of(packs: list[list[int]], seed: int, vocabulary: int = 96) -> Batch:
    """Random tokens in documents of these lengths, then padding; every third position of a document has no label."""
    ids = torch.randint(vocabulary, (len(packs), TIME), generator=torch.Generator().manual_seed(seed))
    labels, segments = torch.full_like(ids, -100), torch.full_like(ids, PADDING)
    for row, lengths in enumerate(packs):
        for document, length in enumerate(lengths):
            start = sum(lengths[:document])
            segments[row, start : start + length] = document
            labels[row, start : start + length - 1] = ids[row, start + 1 : start + length]
            labels[row, start : start + length : 3] = -100
    return Batch(ids, labels, segments)


def documents(batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
    """Input ids and labels of every document, each as a batch of its own."""
    for ids, labels, segments in zip(*batch, strict=True):
        for document in segments.unique().tolist():
            if document != PADDING:
                yield ids[segments == document].unsqueeze(0), labels[segments == document].unsqueeze(0)


@torch.no_grad()
def expected(theirs: torch.nn.Module, batches: list[Batch]) -> dict[str, Any]:
    """The sums of a window by transformers, document by document."""
    logits: list[list[Tensor]] = [[] for _ in range(LAYERS)]
    loss_sum, supervised = 0.0, 0
    for ids, labels in (found for batch in batches for found in documents(batch)):
        out = theirs(ids, use_cache=False, output_router_logits=True)
        loss_sum += float(F.cross_entropy(out.logits[0].double(), labels[0], reduction="sum"))
        supervised += int((labels != -100).sum())
        for layer, found in zip(logits, out.router_logits, strict=True):
            layer.append(found)
    layers = [torch.cat(layer) for layer in logits]
    chosen = [layer.topk(TOP_K, dim=-1).indices.flatten().numpy() for layer in layers]
    return {
        "loss_sum": loss_sum,
        "supervised_tokens": supervised,
        "tokens": len(layers[0]),
        "rows": np.stack([np.bincount(layer, minlength=EXPERTS) for layer in chosen]),
        "z_loss": np.array([float(layer.double().logsumexp(-1).square().mean()) for layer in layers]),
        "probability_sums": np.stack([layer.double().softmax(-1).sum(0).numpy() for layer in layers]),
        "balance_loss": np.array([float(load_balancing_loss_func((x,), EXPERTS, TOP_K)) / TOP_K for x in layers]),
    }


def add(windows: Windows, model: HybridMoEForCausalLM, batch: Batch) -> None:
    """Count a micro-batch as a step does: after its backward pass."""
    output = model(batch.input_ids, batch.segment_ids, labels=batch.labels)
    output.loss_sum.backward()
    windows.add(output, batch, count_rows(output.routings))


def assert_holds(totals: Totals, sums: dict[str, Any]) -> None:
    assert (totals.supervised_tokens, totals.tokens) == (sums["supervised_tokens"], sums["tokens"])
    assert totals.rows.dtype == np.int64
    assert np.array_equal(totals.rows, sums["rows"])
    assert totals.loss_sum == pytest.approx(sums["loss_sum"], rel=1e-5)
    for name in ("z_loss", "probability_sums", "balance_loss"):
        np.testing.assert_allclose(getattr(totals, name), sums[name], rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("recompute", [False, True])
def test_sums_equal_transformers_document_by_document(world: World, recompute: bool) -> None:
    ours, theirs = pair(VALUES)
    ours.recompute = recompute
    batches = [batch_of(packs, seed) for seed, packs in enumerate(MICRO_BATCHES)]
    windows = Windows(LAYERS, EXPERTS, world.device)
    for batch in batches:
        add(windows, ours, batch)
    report, routing = windows.close(world, report=True, routing=True)
    sums = expected(theirs, batches)
    assert sums["rows"].sum() == LAYERS * TOP_K * sum(map(sum, (pack for packs in MICRO_BATCHES for pack in packs)))
    assert len(set(sums["rows"].flatten().tolist())) > EXPERTS  # uneven enough to tell experts and layers apart
    assert_holds(report, sums)
    assert_holds(routing, sums)


def test_the_two_windows_begin_anew_each_at_its_own_time(world: World) -> None:
    ours, theirs = pair(VALUES)
    windows = Windows(LAYERS, EXPERTS, world.device)
    batches = [batch_of([[7 + i], [3, 3]], seed=i) for i in range(4)]
    closed = []
    for batch, (report, routing) in zip(
        batches, [(True, False), (False, True), (True, True), (False, False)], strict=True
    ):
        add(windows, ours, batch)
        closed.append(windows.close(world, report=report, routing=routing))
    # Which batches each window holds when it is closed, after the first step, the second, and so on.
    since_report = [[0], [1], [1, 2], [3]]
    since_routing = [[0], [0, 1], [2], [3]]
    for step, (report, routing) in enumerate(closed):
        assert_holds(report, expected(theirs, [batches[i] for i in since_report[step]]))
        assert_holds(routing, expected(theirs, [batches[i] for i in since_routing[step]]))


def test_an_empty_window_is_zero_and_not_nan(world: World) -> None:
    report, routing = Windows(LAYERS, EXPERTS, world.device).close(world, report=True, routing=True)
    for totals in (report, routing):
        assert totals.tokens == totals.supervised_tokens == totals.loss_sum == 0
        assert not totals.balance_loss.any()
        assert not totals.z_loss.any()


CONVERSIONS = ("__bool__", "__int__", "__float__", "__index__", "item", "tolist", "numpy", "cpu")
WAITS = {*CONVERSIONS, "bincount", "nonzero", "unique", "masked_select"}  # these learn their size from the values


class Waits(TorchFunctionMode):
    """Lists every call on a tensor that would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(function, "__name__", "")
        if name in WAITS or (name == "to" and "cpu" in map(str, args[1:])):
            self.calls.append(name)
        return function(*args, **(kwargs or {}))


def test_closing_costs_one_all_reduce_and_one_copy_and_adding_none(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, _ = pair(VALUES)
    windows = Windows(LAYERS, EXPERTS, world.device)
    batch = batch_of(MICRO_BATCHES[0], seed=0)
    output = ours(batch.input_ids, batch.segment_ids, labels=batch.labels)
    reduced: list[Tensor] = []
    monkeypatch.setattr(dist, "all_reduce", reduced.append)
    with Waits() as adding:
        windows.add(output, batch, count_rows(output.routings))
    with Waits() as closing:
        windows.close(world, report=True, routing=True)
    assert adding.calls == []
    assert closing.calls == ["cpu", "numpy"]  # the copy, and a view of what was copied
    assert len(reduced) == 1
    with Waits() as check:  # the count can see what it must
        float(output.loss_sum.detach())
        assert bool(torch.ones(1)[0].to("cpu"))
    assert check.calls == ["__float__", "to", "__bool__"]
