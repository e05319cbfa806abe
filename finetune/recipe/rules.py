"""Constraints between the settings of a recipe; a run whose settings contradict each other is refused.

A setting without effect is not a contradiction; `finetune/recipe/notes.py` reports it.
"""

import os
from collections.abc import Callable

from finetune.recipe.recipe import Recipe, batch_problem, multiple_problem


def _expert_problem(recipe: Recipe) -> str | None:
    ranks, expert = recipe.parallel.ranks, recipe.parallel.expert
    return f"{expert} does not divide parallel.ranks, which is {ranks}" if ranks % expert else None


def _stage_problem(recipe: Recipe) -> str | None:
    if recipe.parallel.zero_stage != 3:
        return None
    return (
        "stage 3 divides the weights that every rank holds, which beside the experts are a thirtieth of the model, and"
        " would gather them again in every pass; take 2, raise parallel.expert to divide the experts, and set"
        " parallel.offload: cpu if the optimizer's state does not fit; `plan` counts all of it"
    )


def _offload_problem(recipe: Recipe) -> str | None:
    if recipe.parallel.offload == "none" or recipe.parallel.zero_stage != 0:
        return None
    return "needs the state divided over the ranks; set parallel.zero_stage to 1 or 2"


def _offload_path_problem(recipe: Recipe) -> str | None:
    if recipe.parallel.offload != "nvme" or recipe.parallel.offload_path is not None:
        return None
    return "offload nvme needs a folder on a fast local disk"


def _recompute_problem(recipe: Recipe) -> str | None:
    words = recipe.train.recompute
    alone = [word for word in words if word in ("auto", "full", "none")]
    if alone and len(words) > 1:
        return f"{alone[0]} stands alone; a list holds deltanet, attention and experts"
    twice = [word for word in words if words.count(word) > 1]
    return f"{twice[0]} is there twice" if twice else None


def _length_problem(recipe: Recipe) -> str | None:
    steps, epochs = recipe.train.steps, recipe.train.epochs
    if steps and epochs:
        return f"{steps} and train.epochs {epochs:g} both say how long the run is; keep one, and set the other to 0"
    return None if steps or epochs else "missing; give it, or train.epochs: 1 to train once on all of the data"


def _warmup_twice_problem(recipe: Recipe) -> str | None:
    steps, ratio = recipe.optim.warmup_steps, recipe.optim.warmup_ratio
    if not steps or not ratio:
        return None
    return f"{ratio:g} and optim.warmup_steps {steps} both say how long it is; keep one, and set the other to 0"


def _adafactor_problem(recipe: Recipe) -> str | None:
    if recipe.optim.name != "adafactor":
        return None
    if recipe.parallel.zero_stage != 0:
        return (
            "adafactor needs whole matrices, which ZeRO-1 and 2 divide over the ranks; set parallel.zero_stage to 0,"
            " or take adamw"
        )
    experts_train = recipe.lora is None or "experts" in recipe.lora.targets
    if experts_train and recipe.parallel.expert > 1:
        return (
            "adafactor scales its step by the norm of a layer's experts together, which parallel.expert divides; set"
            " parallel.expert to 1, or take adamw"
        )
    return None


def _eight_bit_problem(recipe: Recipe) -> str | None:
    parallel = recipe.parallel
    if recipe.optim.name != "adamw_8bit" or parallel.zero_stage == 0:
        return None
    offload = "" if parallel.offload == "none" else " and parallel.offload to none"
    return (
        "adamw_8bit quantises matrices in blocks, which ZeRO-1 and 2 would cut apart; set parallel.zero_stage to"
        f" 0{offload}, or take adamw"
    )


def _targets_problem(recipe: Recipe) -> str | None:
    targets = recipe.lora.targets if recipe.lora else ()
    twice = sorted({target for target in targets if targets.count(target) > 1})
    return f"{', '.join(twice)} is listed twice" if twice else None


def _dropout_problem(recipe: Recipe) -> str | None:
    if recipe.lora is None or "experts" not in recipe.lora.targets or not recipe.lora.dropout:
        return None
    return "adapters of the routed experts have no dropout; set it to 0, or take experts out of lora.targets"


def _init_problem(recipe: Recipe) -> str | None:
    if recipe.model.init == "random" and (recipe.lora is not None or not recipe.router.train):
        return (
            "random weights that do not train would be lost with the run; set lora to null and router.train to true,"
            " or start from pretrained ones"
        )
    return None


def _sources_problem(recipe: Recipe) -> str | None:
    trained = {source.path for source in recipe.data.train}
    both = sorted(trained & {source.path for source in recipe.data.eval})
    return f"{', '.join(both)} is in data.train too; held-out rows must not be trained on" if both else None


def _output_problem(recipe: Recipe) -> str | None:
    if os.path.normpath(recipe.output.dir).strip("/"):
        return None
    return "is the root of the file system; name a folder for runs in it"


# (settings that a rule reads, the one it is about first; the rule, which returns what is wrong or None).
RULES: tuple[tuple[tuple[str, ...], Callable[[Recipe], str | None]], ...] = (
    (
        ("train.micro_batch_tokens", "train.sequence_tokens"),
        lambda r: multiple_problem(r.train.micro_batch_tokens, r.train.sequence_tokens, "train.sequence_tokens"),
    ),
    (
        ("train.global_batch_tokens", "train.micro_batch_tokens", "parallel.ranks"),
        lambda r: batch_problem(r, r.parallel.ranks),
    ),
    (("parallel.expert", "parallel.ranks"), _expert_problem),
    (("parallel.zero_stage",), _stage_problem),
    (("train.recompute",), _recompute_problem),
    (("parallel.offload", "parallel.zero_stage"), _offload_problem),
    (("parallel.offload_path", "parallel.offload"), _offload_path_problem),
    (("train.steps", "train.epochs"), _length_problem),
    (("optim.warmup_ratio", "optim.warmup_steps"), _warmup_twice_problem),
    (("optim.name", "parallel.zero_stage", "parallel.expert", "lora.targets"), _adafactor_problem),
    (("optim.name", "parallel.zero_stage", "parallel.offload"), _eight_bit_problem),
    (("lora.targets",), _targets_problem),
    (("lora.dropout", "lora.targets"), _dropout_problem),
    (("model.init", "lora", "router.train"), _init_problem),
    (("data.eval", "data.train"), _sources_problem),
    (("output.dir",), _output_problem),
)
