"""A loss that is not finite makes the whole step change nothing, whatever micro-batches come after it."""

from typing import Any

import pytest
import torch
from torch import Tensor

from data.packing import Batch
from finetune.distributed import world as worlds
from finetune.distributed.world import World
from finetune.engine import engine as engines
from finetune.engine.engine import ExpertEngine
from finetune.model.head import IGNORED
from finetune.model.model import Output
from finetune.recipe.sections import Router
from finetune.training.step import optimize
from tests.ranks import ranks
from tests.test_rank_layouts import TOKENS, Layout, batch_of_step, model_of, recipe_of

ROUTER = Router(train=True)  # no router loss, which would be differentiated in a micro-batch without labels too
# ZeRO stage, place of the optimizer's state, dtype of the weights.
FORMS = [
    (0, "none", torch.float32),
    (1, "none", torch.float32),
    (2, "none", torch.float32),
    (2, "none", torch.bfloat16),
    (1, "cpu", torch.float32),
]


def micro_batches(step: int, world: World) -> list[Batch]:
    """Two of this rank; the second has no label on any rank."""
    parts = [t.view(2, 2, -1, TOKENS)[:, world.rank] for t in batch_of_step(step)]
    first, second = (Batch(*(part[place] for part in parts)) for place in range(2))
    return [first, second._replace(labels=torch.full_like(second.labels, IGNORED))]


def add_to_first_loss(engine: ExpertEngine, what: float) -> Any:
    """Make the loss of the first forward pass from now on other by `what`, and leave its gradient as it is."""
    passes: list[None] = []

    def add(module: torch.nn.Module, inputs: Any, output: Output) -> Output:
        passes.append(None)
        assert output.loss_sum is not None
        return output._replace(loss_sum=output.loss_sum + what) if len(passes) == 1 else output

    return engine.module.register_forward_hook(add)


def whole_state(engine: ExpertEngine, world: World) -> dict[str, Tensor]:
    weights = {name: parameter.detach().clone() for name, parameter in engine.module.named_parameters()}
    return weights | engines.training_state(engine, world)


def one_form(world: World, stage: int, offload: str, dtype: torch.dtype) -> dict[str, Any]:
    recipe = recipe_of(Layout(ranks=2, accumulation=2, stage=stage, offload=offload))
    recipe = recipe.model_copy(update={"router": ROUTER})
    model = model_of(world.experts(8), Layout())
    model.cast(dtype)
    engine = engines.start(model, recipe, world, accumulation=2)
    found: dict[str, Any] = {"norms": [optimize(engine, micro_batches(1, world), ROUTER, world)], "states": []}
    found["states"].append(whole_state(engine, world))
    for what in (torch.inf, torch.nan):
        hook = add_to_first_loss(engine, what if world.rank == 1 else 0.0)
        found["norms"].append(optimize(engine, micro_batches(2, world), ROUTER, world))
        hook.remove()
        found["states"].append(whole_state(engine, world))
    found["norms"].append(optimize(engine, micro_batches(2, world), ROUTER, world))
    found["states"].append(whole_state(engine, world))
    return found


def on_two_ranks(rank: int) -> list[dict[str, Any]]:
    world = worlds.start(expert_size=1)
    return [one_form(world, *form) for form in FORMS]


@pytest.fixture(scope="module")
def found() -> list[list[dict[str, Any]]]:
    return ranks(2, on_two_ranks)


@pytest.mark.parametrize("form", range(len(FORMS)), ids=[f"stage {s} {o} {str(d)[6:]}" for s, o, d in FORMS])
def test_a_loss_that_is_not_finite_before_a_micro_batch_without_labels_changes_nothing(
    found: list[list[dict[str, Any]]], form: int
) -> None:
    for of_rank in found:
        first, infinite, nan, third = of_rank[form]["norms"]
        assert infinite == nan == torch.inf
        assert 0 < first < torch.inf
        assert 0 < third < torch.inf
        before, after_infinite, after_nan, after = of_rank[form]["states"]
        for name, value in before.items():
            assert torch.equal(after_infinite[name], value), name
            assert torch.equal(after_nan[name], value), name
        assert any(not torch.equal(after[name], value) for name, value in before.items())  # the next step is taken
