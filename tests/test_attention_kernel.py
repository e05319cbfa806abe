"""Norm and rotation before attention, the gate after it, and documents without a mask, against their definitions."""

from typing import Any

import pytest
import torch
from torch import Tensor

from finetune.kernels.triton.attention import attend_documents, document_starts, gate_output_fused, prepare_fused
from finetune.model.attention import (
    GatedAttention,
    Packing,
    attend_masked,
    document_mask,
    gate_output,
    prepare,
)
from finetune.model.config import ModelConfig
from finetune.model.layers import positions_in_segments, rotary_table
from tests.configs import CONFIGS, randomise
from tests.kernels import assert_as_exact, assert_equal_forms, outputs_and_gradients

EPS = 1e-6
#        batch, time, heads, kv heads, head dim, rotary dims
SIZES = [(1, 1, 1, 1, 4, 2), (2, 63, 3, 1, 12, 6), (1, 130, 2, 1, 16, 4), (3, 5, 2, 2, 10, 10), (0, 7, 2, 1, 8, 4)]


def inputs(
    batch: int, time: int, heads: int, kv_heads: int, dim: int, rotary: int, dtype: torch.dtype = torch.float32,
    trains: bool = True,
) -> list[Any]:  # fmt: skip
    positions = torch.randint(1000, (batch, time))
    tensors = [torch.randn(batch, time, 2 * heads * dim), torch.randn(batch, time, kv_heads * dim)]
    weights = [(0.3 * torch.randn(dim)).to(dtype).requires_grad_(trains) for _ in range(2)]
    return [
        *(tensor.to(dtype).requires_grad_() for tensor in tensors),
        *rotary_table(positions, rotary, 1e4, dtype),
        *weights,
        EPS,
    ]


