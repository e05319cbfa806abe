"""The fused passes of a DeltaNet layer against their definitions: output, gradients, documents to the last bit."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from finetune.kernels.triton import deltanet
from finetune.kernels.triton.deltanet import prepare_fused
from finetune.kernels.triton.gated_norm import gated_norm_fused
from finetune.model.config import ModelConfig
from finetune.model.deltanet import GatedDeltaNet, Heads, Prepare, Prepared, prepare
from finetune.model.layers import gated_rms_norm
from tests.configs import randomise, tiny_config

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-6
HEADS = {
    "groups-of-3": Heads(keys=2, values=6, key_dim=16, value_dim=32),
    "no-power-of-two": Heads(keys=3, values=6, key_dim=5, value_dim=7),
    "one-key-head": Heads(keys=1, values=3, key_dim=32, value_dim=16),
    "no-sharing": Heads(keys=2, values=2, key_dim=8, value_dim=8),
}
# (batch, tokens): a token alone, fewer than the convolution's width, across the edges of programs and their walks.
SIZES = [(1, 1), (1, 3), (2, 63), (1, 130)]


@pytest.fixture(autouse=True)
def short_walks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward passes walk through 4 tokens instead of 32: the interpreter is slow, and more edges are crossed."""
    monkeypatch.setattr(deltanet, "STEPS", 4)


