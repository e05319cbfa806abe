"""Fast ways to compute the experts against the definition, a loop over them."""

import pytest
import torch

from finetune.kernels.choose import KernelError, choose, install
from finetune.kernels.torch.experts import experts_grouped
from finetune.kernels.trial import Place
from finetune.kernels.triton.fused_experts import experts_fused, moe_fused
from finetune.model.config import ModelConfig
from finetune.model.model import HybridMoEForCausalLM
from finetune.model.moe import ExpertCompute, Experts, experts_in_a_loop
from tests.configs import CONFIGS, randomise

HIDDEN, WIDTH = 16, 8
ROWS_PER_EXPERT = {
    "uneven": [3, 1, 63, 7],
    "some-without-rows": [0, 5, 0, 0, 130, 0],
    "first-only": [9, 0, 0],
    "no-rows-at-all": [0, 0, 0],
    "one-row": [0, 1],
    "one-expert": [65],
}


@pytest.mark.parametrize("layout", list(ROWS_PER_EXPERT))
def test_grouped_is_the_loop(layout: str) -> None:
    counts = torch.tensor(ROWS_PER_EXPERT[layout])
    tensors = [
        torch.randn(int(counts.sum()), HIDDEN),
        torch.randn(len(counts), 2 * WIDTH, HIDDEN),
        torch.randn(len(counts), HIDDEN, WIDTH),
    ]
    found, expected = (
        forward_and_backward(compute, counts, tensors) for compute in (experts_grouped, experts_in_a_loop)
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def forward_and_backward(
    compute: ExpertCompute, counts: torch.Tensor, tensors: list[torch.Tensor]
) -> list[torch.Tensor]:
    rows, gate_up, down = (tensor.clone().requires_grad_() for tensor in tensors)
    out = compute(rows, counts, gate_up, down)
    # sum() hands backward an expanded gradient, which the grouped product cannot take as it comes.
    return [out, *torch.autograd.grad(out.sum(), (rows, gate_up, down))]


def test_definition_is_the_formula_row_by_row() -> None:
    counts = torch.tensor([2, 0, 3])
    rows, gate_up, down = torch.randn(5, HIDDEN), torch.randn(3, 2 * WIDTH, HIDDEN), torch.randn(3, HIDDEN, WIDTH)
    found = experts_in_a_loop(rows, counts, gate_up, down)
    for row, expert in enumerate([0, 0, 2, 2, 2]):
        gate, up = gate_up[expert, :WIDTH] @ rows[row], gate_up[expert, WIDTH:] @ rows[row]
        torch.testing.assert_close(found[row], down[expert] @ (gate * gate.sigmoid() * up))


def test_model_is_the_same_with_either() -> None:
    model = HybridMoEForCausalLM(ModelConfig.from_dict(CONFIGS["base"]))
    randomise(model, seed=3)
    ids = torch.randint(96, (2, 5))  # 20 slots for 8 experts in each layer: some receive nothing
    logits = []
    for compute in (experts_in_a_loop, experts_grouped):
        for module in model.modules():
            if isinstance(module, Experts):
                module.compute = compute
        with torch.no_grad():
            logits.append(model(ids).logits)
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "compute", "words"),
    [
        ("auto", experts_grouped, "grouped"),
        ("grouped", experts_grouped, "grouped"),
        ("fused", experts_fused, "fused"),
        ("loop", experts_in_a_loop, "loop"),
    ],
)
def test_choice_follows_the_recipe_and_says_so(kind: str, compute: object, words: str) -> None:
    chosen = choose(experts=kind, layers="auto", mixers="auto", place=place())
    assert chosen.experts is compute
    assert words in chosen.said[0]
    assert ("checked here against the definition" in chosen.said[0]) == (kind != "loop")


def place(dtype: torch.dtype = torch.float32, width: int = 16) -> Place:
    config = ModelConfig.from_dict(CONFIGS["base"] | {"hidden_size": 32, "moe_intermediate_size": width})
    return Place(config, torch.device("cpu"), dtype)


def test_what_cannot_run_here_is_refused_or_replaced_aloud() -> None:
    with pytest.raises(KernelError, match=r"kernels\.experts: grouped does not run in float64 on cpu"):
        choose(experts="grouped", layers="auto", mixers="auto", place=place(torch.float64))
    chosen = choose(experts="auto", layers="auto", mixers="auto", place=place(torch.float64))
    assert chosen.experts is experts_in_a_loop
    assert "SLOW" in chosen.said[0]


def test_widths_of_the_model_decide() -> None:
    # 9 float32 numbers are no multiple of 16 bytes, which the grouped product asks of every row.
    chosen = choose(experts="auto", layers="auto", mixers="auto", place=place(width=9))
    assert chosen.experts is experts_in_a_loop
    assert "SLOW" in chosen.said[0]


def test_a_kernel_that_is_wrong_here_is_refused_or_replaced_aloud(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*inputs: object) -> torch.Tensor:
        return experts_grouped(*inputs) * 1.001

    monkeypatch.setattr("finetune.kernels.choose.experts_grouped", wrong)
    with pytest.raises(KernelError, match=r"output 0 is 1\.0e-03 away from its definition"):
        choose(experts="grouped", layers="auto", mixers="auto", place=place())
    assert "SLOW" in choose(experts="auto", layers="auto", mixers="auto", place=place()).said[0]


def test_chosen_kernels_are_what_the_model_computes_by() -> None:
    heads = {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
    model = HybridMoEForCausalLM(ModelConfig.from_dict(CONFIGS["base"] | heads))
    randomise(model, seed=3)
    ids = torch.randint(96, (2, 9))
    labels = ids.roll(-1, 1)
    found = []
    here = Place(model.settings, torch.device("cpu"), torch.float32)
    for experts, layers in (("loop", "plain"), ("fused", "fused")):
        install(model, choose(experts=experts, layers=layers, mixers=layers, place=here))
        output = model(ids, labels=labels)
        assert output.loss_sum is not None
        gradients = torch.autograd.grad(output.loss_sum, list(model.parameters()))
        found.append([output.loss_sum.detach(), *gradients])
    assert model.model.layers[0].mlp.whole is moe_fused
    for fast, definition in zip(*reversed(found), strict=True):
        torch.testing.assert_close(fast, definition, rtol=1e-4, atol=1e-4 * float(definition.abs().max()))
