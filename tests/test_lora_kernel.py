"""The adapted linear layer in one function, against the forward of peft's layer."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from finetune.kernels.torch.lora import adapted_linear
from finetune.training.lora import AdaptedLinear, base_model, inject
from tests.configs import CONFIGS
from tests.kernels import assert_as_exact, assert_equal_forms
from tests.test_model import random_model

SCALE = 2.5


def peft_layer(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """peft's own module around these very tensors."""
    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    rank = len(a)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=scale * rank, target_modules=["0"]), model)
    names = ("0.base_layer.weight", "0.lora_A.default.weight", "0.lora_B.default.weight")
    return torch.func.functional_call(model, dict(zip(names, (weight, a, b), strict=True)), (x,))


def inputs(*shape: int, outputs: int, rank: int, dtype: torch.dtype = torch.float32) -> list[Any]:
    width = shape[-1]
    weight = (torch.randn(outputs, width) / width**0.5).to(dtype)
    a, b = torch.randn(rank, width) / width**0.5, torch.randn(outputs, rank)
    return [
        torch.randn(shape).to(dtype).requires_grad_(),
        weight,
        *(f.to(dtype).requires_grad_() for f in (a, b)),
        SCALE,
    ]


@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (63, 20), (2, 65, 33)], ids=str)
@pytest.mark.parametrize(("outputs", "rank"), [(1, 1), (24, 3), (7, 16)])
def test_output_and_gradients(shape: tuple[int, ...], outputs: int, rank: int) -> None:
    # A sum over 130 rows of terms of up to 8 in other orders: 1e3 times the rounding of float32.
    assert_equal_forms(
        adapted_linear, peft_layer, inputs(*shape, outputs=outputs, rank=rank), rtol=1e-5, atol=1e-4
    )  # fmt: skip


@pytest.mark.parametrize("frozen", [0, 2, 3], ids=["x", "a", "b"])
def test_what_is_frozen_gets_no_gradient(frozen: int) -> None:
    given = inputs(9, 12, outputs=10, rank=2)
    given[frozen] = given[frozen].detach()
    assert_equal_forms(adapted_linear, peft_layer, given, rtol=1e-5, atol=2e-5)


def test_rows_and_gradients_that_are_not_contiguous() -> None:
    given = inputs(6, 5, 12, outputs=10, rank=2)
    forms = (
        lambda x, *rest, form=form: form(x.transpose(0, 1), *rest).transpose(0, 2)
        for form in (adapted_linear, peft_layer)
    )
    assert_equal_forms(*forms, given, rtol=1e-5, atol=2e-5)


def test_bfloat16() -> None:
    assert_as_exact(adapted_linear, peft_layer, inputs(65, 32, outputs=24, rank=4, dtype=torch.bfloat16))


def test_layers_that_read_the_same_input_keep_it_once() -> None:
    x, *rest = inputs(64, 32, outputs=16, rank=2)
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = [adapted_linear(x, *rest) for _ in range(3)]
    assert len(outputs) == 3  # their graphs live, or memory would be used again
    assert kept.count(x.data_ptr()) == 3
    sizes = {tensor.data_ptr() for tensor in (x, *rest[:3])}
    assert len(set(kept) - sizes) == 3  # beside it, the thin product of each: rows x rank


def test_a_weight_that_trains_is_refused() -> None:
    x, weight, *rest = inputs(2, 4, outputs=3, rank=1)
    with pytest.raises(AssertionError, match="frozen"):
        adapted_linear(x, weight.requires_grad_(), *rest)


@pytest.mark.parametrize(("dropout", "ours"), [(0.0, True), (0.5, False)])
def test_layers_are_ours_without_dropout_and_peft_s_with_it(dropout: float, ours: bool) -> None:
    model = random_model(CONFIGS["base"])
    names = inject(model, rank=2, alpha=4.0, dropout=dropout, targets=("q_proj", "out_proj", "shared_expert"), seed=0)
    assert all(isinstance(model.get_submodule(name), AdaptedLinear) is ours for name in names)


def test_gradients_of_a_model_equal_those_of_peft_s_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(96, (2, 21))
    gradients = []
    for registered in (True, False):
        if not registered:
            monkeypatch.setattr(LoraConfig, "_register_custom_module", lambda self, mapping: None)
        model = random_model(CONFIGS["base"])
        inject(model, rank=2, alpha=5.0, dropout=0.0, targets=("q_proj", "k_proj", "in_proj_qkvz", "o_proj"), seed=0)
        generator = torch.Generator().manual_seed(5)
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
        model.recompute = registered  # and recomputing changes nothing
        model(ids, labels=ids).loss_sum.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        with base_model(model):
            assert torch.equal(model(ids).logits, random_model(CONFIGS["base"])(ids).logits)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(
            gradient,
            gradients[1][name],
            rtol=1e-4,
            atol=1e-5 * float(gradient.abs().max()),
            msg=lambda text, name=name: f"{name}: {text}",
        )