def segments_of(kind: str, batch: int, time: int) -> Tensor:
    if kind == "one-document":
        return torch.zeros(batch, time, dtype=torch.long)
    if kind == "one-token-each":
        return torch.arange(time).expand(batch, time)
    ids = (torch.rand(batch, time) < 0.3).long().cumsum(1)
    return torch.where(torch.arange(time) < time - time // 4, ids, -1)  # the last quarter is padding


SEGMENTS = ["one-document", "one-token-each", "packed-and-padded"]


def inputs(heads: Heads, batch: int, time: int, width: int = 4) -> list[Tensor]:
    """Qkvz, ba, convolution weight, A_log, dt_bias: every number matters, some decays are strong and some weak."""
    values = heads.values * heads.value_dim
    tensors = [
        torch.randn(batch, time, 2 * heads.keys * heads.key_dim + 2 * values),
        3 * torch.randn(batch, time, 2 * heads.values),
        torch.randn(2 * heads.keys * heads.key_dim + values, width),
        torch.randn(heads.values),
        3 * torch.randn(heads.values),
    ]
    return [tensor.to(DEVICE).requires_grad_() for tensor in tensors]


def prepared_and_gradients(
    function: Prepare, tensors: list[Tensor], segment_ids: Tensor, heads: Heads, weights: list[Tensor]
) -> dict[str, Tensor]:
    """Every output, and the gradient of every input for a weighted sum of the outputs."""
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    out = function(*tensors, segment_ids, heads)
    gradients = torch.autograd.grad(out, tensors, weights)
    names = ["qkvz", "ba", "conv_weight", "log_rate", "bias"]
    return out._asdict() | {f"d_{name}": gradient for name, gradient in zip(names, gradients, strict=True)}


def weights_like(out: Prepared) -> list[Tensor]:
    return [torch.randn_like(tensor) for tensor in out]


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    """Within `bound` of the largest entry; sums over all tokens are allowed what their terms' rounding adds up to."""
    for name, exactly in expected.items():
        assert found[name].shape == exactly.shape, name
        error, largest = (found[name] - exactly).abs().max(), exactly.abs().max().clamp_min(1)
        assert error <= bound * largest, f"{name}: {error} of {largest}"


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_prepare_is_the_definition(size: tuple[int, int]) -> None:
    check_prepare(HEADS["one-key-head"], "packed-and-padded", *size, width=4)


@pytest.mark.parametrize("heads", list(HEADS))
def test_prepare_of_any_heads(heads: str) -> None:
    check_prepare(HEADS[heads], "packed-and-padded", 2, 7, width=4)


@pytest.mark.slow
@pytest.mark.parametrize("heads", list(HEADS))
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_prepare_of_any_heads_and_size(size: tuple[int, int], heads: str) -> None:
    check_prepare(HEADS[heads], "packed-and-padded", *size, width=4)


@pytest.mark.parametrize("width", [1, 3, 5])
def test_prepare_at_other_widths(width: int) -> None:
    check_prepare(HEADS["one-key-head"], "packed-and-padded", 1, 14, width)


@pytest.mark.parametrize("segments", SEGMENTS)
def test_prepare_of_documents(segments: str) -> None:
    check_prepare(HEADS["one-key-head"], segments, 2, 13, width=4)


def check_prepare(heads: Heads, segments: str, batch: int, time: int, width: int) -> None:
    tensors, segment_ids = inputs(heads, batch, time, width), segments_of(segments, batch, time).to(DEVICE)
    weights = weights_like(prepare(*tensors, segment_ids, heads))
    found, expected = (
        prepared_and_gradients(function, tensors, segment_ids, heads, weights) for function in (prepare_fused, prepare)
    )
    # float32 and the same formulas; what remains is the order of sums of at most 260 terms. Where SiLU brings a whole
    # head near zero, its unit length magnifies rounding by up to 1e3.
    assert_close(found, expected, 2e-5)


def test_decays_are_exact_where_they_are_small() -> None:
    """A softplus computed as log(1 + exp x) would be zero here, and a state would never decay."""
    heads = HEADS["no-sharing"]
    tensors = inputs(heads, 1, 5)
    with torch.no_grad():
        tensors[1].copy_(torch.linspace(-40, 40, tensors[1].numel(), device=DEVICE).view_as(tensors[1]))
        tensors[4].zero_()
    segment_ids = torch.zeros(1, 5, dtype=torch.long, device=DEVICE)
    found, expected = (function(*tensors, segment_ids, heads) for function in (prepare_fused, prepare))
    torch.testing.assert_close(found.log_decay, expected.log_decay, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.write, expected.write, rtol=1e-5, atol=0)


def test_documents_are_each_alone_to_the_last_bit() -> None:
    check_documents_are_alone(prepare_fused, HEADS["one-key-head"], (*Prepared._fields, "d_qkvz", "d_ba"))


def check_documents_are_alone(form: Prepare, heads: Heads, names: Sequence[str]) -> None:
    """These results of packed documents are those of each document by itself, bit for bit."""
    lengths = torch.tensor([5, 1, 13, 2])
    segment_ids = torch.arange(4).repeat_interleave(lengths).unsqueeze(0).to(DEVICE)
    tensors = inputs(heads, 1, segment_ids.shape[1])
    weights = weights_like(prepare(*tensors, segment_ids, heads))
    packed = prepared_and_gradients(form, tensors, segment_ids, heads, weights)
    for segment in segment_ids.unique():
        place = (segment_ids[0] == segment).nonzero().squeeze(-1)
        own = [tensors[0][:, place], tensors[1][:, place], *tensors[2:]]
        alone = prepared_and_gradients(form, own, segment_ids[:, place], heads, [w[:, place] for w in weights])
        for name in names:
            assert torch.equal(packed[name][:, place], alone[name]), name


def test_nothing_reaches_another_document_not_even_nan() -> None:
    check_nothing_reaches_another_document(prepare_fused)


def check_nothing_reaches_another_document(form: Prepare) -> None:
    """A document of NaN changes no number of another."""
    heads = HEADS["one-key-head"]
    tensors = inputs(heads, 1, 12)
    segment_ids = torch.tensor([[0, 0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 2]], device=DEVICE)
    weights = weights_like(prepare(*tensors, segment_ids, heads))
    before = prepared_and_gradients(form, tensors, segment_ids, heads, weights)
    spoilt = [tensor.detach().clone() for tensor in tensors]
    spoilt[0][:, 4:6] = spoilt[1][:, 4:6] = torch.nan
    after = prepared_and_gradients(form, spoilt, segment_ids, heads, weights)
    others = (segment_ids[0] != 1).nonzero().squeeze(-1)
    for name in (*Prepared._fields, "d_qkvz", "d_ba"):
        assert torch.equal(before[name][:, others], after[name][:, others]), name


NORMS = [(6, 2, 32), (6, 3, 7), (5, 1, 16), (2, 2, 8)]  # heads, groups of the gate, dimension


@pytest.mark.parametrize("lies", ["in-a-projection", "alone"])
@pytest.mark.parametrize("shape", NORMS, ids=str)
@pytest.mark.parametrize("size", [(1, 1), (2, 63)], ids=str)
def test_gated_norm_is_the_definition(size: tuple[int, int], shape: tuple[int, int, int], lies: str) -> None:
    heads, groups, dim = shape
    width = heads // groups * dim
    x = torch.randn(*size, heads, dim, device=DEVICE)
    gate = torch.randn(*size, groups, 3 * width if lies == "in-a-projection" else width, device=DEVICE)[..., -width:]
    weight, gradient = torch.randn(dim, device=DEVICE), torch.randn_like(x)
    results = []
    for function in (gated_norm_fused, gated_rms_norm):
        leaves = [x.clone().requires_grad_(), gate.detach().requires_grad_(), weight.clone().requires_grad_()]
        out = function(*leaves, EPS)
        gradients = torch.autograd.grad(out, leaves, gradient)
        results.append(dict(zip(["out", "x", "gate", "weight"], (out, *gradients), strict=True)))
    assert_close(*results, bound=1e-5)


def layer(heads: Heads) -> GatedDeltaNet:
    config = tiny_config(
        linear_num_key_heads=heads.keys, linear_num_value_heads=heads.values,
        linear_key_head_dim=heads.key_dim, linear_value_head_dim=heads.value_dim,
    )  # fmt: skip
    module = GatedDeltaNet(ModelConfig.from_dict(config)).to(DEVICE)
    randomise(module, seed=1)
    return module


@pytest.mark.parametrize("fused", ["both", "prepare", "norm"])
def test_layer_is_the_same_with_either(fused: str) -> None:
    """Also where only one of the two is fused, so that the projection's gradient is put together in another way."""
    module = layer(HEADS["one-key-head"])
    x, segment_ids = torch.randn(2, 9, 32, device=DEVICE), segments_of("packed-and-padded", 2, 9).to(DEVICE)
    results = []
    for fast in (True, False):
        module.prepare = prepare_fused if fast and fused != "norm" else prepare
        module.norm.compute = gated_norm_fused if fast and fused != "prepare" else gated_rms_norm
        leaf = x.clone().requires_grad_()
        out = module(leaf, segment_ids)
        names, parameters = zip(*module.named_parameters(), strict=True)
        gradients = torch.autograd.grad(out.square().sum(), (leaf, *parameters))
        results.append(dict(zip(("out", "x", *names), (out, *gradients), strict=True)))
    assert_close(*results, bound=2e-5)


def test_gradient_of_the_projection_is_written_once() -> None:
    """The norm's backward pass leaves room around the gate's gradient, and the other pass fills it: no copy."""
    heads = HEADS["groups-of-3"]
    tensors = inputs(heads, 1, 9)
    segment_ids = torch.zeros(1, 9, dtype=torch.long, device=DEVICE)
    out = prepare_fused(*tensors, segment_ids, heads)
    seen: list[int] = []
    out.gate.register_hook(lambda gradient: seen.append(gradient.untyped_storage().data_ptr()))
    normed = gated_norm_fused(out.value, out.gate, torch.ones(heads.value_dim, device=DEVICE), EPS)
    (d_qkvz,) = torch.autograd.grad(normed.sum(), tensors[:1])
    assert d_qkvz.untyped_storage().data_ptr() == seen[0]
    assert d_qkvz.is_contiguous()


def test_what_is_frozen_gets_no_gradient() -> None:
    heads = HEADS["no-sharing"]
    qkvz, ba, *frozen = inputs(heads, 1, 9)
    frozen = [tensor.detach() for tensor in frozen]
    segment_ids = torch.zeros(1, 9, dtype=torch.long, device=DEVICE)
    weights = weights_like(prepare(qkvz, ba, *frozen, segment_ids, heads))
    results = [
        torch.autograd.grad(function(qkvz, ba, *frozen, segment_ids, heads), (qkvz, ba), weights)
        for function in (prepare_fused, prepare)
    ]
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


def test_only_the_projections_are_kept() -> None:
    heads = HEADS["groups-of-3"]
    tensors, segment_ids = inputs(heads, 2, 9), torch.zeros(2, 9, dtype=torch.long, device=DEVICE)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*tensors, segment_ids)}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        prepare_fused(*tensors, segment_ids, heads)
    assert {tensor.untyped_storage().data_ptr() for tensor in kept} <= own


