"""The benchmark of the loss curve: it passes what rounding explains and refuses what learns otherwise."""

import math

import pytest
import torch

from benchmarks.lora_models import NO_RECOMPUTE, build
from benchmarks.loss_curve import (
    AGAIN,
    DEFINITION,
    EXACT,
    MARGIN,
    OURS,
    TINY,
    Curves,
    RefusedError,
    batches,
    distances,
    reorder,
    train,
    use_definitions,
    verdict,
)

STEPS = 60


def curves(*, ours: float, exact: float = 0.02, again: float = 0.01) -> Curves:
    """A falling loss, and three others that lie this far from it, by turns above and below."""
    falling = [6 * 0.98**step for step in range(STEPS)]
    apart = {DEFINITION: 0.0, OURS: ours, EXACT: exact, AGAIN: again}
    return {name: [loss + far * (-1) ** step for step, loss in enumerate(falling)] for name, far in apart.items()}


@pytest.mark.parametrize(
    ("ours", "within"), [(0.015, True), (0.99 * MARGIN * 0.02, True), (1.01 * MARGIN * 0.02, False)]
)
def test_the_noise_is_the_larger_of_the_two(ours: float, within: bool) -> None:
    assert verdict(curves(ours=ours))[0] is within
    assert verdict(curves(ours=ours, exact=0.01, again=0.02))[0] is within


def test_distances_of_all_and_of_late_steps() -> None:
    found = curves(ours=0.0)
    found[OURS][-1] += 0.3
    apart = distances(found)[f"{OURS} - {DEFINITION}"]
    assert apart == pytest.approx(
        {"mean": 0.3 / STEPS, "max": 0.3, "mean_late": 0.6 / STEPS, "max_late": 0.3}, abs=1e-9
    )  # fmt: skip


def test_curves_that_say_nothing_are_refused() -> None:
    short = curves(ours=0.01)
    short[OURS].pop()
    with pytest.raises(RefusedError, match="steps"):
        verdict(short)
    broken = curves(ours=0.01)
    broken[OURS][3] = math.nan
    with pytest.raises(RefusedError, match=f"not finite: {OURS}"):
        verdict(broken)
    with pytest.raises(RefusedError, match="nothing to compare"):
        verdict({name: [6.0] * STEPS for name in broken})


def test_a_gradient_that_is_half_missing_is_outside() -> None:
    """In float32, where right runs agree; the noise is put on top, as large as bfloat16's."""
    data = batches(STEPS, 2, 64)
    contender = build("nextune" + NO_RECOMPUTE, TINY, torch.device("cpu"), torch.float32)
    right = train(contender, data)
    use_definitions(contender.model)
    definition = train(contender, data)
    reorder(contender.model)
    again = train(contender, data.flip(1))
    assert right == pytest.approx(definition, abs=2e-3)
    assert again == pytest.approx(definition, abs=2e-3)
    for name, parameter in contender.model.named_parameters():
        if parameter.requires_grad and "layers.0.linear_attn.in_proj_qkvz.lora_B" in name:
            parameter.register_hook(lambda g: torch.cat((g[: len(g) // 2], torch.zeros_like(g[len(g) // 2 :]))))
    wrong = train(contender, data)
    noisy = [loss + 0.004 * (-1) ** step for step, loss in enumerate(definition)]
    assert verdict({OURS: right, DEFINITION: definition, EXACT: noisy, AGAIN: again})[0]
    assert not verdict({OURS: wrong, DEFINITION: definition, EXACT: noisy, AGAIN: again})[0]


def test_text_is_not_repeated() -> None:
    data = batches(5, 3, 256)
    assert data.shape == (5, 3, 256)
    assert len({tuple(passage.tolist()) for passage in data.flatten(0, 1)}) == 15
    assert torch.equal(data, batches(5, 3, 256))
