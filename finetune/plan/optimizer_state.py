"""Size of the optimizer state, without the masters. Imports no torch."""

from collections.abc import Iterator
from math import prod

from finetune.checkpoint.layout import Shape, parameter_shapes
from finetune.model.config import ModelConfig
from finetune.plan.activations import FLOAT32
from finetune.plan.adapter_targets import meant_targets
from finetune.plan.workload import Workload
from finetune.recipe.recipe import Recipe
from finetune.recipe.sections import Optim


def moments(optim: Optim) -> int:
    """Float32 numbers that are kept about each one that trains; adafactor keeps sums of rows and columns instead."""
    if optim.name == "sgd":
        return 1 if optim.momentum else 0
    return {"adamw": 2, "adam": 2, "adafactor": 0}[optim.name]


def state_bytes(work: Workload, trained: int) -> int:
    """Bytes that the optimizer keeps beside float32 values.

    Args:
        trained: numbers that train; all of the model for adafactor, which is not divided over ranks.
    """
    if work.recipe.optim.name == "adafactor":
        return FLOAT32 * sum(_sums(shape) for shape in _trained_shapes(work.config, work.recipe))
    return FLOAT32 * moments(work.recipe.optim) * trained


def _sums(shape: Shape) -> int:
    """Numbers of a tensor's sums of rows and of columns; a vector's squares are kept one by one."""
    return prod(shape) if len(shape) < 2 else prod(shape[:-1]) + prod(shape[:-2]) * shape[-1]


def _trained_shapes(config: ModelConfig, recipe: Recipe) -> Iterator[Shape]:
    lora = recipe.lora
    targets = meant_targets(config, lora) if lora is not None else ()
    for name, shape in parameter_shapes(config).items():
        if name.endswith("mlp.gate.weight"):
            if recipe.router.train:
                yield shape
        elif lora is None:
            yield shape
        elif _target_of(name) in targets:
            *stacked, outputs, inputs = shape
            yield (*stacked, lora.rank, inputs)
            yield (*stacked, outputs, lora.rank)


def _target_of(name: str) -> str:
    """The adapter target of a parameter."""
    if ".mlp.experts." in name:
        return "experts"
    return "shared_expert" if ".shared_expert." in name else name.removesuffix(".weight").rpartition(".")[2]