def test_bfloat16_is_as_near_as_its_rounding() -> None:
    """Fewer roundings than the definition in bfloat16, compared with the definition in float32."""
    heads = HEADS["groups-of-3"]
    tensors = [tensor.detach().bfloat16().requires_grad_() for tensor in inputs(heads, 1, 20)]
    segment_ids = segments_of("packed-and-padded", 1, 20).to(DEVICE)
    exact = [tensor.detach().float().requires_grad_() for tensor in tensors]
    weights = [weight.bfloat16().float() for weight in weights_like(prepare(*exact, segment_ids, heads))]
    expected = prepared_and_gradients(prepare, exact, segment_ids, heads, weights)
    rounded = [w.to(t.dtype) for w, t in zip(weights, prepare(*tensors, segment_ids, heads), strict=True)]
    found = prepared_and_gradients(prepare_fused, tensors, segment_ids, heads, rounded)
    assert found["query"].dtype == found["value"].dtype == torch.bfloat16
    assert found["log_decay"].dtype == found["write"].dtype == torch.float32
    # A number rounded to bfloat16 is off by up to 2**-9 of itself; the interpreter cuts it off, by up to 2**-8.
    for name, exactly in expected.items():
        assert relative(found[name], exactly) <= 2**-8, name


def relative(found: Tensor, exact: Tensor) -> float:
    found, exact = found.detach().double(), exact.detach().double()
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("weight_dtype", [torch.float16, torch.float32])
def test_weight_multiplies_in_the_dtype_of_x(weight_dtype: torch.dtype) -> None:
    """The gated norm rounds where the definition rounds, so nearly all bits are the same.

    In float16: the interpreter cuts bfloat16 numbers off instead of rounding them.
    """
    x, gate = (torch.randn(9, 4, 16, device=DEVICE).half() for _ in range(2))
    weight = torch.randn(16, device=DEVICE).to(weight_dtype)
    found, expected = (function(x, gate, weight, EPS) for function in (gated_norm_fused, gated_rms_norm))
    assert found.dtype == torch.float16
    assert (found == expected).float().mean() >= 0.98
