"""What `train`, `plan` and `data` do with a recipe on this machine."""

import logging
import math
import os
import shutil
import sys
import warnings
from pathlib import Path

import deepspeed
import psutil
import torch
from rich.console import Console

from data.show import describe, show_pack
from data.tokenizer import load_tokenizer
from finetune.agreement import check_agreement
from finetune.assembly import Say, datasets
from finetune.balance import RouterLossError
from finetune.checkpoint.resume import newest_name
from finetune.checkpoint.weights import resolve_model
from finetune.exchange_plan import Links
from finetune.failure import LostRankError, is_told, record_crash, told_by_every_host
from finetune.model.config import ModelConfig
from finetune.parallel import world as worlds
from finetune.plan_text import render
from finetune.planner import GIB, Machine, model_config, plan
from finetune.recipe import Recipe, RecipeError
from finetune.recipe_notes import notes
from finetune.recipe_rules import batch_problem
from finetune.run_folder import check_folder, finished_step, folder_of, hold
from finetune.trainer import Run, TrainingError
from finetune.watch import STALL_SECONDS, Watch

LOST = (
    *("Connection closed by peer", "Connection reset by peer", "Broken pipe"),
    *("ncclRemoteError", "remote process exited or there was a network error"),
)
TIMED_OUT = ("Timed out waiting", "before timing out")
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
    with told_by_every_host():
        check_folder(folder, recipe)
        if (finished_step(folder) or 0) >= recipe.train.steps:
            say(f"{folder}: this run is complete; `python -m finetune summary {folder}` shows it")
            return 0
        base = resolve_model(recipe.model.path)
        config = ModelConfig.from_folder(base)
        recipe = fit_to_ranks(recipe, size, say)
        recipe.accumulation(size)
        recipe.check_ranks(size, config.num_experts)
        for sentence in notes(recipe):
            say(f"note: {sentence}")
        world = worlds.start(recipe.parallel.expert)
    _run(recipe, folder, base, world, say)
    worlds.stop()
    return 0


def _run(recipe: Recipe, folder: Path, base: Path, world: worlds.World, say: Say) -> None:
    """Take the run to its end; what ends it before is recorded if it is a bug, and told if no other rank knows."""
    run, watch = None, Watch(folder, world.rank, STALL_SECONDS)

    def say_and_beat(sentence: str) -> None:
        # Alone there is nobody to wait for, and loading may take as long as it takes.
        if world.size > 1:
            watch.beat()
        say(sentence)

    try:
        check_agreement(recipe, folder, base, world)
        with world.together(RecipeError):
            if world.is_main and folder.exists():
                hold(folder).release()  # before a second copy of a large model could take the memory of the first
        watch.begin(launched=worlds.was_launched())
        say_and_beat(
            f"{recipe.name}: {world.size} rank(s), expert parallel {world.expert_size}; the run is in {folder}"
        )
        run = Run(recipe, folder, base, world, say_and_beat, watch)
        run.train()
    except Exception as error:
        if is_lost_connection(error) or is_timeout(error):
            raise LostRankError(lost(folder, run.step if run else None, error)) from None
        if not is_told(error):
            record_crash(folder, error, rank=world.rank, step=run.step if run else None)
        elif not world.is_main and not isinstance(error, FOUND_BY_ALL):
            print(f"nextune: rank {world.rank}: {error}", file=sys.stderr, flush=True)
        raise
    finally:
        watch.end()


def is_lost_connection(error: Exception) -> bool:
    """Whether a collective failed because a rank that takes part in it has ended, or its host cannot be reached.

    gloo and NCCL have no exception of their own for it, only these words.
    """
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in LOST)


def is_timeout(error: Exception) -> bool:
    """Whether a collective failed because some rank never came to it."""
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in TIMED_OUT)