@pytest.mark.parametrize("trains", [True, False], ids=["weights", "frozen"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_prepare(sizes: tuple[int, ...], trains: bool) -> None:
    assert_equal_forms(prepare_fused, prepare, inputs(*sizes, trains=trains), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("read", [0, 1, 2], ids=["query", "key", "gate"])
def test_prepare_where_one_output_is_read_alone(read: int) -> None:
    given = inputs(2, 5, 2, 1, 6, 4, trains=False)
    if read != 1:
        given[1] = given[1].detach()
    else:
        given[0] = given[0].detach()
    forms = (lambda *x, form=form: form(*x)[read] for form in (prepare_fused, prepare))
    assert_equal_forms(*forms, given, rtol=1e-5, atol=2e-5)


def gated(*sizes: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    batch, time, heads, dim = sizes
    beside = torch.randn(batch, time, heads, 2 * dim)[..., dim:]  # as it lies beside the query
    heads_first = torch.randn(batch, heads, time, dim).transpose(1, 2)  # as some attention kernels leave their output
    return [heads_first.to(dtype).requires_grad_(), beside.to(dtype).requires_grad_()]


@pytest.mark.parametrize("sizes", [(1, 1, 1, 4), (2, 63, 3, 12), (1, 130, 2, 8), (0, 3, 2, 4)], ids=str)
def test_gate_output(sizes: tuple[int, ...]) -> None:
    out, gate = gated(*sizes)
    assert_equal_forms(gate_output_fused, gate_output, [out, gate], rtol=1e-5, atol=1e-5)
    both = torch.randn(*sizes[:3], 2 * sizes[3]).requires_grad_()
    forms = (lambda o, x, form=form: form(o, x.chunk(2, dim=-1)[1]) for form in (gate_output_fused, gate_output))
    assert_equal_forms(*forms, [out, both], rtol=1e-5, atol=1e-5)


def between(prepared: tuple[Tensor, Tensor, Tensor], gate_form: Any) -> Tensor:
    """Something that mixes queries and keys, in place of attention."""
    query, key, gate = prepared
    return gate_form(query * key.mean(2, keepdim=True).roll(1, 1), gate)


def test_the_gradients_of_query_and_gate_share_one_tensor() -> None:
    given = inputs(2, 9, 3, 1, 8, 4, trains=False)
    written = []

    def fused(*x: Any) -> Tensor:
        query, key, gate = prepare_fused(*x)
        if gate.requires_grad:
            gate.register_hook(lambda gradient: written.append(gradient.untyped_storage().data_ptr()))
            x[0].register_hook(lambda gradient: written.append(gradient.untyped_storage().data_ptr()))
        return between((query, key, gate), gate_output_fused)

    found = outputs_and_gradients(fused, given)
    expected = outputs_and_gradients(lambda *x: between(prepare(*x), gate_output), given)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)
    assert len(written) == 2
    assert written[0] == written[1], "the gradient of the gate was copied"


def test_a_gate_that_is_read_twice_gets_both_gradients() -> None:
    def form(prepare_form: Any, gate_form: Any) -> Any:
        def run(*x: Any) -> Tensor:
            prepared = prepare_form(*x)
            return between(prepared, gate_form) + prepared[2].square().flatten(-2)

        return run

    given = inputs(2, 9, 3, 1, 8, 4)
    assert_equal_forms(form(prepare_fused, gate_output_fused), form(prepare, gate_output), given, rtol=1e-5, atol=2e-5)


def test_bfloat16() -> None:
    assert_as_exact(prepare_fused, prepare, inputs(1, 5, 2, 1, 8, 4, torch.bfloat16))
    assert_as_exact(gate_output_fused, gate_output, gated(1, 5, 2, 8, dtype=torch.bfloat16))


@pytest.mark.parametrize("packed", [False, True], ids=["one-document", "packed"])
@pytest.mark.parametrize("values", CONFIGS.values(), ids=CONFIGS)
def test_whole_attention(values: dict[str, Any], packed: bool) -> None:
    config = ModelConfig.from_dict(values)
    module = GatedAttention(config)
    randomise(module, seed=3)
    segments = torch.tensor([[0] * 11 + [1] + [2] * 7, [0] * 19])
    table = rotary_table(positions_in_segments(segments), config.rotary_dim, config.rope_theta, torch.float32)
    mask = document_mask(Packing(segments, 4, 19)) if packed else None

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        named = dict(zip((name for name, _ in module.named_parameters()), parameters, strict=True))
        return torch.func.functional_call(module, named, (x, *table, mask))

    x = torch.randn(2, 19, config.hidden_size).requires_grad_()
    given = [x, *module.parameters()]
    expected = outputs_and_gradients(run, given)
    module.prepare, module.gate_output = prepare_fused, gate_output_fused
    for a, b in zip(outputs_and_gradients(run, given), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("segments", "starts", "longest"),
    [
        ([[0, 0, 0]], [0, 3], 3),
        ([[0, 1, 1, 2], [0, 0, -1, -1]], [0, 1, 3, 4, 6, 8], 2),
        ([[5, 5, 5, 0], [0, 0, 0, 0]], [0, 3, 4, 8], 4),
    ],
    ids=["one", "one-token-documents-and-padding", "the-same-id-in-two-sequences"],
)
def test_documents_start_where_ids_change_and_sequences_begin(
    segments: list[list[int]], starts: list[int], longest: int
) -> None:
    ids = torch.tensor(segments)
    positions = positions_in_segments(ids)
    packing = Packing(ids, int((positions == 0).sum()), int(positions.max()) + 1)
    documents = document_starts(packing)
    assert documents.starts.dtype == torch.int32
    assert (documents.starts.tolist(), documents.longest) == (starts, longest)


@pytest.mark.gpu
def test_documents_without_a_mask() -> None:
    lengths = [1, 300, 2, 64, 1, 129, 15]
    ids = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)]).view(1, -1).expand(2, -1).contiguous().cuda()
    packing = Packing(ids, 2 * len(lengths), max(lengths))
    query, key, value = (torch.randn(2, ids.shape[1], heads, 256).cuda().bfloat16() for heads in (4, 2, 2))
    exact = [t.float().requires_grad_() for t in (query, key, value)]
    found = [t.requires_grad_() for t in (query, key, value)]
    gradient = torch.randn_like(query)
    out = attend_documents(*found, document_starts(packing))
    expected = attend_masked(*exact, document_mask(packing))
    pairs = zip(
        (out, *torch.autograd.grad(out, found, gradient)),
        (expected, *torch.autograd.grad(expected, exact, gradient.float())),
        strict=True,
    )
    for a, b in pairs:
        assert (a.float() - b).norm() <= 0.01 * b.norm()
