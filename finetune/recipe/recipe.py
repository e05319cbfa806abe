"""A recipe: every setting of one run, by section. `load.py` makes one from a file. Imports no torch."""

from typing import Annotated

from pydantic import Field

from finetune.recipe.sections import (
    Checkpoint,
    Data,
    Kernels,
    Lora,
    Model,
    Monitor,
    Optim,
    Output,
    Parallel,
    Router,
    Section,
    Train,
)

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
LONGEST_NAME = 100


class RecipeError(ValueError):
    """A recipe that cannot be run: one line for each mistake, with its place, its key and what to do."""


class Recipe(Section):
    """Every setting of one run."""

    name: Annotated[str, Field(pattern=f"^{NAME}$", max_length=LONGEST_NAME)] = ""
    """Name of the run and of its folder; the recipe's file name by default."""
    model: Model
    """The model that is trained."""
    data: Data
    """Training data and held-out data."""
    train: Train = Train()
    """Length of the run, batch sizes, recomputation and evaluation."""
    optim: Optim = Optim()
    """The optimizer and its schedule."""
    lora: Lora | None = Lora()
    """Low-rank adapters on a frozen base; null trains every parameter of the model instead."""
    router: Router = Router()
    """The routers of the experts."""
    parallel: Parallel = Parallel()
    """Partition of experts, optimizer state and gradients over ranks."""
    kernels: Kernels = Kernels()
    """Implementation of each part of the model."""
    monitor: Monitor = Monitor()
    """Measures of routing, and Weights & Biases."""
    checkpoint: Checkpoint = Checkpoint()
    """Checkpoints: when they are written, which are kept, and where a run starts from."""
    output: Output = Output()
    """Where results are written."""

    @property
    def packs_per_micro_batch(self) -> int:
        """Training sequences in one micro-batch of a rank."""
        return self.train.micro_batch_tokens // self.train.sequence_tokens

    @property
    def drift_every_steps(self) -> int:
        """Steps between drift measurements; 0 (never) without adapters, as there is no frozen base to compare with."""
        return self.monitor.drift_every_steps if self.lora is not None else 0

    def accumulation(self, ranks: int) -> int:
        """Micro-batches that each of `ranks` ranks forwards in one optimizer step.

        Raises:
            RecipeError: the global batch is not divisible by that number of ranks.
        """
        problem = batch_problem(self, ranks)
        if problem is not None:
            raise RecipeError(f"{self.name}: train.global_batch_tokens: {problem}")
        return self.train.global_batch_tokens // (self.train.micro_batch_tokens * ranks)

    def check_ranks(self, ranks: int, num_experts: int) -> None:
        """Check that the expert parallel size divides the number of ranks and of experts.

        Raises:
            RecipeError: names the number that parallel.expert does not divide.
        """
        expert = self.parallel.expert
        for whole, what in ((ranks, "ranks of this run"), (num_experts, "experts of the model")):
            if whole % expert:
                raise RecipeError(f"{self.name}: parallel.expert: {expert} does not divide the {whole} {what}")


def batch_problem(recipe: "Recipe", ranks: int) -> str | None:
    """Why the global batch is not a multiple of one micro-batch on each of `ranks` ranks, or None."""
    whole, micro = recipe.train.global_batch_tokens, recipe.train.micro_batch_tokens
    return multiple_problem(
        whole, micro * ranks, f"train.micro_batch_tokens x {ranks} rank{'s' if ranks > 1 else ''} ({micro} x {ranks})"
    )


def multiple_problem(whole: int, part: int, name: str) -> str | None:
    if whole % part == 0:
        return None
    near = max(round(whole / part), 1) * part
    return f"{whole} is not a multiple of {name}; {near} is"
