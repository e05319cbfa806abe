"""Converts `train.epochs` to steps, which requires tokenised and packed training data."""

import math
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from finetune.model.config import ModelConfig
from finetune.recipe.paths import resolve
from finetune.recipe.recipe import Recipe


def steps_of_epochs(recipe: Recipe, packs: int) -> int:
    """Number of steps that make `train.epochs` passes over `packs` training sequences, rounded up."""
    per_step = recipe.train.global_batch_tokens // recipe.train.sequence_tokens
    return math.ceil(recipe.train.epochs * packs / per_step)


def with_steps(recipe: Recipe, packs: int) -> tuple[Recipe, list[str]]:
    """Set `train.steps` from `train.epochs`; return the recipe and sentences for the user.

    The result depends only on data and batch size, so a resumed run gets the same number.

    Args:
        packs: number of training sequences.
    """
    if not recipe.train.epochs:
        return recipe, []
    steps = steps_of_epochs(recipe, packs)
    per_step = recipe.train.global_batch_tokens // recipe.train.sequence_tokens
    sentence = (
        f"train.epochs {recipe.train.epochs:g}: {steps:,} steps of {per_step:,} sequences; the data holds {packs:,}"
    )
    warmup = recipe.optim.warmup_steps
    return (
        recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": steps})}),
        [sentence, *([f"the warm-up of {warmup} steps is cut to the {steps} of the run"] if warmup > steps else [])],
    )


def planned_steps(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """Like `with_steps`, for a plan. Tokenises the data into the cache if the tokenizer is on this machine."""
    if not recipe.train.epochs:
        return recipe, []
    folder = tokenizer_folder(recipe)
    if folder is None:
        return recipe, [
            f"train.epochs {recipe.train.epochs:g}: the number of steps is known when the data is tokenised, and the"
            f" tokenizer of {recipe.model.path} is not on this machine"
        ]
    from data.tokenizer import load_tokenizer
    from finetune.training.datasets import datasets

    train, _ = datasets(recipe, load_tokenizer(folder, ModelConfig.from_folder(folder).vocab_size))
    return with_steps(recipe, len(train))


def tokenizer_folder(recipe: Recipe) -> Path | None:
    """The local folder that holds the model's tokenizer, or None. Downloads nothing."""
    path = recipe.model.path
    here = resolve(path)
    if here is not None:
        return here
    cached = try_to_load_from_cache(path, "tokenizer.json")
    return Path(cached).parent if isinstance(cached, str) else None
