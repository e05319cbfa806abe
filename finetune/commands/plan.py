"""`plan` and `ranks`: the resources of a run, and the number of ranks on this machine. Imports no torch."""

import os
import shutil
import sys

import psutil

from data.token_ids import check_rows, token_ids
from finetune.cluster.gpus import gpus
from finetune.commands.ranks import fit_to_ranks, ranks_here
from finetune.commands.start_notes import start_notes
from finetune.plan.exchange import Links
from finetune.plan.planner import model_config, plan
from finetune.plan.report import render
from finetune.plan.workload import GIB, Machine
from finetune.recipe.recipe import Recipe, RecipeError
from finetune.run.folder import folder_of
from finetune.run.packages import check_packages
from finetune.run.place import check_place
from finetune.training.epochs import planned_steps, tokenizer_folder


def print_plan(recipe: Recipe, *, ranks: int | None, nodes: int | None, device_gib: float | None, links: Links) -> int:
    """Print the resources that the run needs.

    Args:
        ranks: number of ranks to plan for; by default that of this machine's GPUs, or the recipe's if it has none.
        nodes: number of machines; by default one, or with `device_gib` one for every 8 ranks.
        device_gib: memory of each rank's GPU in GiB, to plan without a GPU.
        links: bandwidths between ranks.

    Returns:
        The exit code: 1 if the run does not fit.

    Raises:
        RecipeError: more machines than ranks, or a recipe that the number of ranks does not divide.
        DataError: the tokenizer has tokens without a row in the embedding.
    """
    config, source = model_config(recipe)
    folder = tokenizer_folder(recipe)
    if folder is not None:
        check_rows(token_ids(folder), config.vocab_size, folder)
    recipe, steps = planned_steps(recipe)
    machine = _machine(recipe, ranks, nodes, device_gib, links)
    planned = plan(config, fit_to_ranks(recipe, machine.ranks, print), machine)
    for sentence in [*start_notes(recipe, config, folder_of(recipe)), *_refusals_here(recipe)]:
        print(f"note: {sentence}")
    for sentence in steps:
        print(sentence)
    print(render(planned, source), flush=True)
    return 1 if planned.fits is False else 0


def _refusals_here(recipe: Recipe) -> list[str]:
    """Why the run could not start on this machine; it may be planned for another one."""
    refusals = []
    for check in (lambda: check_place(folder_of(recipe)), lambda: check_packages(recipe)):
        try:
            check()
        except RecipeError as error:
            refusals.append(f"on this machine the run would not start: {error}")
    return refusals


def print_ranks(recipe: Recipe) -> int:
    """Print the number of ranks to start here; on standard error, whether GPUs stay unused."""
    here = len(gpus())
    ranks = ranks_here(recipe, here)
    if ranks < here:
        print(
            f"using {ranks} of {here} GPUs: parallel.expert {recipe.parallel.expert} and the batch sizes of the recipe"
            " do not divide over more",
            file=sys.stderr,
        )
    print(ranks)
    return 0


def _machine(recipe: Recipe, ranks: int | None, nodes: int | None, device_gib: float | None, links: Links) -> Machine:
    ranks = ranks or ranks_here(recipe, len(gpus()) if device_gib is None else 0)
    if nodes is not None and nodes > ranks:
        raise RecipeError(f"{recipe.name}: {ranks} rank(s) cannot be spread over {nodes} machines")
    per_node = -(-ranks // nodes) if nodes else ranks if device_gib is None else min(ranks, 8)
    here = next(place for place in (folder_of(recipe), *folder_of(recipe).parents) if os.path.exists(place))
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
    device = next(iter(gpus()), None)
    return Machine(
        ranks=ranks,
        ranks_per_node=per_node,
        device_name=device.name if device else "CPU",
        device_bytes=device.memory_bytes if device else None,
        host_bytes=psutil.virtual_memory().total,
        disk_bytes=disk,
        links=links,
    )