def lost(folder: Path, step: int | None, error: Exception) -> str:
    """The sentence for a rank that another one has left alone, in this step or before the first."""
    kept, stacks = newest_name(folder / "checkpoints"), folder / "crash"
    when = f"in step {step}" if step else "before the first step"
    what = f"lost the connection to another rank {when}: a rank or a host has ended"
    if is_timeout(error):
        what = f"a collective timed out {when}: a rank hangs, or its host is gone without a word"
        if any(stacks.glob("rank*.stack")):
            what += f"; the stacks of all ranks are in {stacks}/"
    return f"{what} ({str(error).splitlines()[0].rstrip('. ')}); " + (
        f"the same command, or one with fewer hosts, continues from {kept}" if kept else "there is no checkpoint yet"
    )


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

    def divides(ranks: int) -> bool:
        expert = fit_to_ranks(recipe, ranks, lambda sentence: None).parallel.expert
        return ranks % expert == 0 and batch_problem(recipe, ranks) is None

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


def fit_to_ranks(recipe: Recipe, size: int, say: Say) -> Recipe:
    """The recipe with the expert parallel size that so many ranks allow; said aloud when it is another than written.

    A run that goes on with fewer ranks than its recipe was written for shares the experts out over the most ranks that
    divide both. Only memory and speed depend on it, and the plan says whether there is room. The global batch stays as
    it is; `accumulation` refuses a number of ranks that it does not divide over.
    """
    parallel = recipe.parallel
    expert = math.gcd(parallel.expert, size) if size < parallel.ranks else parallel.expert
    if size == 1 < parallel.ranks and (expert < parallel.expert or not torch.cuda.is_available()):
        say(
            f"running on one rank with every expert on it, although the recipe says parallel.ranks"
            f" {parallel.ranks} and parallel.expert {parallel.expert}; ./launch.sh, or `deepspeed"
            f" --num_gpus {parallel.ranks}`, starts that many where there are as many GPUs, or none"
        )
    elif expert < parallel.expert:
        say(
            f"{size} ranks instead of parallel.ranks {parallel.ranks}: expert parallel {expert} instead of"
            f" {parallel.expert}, the most that divides both; the training stays the same"
        )
    return recipe.model_copy(update={"parallel": parallel.model_copy(update={"expert": expert})})


def print_plan(recipe: Recipe, *, ranks: int | None, nodes: int | None, device_gib: float | None, links: Links) -> int:
    """Print what the run needs; exit code 1 when it does not fit.

    Args:
        ranks: plan for so many ranks instead of this machine's GPUs, or the recipe's number where there are none.
        nodes: machines that the ranks are spread over; by default one, or one for every 8 of planned GPUs.
        device_gib: memory of each rank's GPU, for planning on a machine that has none.
        links: what the links between ranks carry.

    Raises:
        RecipeError: more machines than ranks, or a recipe that does not divide over the ranks.
    """
    config, source = model_config(recipe)
    machine = _machine(recipe, ranks, nodes, device_gib, links)
    planned = plan(config, fit_to_ranks(recipe, machine.ranks, print), machine)
    for sentence in notes(recipe):
        print(f"note: {sentence}")
    print(render(planned, source), flush=True)
    return 1 if planned.fits is False else 0


def _machine(recipe: Recipe, ranks: int | None, nodes: int | None, device_gib: float | None, links: Links) -> Machine:
    gpus = torch.cuda.device_count()
    ranks = ranks or ranks_here(recipe, gpus if device_gib is None else 0)
    if nodes is not None and nodes > ranks:
        raise RecipeError(f"{recipe.name}: {ranks} rank(s) cannot be spread over {nodes} machines")
    per_node = -(-ranks // nodes) if nodes else ranks if device_gib is None else min(ranks, 8)
    here = next(place for place in (folder_of(recipe), *folder_of(recipe).parents) if place.exists())
    disk = shutil.disk_usage(here).free
    if device_gib is not None:
        return Machine(
            ranks=ranks,
            ranks_per_node=per_node,
            device_name=f"GPU with {device_gib:g} GiB",
            device_bytes=int(device_gib * GIB),
            disk_bytes=disk,
            links=links,
        )
    device = torch.cuda.get_device_properties(0) if gpus else None
    return Machine(
        ranks=ranks,
        ranks_per_node=per_node,
        device_name=device.name if device else "CPU",
        device_bytes=device.total_memory if device else None,
        host_bytes=psutil.virtual_memory().total,
        disk_bytes=disk,
        links=links,
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
