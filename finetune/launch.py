"""What `train`, `plan` and `data` do with a recipe on this machine."""

import logging
import shutil
import sys
import warnings

import deepspeed
import psutil
import torch
from rich.console import Console

from data.show import describe, show_pack
from data.tokenizer import load_tokenizer
from finetune.assembly import Say, datasets
from finetune.checkpoint.weights import resolve_model
from finetune.model.config import ModelConfig
from finetune.parallel import world as worlds
from finetune.plan_text import render
from finetune.planner import GIB, Machine, model_config, plan
from finetune.recipe import Recipe, RecipeError
from finetune.run_folder import claim, finished_step, folder_of
from finetune.trainer import Run, TrainingError


def train_here(recipe: Recipe) -> int:
    """Train on this rank, from the newest checkpoint if there is one, to the recipe's last step."""
    rank, size = worlds.read_rank()
    say = _voice(rank)
    deepspeed.utils.logger.setLevel(logging.ERROR)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    # DeepSpeed 0.19.8 calls collectives by names that torch is retiring; nothing a user could act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
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
    with world.together(RecipeError):
        if world.is_main:
            claim(folder, recipe)
    say(f"{recipe.name}: {size} rank(s), expert parallel {world.expert_size}; the run is in {folder}")
    try:
        Run(recipe, folder, base, world, say).train()
    except (worlds.RankError, TrainingError):  # on every rank alike; told once, by rank 0
        raise
    except ValueError as error:
        if not world.is_main:  # found here alone, and the others may be waiting: say it, and let the launcher end them
            print(f"nextune: rank {rank}: {error}", file=sys.stderr, flush=True)
        raise
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


def print_plan(recipe: Recipe, *, ranks: int | None, device_gib: float | None) -> int:
    """Print what the run needs; exit code 1 when it does not fit.

    Args:
        ranks: plan for so many ranks instead of this machine's GPUs, or the recipe's number where there are none.
        device_gib: memory of each rank's GPU, for planning on a machine that has none.
    """
    config, source = model_config(recipe)
    planned = plan(config, recipe, _machine(recipe, ranks, device_gib))
    print(render(planned, source), flush=True)
    return 1 if planned.fits is False else 0


def _machine(recipe: Recipe, ranks: int | None, device_gib: float | None) -> Machine:
    gpus = torch.cuda.device_count()
    ranks = ranks or gpus or recipe.parallel.ranks
    here = next(place for place in (folder_of(recipe), *folder_of(recipe).parents) if place.exists())
    disk = shutil.disk_usage(here).free
    if device_gib is not None:
        return Machine(
            ranks=ranks,
            ranks_per_node=min(ranks, 8),
            device_name=f"GPU with {device_gib:g} GiB",
            device_bytes=int(device_gib * GIB),
            disk_bytes=disk,
        )
    device = torch.cuda.get_device_properties(0) if gpus else None
    return Machine(
        ranks=ranks,
        ranks_per_node=gpus or ranks,
        device_name=device.name if device else "CPU",
        device_bytes=device.total_memory if device else None,
        host_bytes=psutil.virtual_memory().total,
        disk_bytes=disk,
    )


def show_data(recipe: Recipe, packs: int) -> int:
    """Print the first sequences of the training data."""
    tokenizer = load_tokenizer(resolve_model(recipe.model.path))
    train, _ = datasets(recipe, tokenizer)
    console = Console(highlight=False)
    console.print(describe(train))
    for pack in range(min(packs, len(train))):
        for line in show_pack(train, tokenizer, pack):
            console.print(line)
    return 0


def _voice(rank: int) -> Say:
    """How this rank tells the user what happens: rank 0 a line each, the others not at all."""

    def say(sentence: str) -> None:
        if rank == 0:
            print(sentence, flush=True)

    return say
