"""`train`: train a recipe on this rank, from the newest checkpoint to the last step."""

import logging
import os
import sys
import warnings
from pathlib import Path

import deepspeed
import torch

from data.token_ids import check_rows, token_ids
from finetune.checkpoint.resume import newest_name
from finetune.checkpoint.shards import open_checkpoint
from finetune.checkpoint.weights import match, resolve_model
from finetune.cluster.launcher import Launcher
from finetune.commands.ranks import fit_to_ranks
from finetune.commands.start_notes import start_notes
from finetune.distributed import world as worlds
from finetune.model.config import ModelConfig
from finetune.recipe.paths import resolve
from finetune.recipe.recipe import Recipe, RecipeError
from finetune.run.agreement import check_agreement
from finetune.run.failure import LostRankError, is_told, readable, record_crash, told_by_every_host
from finetune.run.folder import check_folder, folder_of, is_complete, lost_checkpoint
from finetune.run.packages import check_packages
from finetune.run.place import hold
from finetune.run.starting_point import check_resume_from
from finetune.run.watchdog import STALL_SECONDS, Watch
from finetune.training.adapter_folder import check_adapter
from finetune.training.assembly import Say
from finetune.training.router_loss import RouterLossError
from finetune.training.trainer import Run, TrainingError

LOST = (
    *("Connection closed by peer", "Connection reset by peer", "Broken pipe"),
    *("ncclRemoteError", "remote process exited or there was a network error"),
)
TIMED_OUT = ("Timed out waiting", "before timing out")
FOUND_BY_ALL = (worlds.RankError, TrainingError, RouterLossError)  # raised identically on every rank


def train_here(recipe: Recipe, launcher: Launcher | None) -> int:
    """Train on this rank, from the newest checkpoint if there is one, to the recipe's last step.

    Args:
        launcher: the processes whose death ends the run; None: they are not watched.
    """
    rank, size = worlds.read_rank()
    say = _voice(rank)
    _share_cores()
    deepspeed.utils.logger.setLevel(logging.ERROR)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    # DeepSpeed 0.19.8 calls collectives by names that torch is deprecating; users cannot change that.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # Its barriers name no device; torch then uses the current one, which `worlds.start` has set for this rank.
    warnings.filterwarnings("ignore", message=r"barrier\(\): using the device under current context")
    folder = folder_of(recipe)
    with told_by_every_host():
        check_packages(recipe)
        for note in check_folder(folder, recipe):
            say(f"note: {note}")
        check_resume_from(folder, recipe)
        fresh = newest_name(folder / "checkpoints") is None
        if fresh and recipe.lora is not None and recipe.lora.init_from is not None:
            check_adapter(resolve(recipe.lora.init_from) or Path(recipe.lora.init_from), recipe.lora)
        if is_complete(folder, recipe):
            say(f"{folder}: this run is complete; `python -m finetune summary {folder}` shows it")
            return 0
        if (lost := lost_checkpoint(folder)) is not None:
            say(lost)
        base = resolve_model(recipe.model.path)
        config = ModelConfig.from_folder(base)
        check_rows(token_ids(base), config.vocab_size, base)
        if recipe.model.init == "pretrained":
            match(open_checkpoint(base), config)
        recipe = fit_to_ranks(recipe, size, say)
        recipe.accumulation(size)
        recipe.check_ranks(size, config.num_experts)
        for sentence in start_notes(recipe, config, folder):
            say(f"note: {sentence}")
        world = worlds.start(recipe.parallel.expert)
    _run(recipe, folder, base, world, say, launcher)
    worlds.stop()
    return 0


def _run(recipe: Recipe, folder: Path, base: Path, world: worlds.World, say: Say, launcher: Launcher | None) -> None:
    """Run to the end. Bugs are recorded; a user's error is printed if no other rank reports it."""
    run, watch = None, Watch(folder, world.rank, STALL_SECONDS)

    try:
        base_now = check_agreement(recipe, folder, base, world)
        with world.together(RecipeError):
            if world.is_main and folder.exists():
                hold(folder).release()  # before another copy of a large model could take the memory of the running one
        watch.begin()
        worlds.set_timeouts()  # from here on, hangs are detected by the watch
        say(f"{recipe.name}: {world.size} rank(s), expert parallel {world.expert_size}; the run is in {folder}")
        run = Run(recipe, folder, base, base_now, world, say, watch)
        watch.heed_signals(launcher)
        run.train()
    except Exception as error:
        if is_lost_connection(error) or is_timeout(error):
            raise LostRankError(lost(folder, run.step if run else None, error)) from None
        if not is_told(error):
            record_crash(folder, error, rank=world.rank, step=run.step if run else None)
        elif not world.is_main and not isinstance(error, FOUND_BY_ALL):
            print(f"nextune: rank {world.rank}: {readable(error)}", file=sys.stderr, flush=True)
        raise
    finally:
        watch.end()


def is_lost_connection(error: Exception) -> bool:
    """Whether a collective failed because a participating rank has ended or its host is unreachable.

    gloo and NCCL raise no specific exception for this, only these messages.
    """
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in LOST)


def is_timeout(error: Exception) -> bool:
    """Whether a collective timed out because some rank did not take part."""
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in TIMED_OUT)


def lost(folder: Path, step: int | None, error: Exception) -> str:
    """The message of a rank that lost its peers, in step `step` or before the first."""
    kept, stacks = newest_name(folder / "checkpoints"), folder / "crash"
    when = f"in step {step}" if step else "before the first step"
    what = f"lost the connection to another rank {when}: a rank or a host has ended"
    if is_timeout(error):
        what = f"a collective timed out {when}: a rank hangs, or its host is gone without a word"
        if any(stacks.glob("rank*.stack")):
            what += f"; the stacks of all ranks are in {stacks}/"
    return f"{what} ({str(error).splitlines()[0].rstrip('. ')}); " + (
        f"the same command, or one with fewer hosts, continues from {kept}, or if that is damaged from one before it"
        if kept
        else "there is no checkpoint yet"
    )


def _share_cores() -> None:
    """Give every rank its share of this machine's cores, unless OMP_NUM_THREADS is set.

    By default torch uses all cores in every process; two ranks on two cores then take ten times as long.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("LOCAL_SIZE", "1"))))


def _voice(rank: int) -> Say:
    """A function that prints a message on rank 0, and does nothing on other ranks."""

    def say(sentence: str) -> None:
        if rank == 0:
            print(sentence, flush=True)

    return say
