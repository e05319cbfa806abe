"""How a fast form is held against its definition: outputs, and the gradient of every input."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def outputs_and_gradients(function: Callable[..., Any], inputs: Sequence[Any], seed: int = 1) -> list[Tensor]:
    """What `function` returns for copies of `inputs`, then the gradient of every input that requires one.

    Every floating-point output gets a random gradient of its own; the same ones for the same seed.
    """
    copies = [i.detach().clone().requires_grad_(i.requires_grad) if isinstance(i, Tensor) else i for i in inputs]
    returned = function(*copies)
    outputs = [out for out in (returned if isinstance(returned, tuple) else (returned,)) if isinstance(out, Tensor)]
    generator = torch.Generator().manual_seed(seed)
    loss = torch.zeros(())
    for out in outputs:
        if out.requires_grad:
            loss = loss + (out.float() * torch.randn(out.shape, generator=generator)).sum()
    trained = [copy for copy in copies if isinstance(copy, Tensor) and copy.requires_grad]
    return [*(out.detach() for out in outputs), *torch.autograd.grad(loss, trained)]


def assert_equal_forms(
    fast: Callable[..., Any], definition: Callable[..., Any], inputs: Sequence[Any], *, rtol: float, atol: float
) -> None:
    """Both forms give the same outputs, dtypes and gradients."""
    found, expected = (outputs_and_gradients(form, inputs) for form in (fast, definition))
    assert len(found) == len(expected)
    for place, (a, b) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, msg=lambda text, place=place: f"tensor {place}: {text}")


def assert_as_exact(fast: Callable[..., Any], definition: Callable[..., Any], inputs: Sequence[Any]) -> None:
    """In the dtype of `inputs` the fast form is about as near as the definition to the definition in float32.

    Triton's interpreter cuts bfloat16 off where a GPU rounds, which doubles the error of what is stored.
    """
    exactly = [
        i.detach().float().requires_grad_(i.requires_grad) if isinstance(i, Tensor) and i.is_floating_point() else i
        for i in inputs
    ]
    exact = outputs_and_gradients(definition, exactly)
    found, defined = (outputs_and_gradients(form, inputs) for form in (fast, definition))
    for place, (a, b, c) in enumerate(zip(found, defined, exact, strict=True)):
        assert a.dtype == b.dtype, f"tensor {place}"
        error, allowed = ((x.double() - c.double()).norm() for x in (a, b))
        assert error <= 3 * allowed + 1e-3 * c.double().norm(), (
            f"tensor {place}: {error}, the definition's is {allowed}"
        )
