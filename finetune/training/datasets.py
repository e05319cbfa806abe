"""Training and held-out data of a recipe, tokenised."""

from collections.abc import Callable, Sequence
from pathlib import Path

from data.dataset import Dataset, Known, prepare
from data.sources import Source
from data.tokenizer import Tokenizer
from finetune.recipe.paths import expanded, resolve
from finetune.recipe.recipe import Recipe
from finetune.recipe.sections import Source as RecipeSource
from finetune.run.folder import folder_of


def datasets(
    recipe: Recipe,
    tokenizer: Tokenizer,
    known: Sequence[Known | None] = (None, None),
    progress: Callable[[], None] = lambda: None,
) -> tuple[Dataset, Dataset | None]:
    """Training and held-out data of the recipe, tokenised once and kept, and compared with what was written.

    Args:
        known: which data they are, where another host has found them.
        progress: called whenever a part of the work is done.

    Raises:
        DataError: a source is missing, holds rows that cannot be read, or leaves nothing to train on.
    """
    data = recipe.data

    def prepared(sources: Sequence[RecipeSource], known: Known | None) -> Dataset:
        return prepare(
            [Source(str(resolve(source.path) or source.path), source.format) for source in sources],
            tokenizer=tokenizer,
            sequence_tokens=recipe.train.sequence_tokens,
            packing=data.packing,
            on_bad_row=data.on_bad_row,
            over_long=data.over_long,
            cache=cache_of(recipe),
            known=known,
            report=lambda line: print(line, flush=True),  # only the rank that builds says anything
            progress=progress,
        )

    return prepared(data.train, known[0]), prepared(data.eval, known[1]) if data.eval else None


def cache_of(recipe: Recipe) -> Path:
    """Where tokenised data is kept."""
    cache = recipe.data.cache
    return expanded(cache).absolute() if cache else folder_of(recipe).parent / ".cache"
