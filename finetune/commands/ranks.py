"""How many ranks a machine starts for a recipe, and what becomes of the recipe on another number of them."""

import math
from collections.abc import Callable

from finetune.cluster.gpus import gpus
from finetune.recipe.recipe import Recipe, batch_problem


def ranks_here(recipe: Recipe, gpu_count: int) -> int:
    """How many ranks to start on a machine with so many GPUs: the most that the recipe's experts and batch divide over.

    Without a GPU it is what the recipe says. One rank always serves, since it can hold every expert.
    """
    if not gpu_count:
        return recipe.parallel.ranks

    def divides(ranks: int) -> bool:
        expert = fit_to_ranks(recipe, ranks, lambda sentence: None).parallel.expert
        return ranks % expert == 0 and batch_problem(recipe, ranks) is None

    return next((ranks for ranks in range(gpu_count, 1, -1) if divides(ranks)), 1)


def fit_to_ranks(recipe: Recipe, size: int, say: Callable[[str], None]) -> Recipe:
    """The recipe with the expert parallel size that so many ranks allow; said aloud when it is another than written.

    A run that goes on with fewer ranks than its recipe was written for shares the experts out over the most ranks that
    divide both. Only memory and speed depend on it, and the plan says whether there is room. The global batch stays as
    it is; `accumulation` refuses a number of ranks that it does not divide over.
    """
    parallel = recipe.parallel
    expert = math.gcd(parallel.expert, size) if size < parallel.ranks else parallel.expert
    if size == 1 < parallel.ranks and (expert < parallel.expert or not gpus()):
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
