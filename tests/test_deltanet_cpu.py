"""What a CPU does between the projections of a DeltaNet layer and its delta rule, against the definition."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from finetune.kernels.cpu.delta_rule_products import gated_delta_rule_by_products
from finetune.kernels.cpu.deltanet import prepare_cpu
from finetune.model.delta_rule import chunked_gated_delta_rule
from finetune.model.deltanet import Heads, Prepared, prepare
from tests.test_deltanet_kernel import (
    DEVICE,
    HEADS,
    SEGMENTS,
    SIZES,
    assert_close,
    check_documents_are_alone,
    check_nothing_reaches_another_document,
    inputs,
    layer,
    prepared_and_gradients,
    relative,
    segments_of,
    weights_like,
)


@pytest.mark.parametrize("heads", list(HEADS))
@pytest.mark.parametrize("size", [*SIZES, (3, 0)], ids=str)
@pytest.mark.parametrize("segments", SEGMENTS)
def test_prepare_is_the_definition(segments: str, size: tuple[int, int], heads: str) -> None:
    check(HEADS[heads], segments, *size, width=4)


@pytest.mark.parametrize("width", [1, 2, 3, 5])
def test_at_other_widths(width: int) -> None:
    for time in (1, 2, 14):
        check(HEADS["groups-of-3"], "packed-and-padded", 2, time, width)


def check(heads: Heads, segments: str, batch: int, time: int, width: int) -> None:
    tensors, segment_ids = inputs(heads, batch, time, width), segments_of(segments, batch, time).to(DEVICE)
    weights = weights_like(prepare(*tensors, segment_ids, heads))
    found, expected = (
        prepared_and_gradients(function, tensors, segment_ids, heads, weights) for function in (prepare_cpu, prepare)
    )
    if time:
        # As for the Triton kernels: the order of sums of at most 260 terms, and SiLU near zero under unit length.
        assert_close(found, expected, 2e-5)
    else:
        assert {name: x.shape for name, x in found.items()} == {name: x.shape for name, x in expected.items()}
        assert not found["d_conv_weight"].any()


def test_documents_are_each_alone_to_the_last_bit() -> None:
    check_documents_are_alone(prepare_cpu, HEADS["groups-of-3"], ("query", "key", "value", "gate", "d_qkvz"))


def test_nothing_reaches_another_document_not_even_nan() -> None:
    check_nothing_reaches_another_document(prepare_cpu)


def test_no_number_depends_on_the_rest_of_the_batch() -> None:
    """Nor on whether another sequence holds several documents, which is asked of the whole batch."""
    heads = HEADS["no-power-of-two"]
    tensors, segment_ids = inputs(heads, 2, 30), torch.stack((torch.zeros(30), torch.arange(30) // 7)).long().to(DEVICE)
    weights = weights_like(prepare(*tensors, segment_ids, heads))
    together = prepared_and_gradients(prepare_cpu, tensors, segment_ids, heads, weights)
    for place in (0, 1):
        here = slice(place, place + 1)
        own = [tensors[0][here], tensors[1][here], *tensors[2:]]
        alone = prepared_and_gradients(prepare_cpu, own, segment_ids[here], heads, [w[here] for w in weights])
        for name in ("query", "key", "value", "gate", "d_qkvz"):
            assert torch.equal(together[name][here], alone[name]), name


@pytest.mark.parametrize("trained", ["nothing else", "the convolution"])
def test_what_is_frozen_gets_no_gradient_and_keeps_no_input(trained: str) -> None:
    heads = HEADS["no-sharing"]
    qkvz, ba, *others = inputs(heads, 1, 9)
    others = [tensor.detach() for tensor in others]
    wanted = [qkvz, ba]
    if trained == "the convolution":
        wanted.append(others[0].requires_grad_())
    segment_ids = torch.zeros(1, 9, dtype=torch.long, device=DEVICE)
    weights = weights_like(prepare(qkvz, ba, *others, segment_ids, heads))
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x.untyped_storage().data_ptr()) or x, lambda x: x
    ):
        out = prepare_cpu(qkvz, ba, *others, segment_ids, heads)
    assert (qkvz.untyped_storage().data_ptr() in kept) == (trained == "the convolution")
    found = torch.autograd.grad(out, wanted, weights)
    expected = torch.autograd.grad(prepare(qkvz, ba, *others, segment_ids, heads), wanted, weights)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("only", Prepared._fields)
def test_outputs_that_nothing_reads(only: str) -> None:
    heads, segment_ids = HEADS["groups-of-3"], torch.zeros(2, 5, dtype=torch.long, device=DEVICE)
    tensors = inputs(heads, 2, 5)
    found, expected = (
        torch.autograd.grad(
            getattr(form(*tensors, segment_ids, heads), only).square().sum(),
            tensors, allow_unused=True, materialize_grads=True,
        )
        for form in (prepare_cpu, prepare)
    )  # fmt: skip
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    """As near to the definition in float32 as the definition in this dtype is; all of it is computed in float32."""
    heads = HEADS["groups-of-3"]
    tensors = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs(heads, 1, 20)]
    segment_ids = segments_of("packed-and-padded", 1, 20).to(DEVICE)
    exact = [tensor.detach().float().requires_grad_() for tensor in tensors]
    weights = [weight.to(dtype) for weight in weights_like(prepare(*tensors, segment_ids, heads))]
    wide = [w.to(x.dtype) for w, x in zip(weights, prepare(*exact, segment_ids, heads), strict=True)]
    expected = prepared_and_gradients(prepare, exact, segment_ids, heads, wide)
    found, defined = (
        prepared_and_gradients(form, tensors, segment_ids, heads, weights) for form in (prepare_cpu, prepare)
    )
    for name, exactly in expected.items():
        assert found[name].dtype == defined[name].dtype, name
        assert relative(found[name], exactly) <= 2 * relative(defined[name], exactly) + 1e-5, name


def test_layer_is_the_same_with_both_forms_and_computed_again() -> None:
    module = layer(HEADS["groups-of-3"])
    x, segment_ids = torch.randn(2, 70, 32, device=DEVICE), segments_of("packed-and-padded", 2, 70).to(DEVICE)
    forms: dict[str, tuple[Any, Any]] = {
        "definition": (prepare, chunked_gated_delta_rule),
        "cpu": (prepare_cpu, gated_delta_rule_by_products),
    }
    results: dict[str, dict[str, Tensor]] = {}
    for name, (module.prepare, module.rule) in forms.items():
        for again in (False, True):
            leaf = x.clone().requires_grad_()
            out = checkpoint(module, leaf, segment_ids, use_reentrant=False) if again else module(leaf, segment_ids)
            names, parameters = zip(*module.named_parameters(), strict=True)
            gradients = torch.autograd.grad(out.square().sum(), (leaf, *parameters))
            results[f"{name} {again}"] = dict(zip(("out", "x", *names), (out, *gradients), strict=True))
    assert_close(results["cpu False"], results["definition False"], bound=2e-5)
    assert all(torch.equal(results["cpu False"][name], x) for name, x in results["cpu True"].items())
