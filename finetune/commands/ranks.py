"""The number of ranks for a recipe on this machine, and adaptation of the recipe to another number."""

import math
from collections.abc import Callable

from finetune.cluster.gpus import gpus
from finetune.recipe.recipe import Recipe, batch_problem


def ranks_here(recipe: Recipe, gpu_count: int) -> int:
    """The number of ranks to start on `gpu_count` GPUs: the largest that suits the experts and the batch.

    Without a GPU it is the recipe's. One rank is always possible, since it can hold every expert.
    """
    if not gpu_count:
        return recipe.parallel.ranks

    def divides(ranks: int) -> bool:
        expert = fit_to_ranks(recipe, ranks, lambda sentence: None).parallel.expert
        return ranks % expert == 0 and batch_problem(recipe, ranks) is None

    return next((ranks for ranks in range(gpu_count, 1, -1) if divides(ranks)), 1)


def fit_to_ranks(recipe: Recipe, size: int, say: Callable[[str], None]) -> Recipe:
    """The recipe with an expert parallel size that divides the number of ranks; reported if it differs from the recipe.

    With fewer ranks than in the recipe, the experts are partitioned over the greatest common divisor of both sizes.
    This affects only memory and speed; the plan reports whether it fits. The global batch is unchanged; `accumulation`
    rejects a number of ranks that does not divide it.
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
