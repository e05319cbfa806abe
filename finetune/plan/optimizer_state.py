"""Size of the optimizer state, without the masters. Imports no torch."""

from collections.abc import Iterator
from math import prod

from finetune.checkpoint.layout import Shape, parameter_shapes
from finetune.model.config import ModelConfig
from finetune.plan.activations import FLOAT32
from finetune.plan.adapter_targets import meant_targets
from finetune.plan.workload import Workload
from finetune.recipe.eight_bit import is_quantised, scales
from finetune.recipe.recipe import Recipe
from finetune.recipe.sections import Optim


def moments(optim: Optim) -> int:
    """Float32 numbers that are kept about each one that trains; adafactor and adamw_8bit keep something else."""
    if optim.name == "sgd":
        return 1 if optim.momentum else 0
    return {"adamw": 2, "adam": 2}.get(optim.name, 0)


def state_bytes(work: Workload, trained: int, *, expert: int) -> int:
    """Bytes that the optimizer keeps beside float32 values.

    Args:
        trained: numbers that train, of the part of the model that is meant.
        expert: the parts that the experts are divided into; 1 means the whole model.
    """
    name = work.recipe.optim.name
    if name not in ("adafactor", "adamw_8bit"):
        return FLOAT32 * moments(work.recipe.optim) * trained
    total = 0
    for shape, of_experts in _trained_shapes(work.config, work.recipe):
        if name == "adafactor":
            kept = FLOAT32 * _sums(shape)
        else:
            kept = shape[0] * _in_8_bits(shape[1:], True) if of_experts else _in_8_bits(shape, False)
        total += kept // expert if of_experts else kept
    return total


def _in_8_bits(shape: Shape, of_expert: bool) -> int:
    """Bytes of both moments of a matrix: codes and scales, or float32 numbers where it is not quantised."""
    numbers = prod(shape)
    if not is_quantised(numbers, expert=of_expert):
        return 2 * FLOAT32 * numbers
    return 2 * (numbers + FLOAT32 * scales(numbers))


def _sums(shape: Shape) -> int:
    """Numbers of a tensor's sums of rows and of columns; a vector's squares are kept one by one."""
    return prod(shape) if len(shape) < 2 else prod(shape[:-1]) + prod(shape[:-2]) * shape[-1]


def _trained_shapes(config: ModelConfig, recipe: Recipe) -> Iterator[tuple[Shape, bool]]:
    """Shapes of what trains, and whether each stacks experts."""
    lora = recipe.lora
    targets = meant_targets(config, lora) if lora is not None else ()
    for name, shape in parameter_shapes(config).items():
        if name.endswith("mlp.gate.weight"):
            if recipe.router.train:
                yield shape, False
        elif lora is None:
            yield shape, _target_of(name) == "experts"
        elif _target_of(name) in targets:
            *stacked, outputs, inputs = shape
            yield (*stacked, lora.rank, inputs), bool(stacked)
            yield (*stacked, outputs, lora.rank), bool(stacked)


def _target_of(name: str) -> str:
    """The adapter target of a parameter."""
    if ".mlp.experts." in name:
        return "experts"
    return "shared_expert" if ".shared_expert." in name else name.removesuffix(".weight").rpartition(".")[2]
