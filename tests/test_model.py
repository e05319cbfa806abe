"""The whole model against transformers' `Qwen3NextForCausalLM`, in float32, with every parameter off its default."""

import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextForCausalLM

from finetune.model.config import ALL, NOTHING, ModelConfig, Recompute
from finetune.model.head import token_loss_sum
from finetune.model.model import HybridMoEForCausalLM, initialise
from tests.configs import CONFIGS, randomise, tiny_config

LOGITS_TOLERANCE = 2e-5
GRADIENT_TOLERANCE = 1e-4  # of the largest entry of that parameter's gradient


def pair(values: dict[str, Any], seed: int = 1) -> tuple[HybridMoEForCausalLM, Qwen3NextForCausalLM]:
    """Our model and transformers', with the same random parameters."""
    config = Qwen3NextConfig(**values)
    config._experts_implementation = "eager"  # the plain loop; the grouped product wants widths divisible by four
    theirs = Qwen3NextForCausalLM(config).float().eval()
    randomise(theirs, seed)
    ours = HybridMoEForCausalLM(ModelConfig.from_dict(values))
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def ids_without_ties(theirs: Qwen3NextForCausalLM, shape: tuple[int, int]) -> torch.Tensor:
    """Random tokens for which no choice of experts hangs on rounding, which differs between processors.

    Where the last chosen and the first refused expert are closer than five times the tolerance of logits, two right
    implementations may route a token differently, and nothing behind it can be compared.
    """
    for _ in range(100):
        ids = torch.randint(theirs.config.vocab_size, shape)
        with torch.no_grad():
            layers = theirs(ids, use_cache=False, output_router_logits=True).router_logits
        top_k = theirs.config.num_experts_per_tok
        ordered = [logits.sort(dim=-1, descending=True).values for logits in layers]
        if top_k == theirs.config.num_experts or all(
            (logits[:, top_k - 1] - logits[:, top_k]).min() > 5 * LOGITS_TOLERANCE for logits in ordered
        ):
            return ids
    raise AssertionError("every draw had a tie")


def random_model(values: dict[str, Any], seed: int = 1) -> HybridMoEForCausalLM:
    model = HybridMoEForCausalLM(ModelConfig.from_dict(values))
    randomise(model, seed)
    return model


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_gradients_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        difference = (ours[name] - expected).abs().max()
        assert difference <= GRADIENT_TOLERANCE * expected.abs().max(), f"{name}: off by {difference:.2e}"


@pytest.fixture(params=list(CONFIGS))
def values(request: pytest.FixtureRequest) -> dict[str, Any]:
    return CONFIGS[request.param]


@pytest.mark.parametrize("time", [1, 63, 130])
def test_logits_equal_transformers(values: dict[str, Any], time: int) -> None:
    ours, theirs = pair(values)
    ids = ids_without_ties(theirs, (2, time))
    with torch.no_grad():
        expected = theirs(ids, use_cache=False).logits
        found = ours(ids).logits
    assert expected.std() > 0.5  # logits of a size where the tolerance means something
    torch.testing.assert_close(found, expected, rtol=0, atol=LOGITS_TOLERANCE)


def test_every_parameter_gradient_equals_transformers(values: dict[str, Any]) -> None:
    ours, theirs = pair(values)
    ids = ids_without_ties(theirs, (2, 70))
    labels = torch.randint(values["vocab_size"], (2, 70)).masked_fill(torch.rand(2, 70) < 0.3, -100)

    out = ours(ids, labels=labels)
    out.loss_sum.backward()
    logits = theirs(ids, use_cache=False).logits
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    loss.backward()

    assert out.token_count == (labels != -100).sum()
    torch.testing.assert_close(out.loss_sum, loss, rtol=1e-5, atol=0)
    assert_gradients_close(gradients(ours), gradients(theirs))


def test_routing_is_the_one_transformers_chose() -> None:
    ours, theirs = pair(CONFIGS["dense-layers"])
    ids = ids_without_ties(theirs, (2, 40))
    with torch.no_grad():
        routings = ours(ids).routings
        logits = theirs(ids, use_cache=False, output_router_logits=True).router_logits
    assert list(routings) == [1, 2]  # layers 0 and 3 are dense
    for routing, expected in zip(routings.values(), logits, strict=True):
        torch.testing.assert_close(routing.logits, expected, rtol=0, atol=LOGITS_TOLERANCE)
        assert torch.equal(routing.experts, expected.topk(3).indices)
        torch.testing.assert_close(routing.weights, expected.topk(3).values.softmax(-1))
        assert routing.rows.tolist() == [int((routing.experts == e).sum()) for e in range(len(routing.rows))]
        expected = expected.double()
        torch.testing.assert_close(routing.probability_sum, expected.softmax(-1).sum(0), rtol=0, atol=1e-4)
        torch.testing.assert_close(routing.z_sum, expected.exp().sum(-1).log().square().sum(), rtol=1e-5, atol=0)


def test_logits_of_the_router_are_kept_only_where_a_loss_reads_them() -> None:
    model = random_model(CONFIGS["base"])
    ids = torch.randint(90, (2, 9))
    model.keep_router_logits = False
    seen: list[Any] = []
    hook = model.model.layers[0].mlp.gate.register_forward_hook(lambda *done: seen.append(weakref.ref(done[2].logits)))
    out = model(ids, labels=ids)
    hook.remove()
    assert all(routing.logits is None for routing in out.routings.values())
    assert out.loss_sum.requires_grad  # the graph is alive, and does not hold them either
    assert seen[0]() is None


