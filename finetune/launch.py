"""What `train`, `plan` and `data` do with a recipe on this machine."""

import logging
import os
import shutil
import sys
import warnings
from pathlib import Path

import deepspeed
import psutil
import torch
from rich.console import Console
from torch.distributed import DistNetworkError

from data.show import describe, show_pack
from data.tokenizer import load_tokenizer
from finetune.assembly import Say, datasets
from finetune.balance import RouterLossError
from finetune.checkpoint.weights import resolve_model
from finetune.failure import is_told, record_crash
from finetune.model.config import ModelConfig
from finetune.parallel import world as worlds
from finetune.plan_text import render
from finetune.planner import GIB, Machine, model_config, plan
from finetune.recipe import Recipe, RecipeError
from finetune.run_folder import check_folder, finished_step, folder_of, hold
from finetune.trainer import Run, TrainingError


class LaunchError(ValueError):
    """Ranks that were started and cannot work together."""


FOUND_BY_ALL = (worlds.RankError, TrainingError, RouterLossError)  # raised on every rank alike


def train_here(recipe: Recipe) -> int:
    """Train on this rank, from the newest checkpoint if there is one, to the recipe's last step."""
    rank, size = worlds.read_rank()
    say = _voice(rank)
    _share_cores()
    deepspeed.utils.logger.setLevel(logging.ERROR)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    # DeepSpeed 0.19.8 calls collectives by names that torch is retiring; nothing a user could act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    folder = folder_of(recipe)
    check_folder(folder, recipe)
    if (finished_step(folder) or 0) >= recipe.train.steps:
        say(f"{folder}: this run is complete; `python -m finetune summary {folder}` shows it")
        return 0
    base = resolve_model(recipe.model.path)
    config = ModelConfig.from_folder(base)
    recipe = _fit_to_ranks(recipe, size, say)
    recipe.accumulation(size)
    recipe.check_ranks(size, config.num_experts)
    world = _join(recipe.parallel.expert)
    with world.together(RecipeError):
        if world.is_main and folder.exists():
            hold(folder).release()  # before a second copy of a large model could take the memory of the first
    say(f"{recipe.name}: {size} rank(s), expert parallel {world.expert_size}; the run is in {folder}")
    _run(recipe, folder, base, world, say)
    worlds.stop()
    return 0


def _join(expert_size: int) -> worlds.World:
    try:
        return worlds.start(expert_size)
    except DistNetworkError as error:
        raise LaunchError(
            f"the ranks do not find each other at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            f" ({str(error).splitlines()[0]}); if another run is using that port, give another:"
            " deepspeed --master_port PORT"
        ) from error


def _run(recipe: Recipe, folder: Path, base: Path, world: worlds.World, say: Say) -> None:
    """Take the run to its end; what ends it before is recorded if it is a bug, and told if no other rank knows."""
    run = None
    try:
        run = Run(recipe, folder, base, world, say)
        run.train()
    except Exception as error:
        if not is_told(error):
            record_crash(folder, error, rank=world.rank, step=run.step if run else None)
        elif not world.is_main and not isinstance(error, FOUND_BY_ALL):
            print(f"nextune: rank {world.rank}: {error}", file=sys.stderr, flush=True)
        raise


def _share_cores() -> None:
    """Give every rank its part of this machine's cores, unless OMP_NUM_THREADS says how many threads each may use.

    By default torch uses all of them in every process; two ranks on two cores then take ten times as long.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("LOCAL_SIZE", "1"))))


def ranks_here(recipe: Recipe, gpus: int) -> int:
    """How many ranks to start on a machine with so many GPUs: the most that the recipe's experts and batch divide over.

    Without a GPU it is what the recipe says. One rank always serves, since it can hold every expert.
    """
    if not gpus:
        return recipe.parallel.ranks
    train = recipe.train

    def divides(ranks: int) -> bool:
        return (
            ranks % recipe.parallel.expert == 0 and train.global_batch_tokens % (train.micro_batch_tokens * ranks) == 0
        )

    return next((ranks for ranks in range(gpus, 1, -1) if divides(ranks)), 1)


def print_ranks(recipe: Recipe) -> int:
    """Print how many ranks to start here; on standard error, when GPUs stay unused, that they do."""
    gpus = torch.cuda.device_count()
    ranks = ranks_here(recipe, gpus)
    if ranks < gpus:
        print(
            f"using {ranks} of {gpus} GPUs: parallel.expert {recipe.parallel.expert} and the batch sizes of the recipe"
            " do not divide over more",
            file=sys.stderr,
        )
    print(ranks)
    return 0


def _fit_to_ranks(recipe: Recipe, size: int, say: Say) -> Recipe:
    """The recipe, with the experts on one rank when there is only one; said aloud."""
    if size > 1 or (recipe.parallel.expert == 1 and recipe.parallel.ranks == 1):
        return recipe
    if recipe.parallel.expert > 1 or not torch.cuda.is_available():
        say(
            f"running on one rank with every expert on it, although the recipe says parallel.ranks"
            f" {recipe.parallel.ranks} and parallel.expert {recipe.parallel.expert}; ./launch.sh, or `deepspeed"
            f" --num_gpus {recipe.parallel.ranks}`, starts that many where there are as many GPUs, or none"
        )
    return recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update={"expert": 1})})


def print_plan(recipe: Recipe, *, ranks: int | None, device_gib: float | None) -> int:
    """Print what the run needs; exit code 1 when it does not fit.

    Args:
        ranks: plan for so many ranks instead of this machine's GPUs, or the recipe's number where there are none.
        device_gib: memory of each rank's GPU, for planning on a machine that has none.
    """
    config, source = model_config(recipe)
    machine = _machine(recipe, ranks, device_gib)
    planned = plan(config, _fit_to_ranks(recipe, machine.ranks, print), machine)
    print(render(planned, source), flush=True)
    return 1 if planned.fits is False else 0


def _machine(recipe: Recipe, ranks: int | None, device_gib: float | None) -> Machine:
    gpus = torch.cuda.device_count()
    ranks = ranks or ranks_here(recipe, gpus if device_gib is None else 0)
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
        ranks_per_node=ranks,
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