def test_positions_may_be_given() -> None:
    ours, theirs = pair(CONFIGS["base"])
    ids, positions = torch.randint(96, (1, 9)), torch.arange(100, 109).unsqueeze(0)
    with torch.no_grad():
        expected = theirs(ids, position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(ours(ids, position_ids=positions).logits, expected, rtol=0, atol=LOGITS_TOLERANCE)


def test_recompute_gives_identical_gradients(values: dict[str, Any]) -> None:
    model = random_model(values)
    ids = torch.randint(values["vocab_size"], (2, 70))
    segments = torch.tensor([[0] * 30 + [1] * 40, [0] * 1 + [1] * 50 + [-1] * 19])
    runs = []  # of the halves of the first block, each forward pass
    first = model.model.layers[0]
    for name, half in (("mixer", first.input_layernorm), ("experts", first.mlp)):
        half.register_forward_pre_hook(lambda *_, name=name: runs.append(name))
    found = []
    for again in (NOTHING, ALL, Recompute(True, False), Recompute(False, True)):
        model.zero_grad()
        model.recompute = [again, *model.recompute[1:]]
        out = model(ids, segments, labels=ids.masked_fill(segments == -1, -100))
        z_loss = sum(routing.logits.logsumexp(-1).square().sum() for routing in out.routings.values())
        (out.loss_sum + z_loss).backward()
        found.append(gradients(model))
    once = ["mixer", "experts"]  # and what the backward pass does once more
    assert runs == [*once, *once, *once, *once, "mixer", *once, "experts"]
    for name, expected in found[0].items():
        assert all(torch.equal(other[name], expected) for other in found[1:]), name


@pytest.mark.parametrize(
    "segments", [[0] * 24, [0] * 9 + [1] * 15, [0] * 20 + [-1] * 4], ids=["one", "packed", "padded"]
)
@pytest.mark.parametrize("again", [ALL, Recompute(True, False)], ids=["layer", "mixer"])
def test_attention_itself_is_never_computed_again(again: Recompute, segments: list[int]) -> None:
    model = random_model(tiny_config(num_hidden_layers=1, layer_types=["full_attention"]))
    model.recompute = [again]
    ids = torch.arange(24).view(1, 24)
    calls: list[str] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append(str(function))
            return function(*args, **(kwargs or {}))

    with Recorder():
        loss = model(ids, torch.tensor([segments]), labels=ids).loss_sum
        products = sum("scaled_dot_product" in call for call in calls)
        matrices = sum("aten.mm" in call or "addmm" in call for call in calls)
        calls.clear()
        torch.autograd.grad(loss, list(model.model.layers.parameters()))
    assert products == 1
    assert [call for call in calls if "scaled_dot_product" in call and "backward" not in call] == []
    assert sum("aten.mm" in call or "addmm" in call for call in calls) > 2 * matrices  # the projections are


@pytest.mark.parametrize("chunk_tokens", [1, 7, 100])
def test_loss_in_chunks_is_the_loss_at_once(chunk_tokens: int) -> None:
    hidden, weight = torch.randn(2, 15, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    labels = torch.randint(11, (2, 15)).masked_fill(torch.rand(2, 15) < 0.4, -100)
    found, count = token_loss_sum(hidden, weight, labels, chunk_tokens=chunk_tokens)
    expected = F.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten(), reduction="sum")
    assert count == (labels != -100).sum()
    torch.testing.assert_close(found, expected)
    for ours, plain in zip(
        torch.autograd.grad(found, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(ours, plain)


def test_initial_values_do_not_depend_on_who_holds_an_expert() -> None:
    config = ModelConfig.from_dict(tiny_config())
    whole, part = HybridMoEForCausalLM(config), HybridMoEForCausalLM(config, experts=range(4, 6))
    initialise(whole, seed=7)
    initialise(part, seed=7)
    held = part.state_dict()
    for name, value in whole.state_dict().items():
        assert torch.equal(held[name], value[4:6] if ".mlp.experts." in name else value), name
        assert value.isfinite().all(), name
    other = HybridMoEForCausalLM(config)
    initialise(other, seed=8)
    assert not torch.equal(other.lm_head.weight, whole.lm_head.weight)


def test_initial_model_is_as_sure_of_nothing_as_transformers_is() -> None:
    values = tiny_config()
    ours = HybridMoEForCausalLM(ModelConfig.from_dict(values))
    initialise(ours, seed=0)
    theirs = Qwen3NextForCausalLM(Qwen3NextConfig(**values)).state_dict()
    for name, value in ours.state_dict().items():
        if name.endswith(("norm.weight", "dt_bias")):
            assert torch.equal(value, theirs[name]), name
        elif not name.endswith(("A_log", "conv1d.weight")):
            assert value.std().item() == pytest.approx(0.02, rel=0.2), name
        if name.endswith("A_log"):
            assert 0.01 <= value.exp().min() <= value.exp().max() <= 16


def test_bfloat16_stays_near_float32() -> None:
    model = random_model(CONFIGS["base"])
    ids = torch.randint(96, (2, 70))
    with torch.no_grad():
        expected = model(ids).logits
        found = model.bfloat16()(ids).logits
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).abs().mean() < 0.1 * expected.std()
