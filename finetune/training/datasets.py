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
    """Tokenise training and held-out data of the recipe, or open them from the cache and verify its hashes.

    Args:
        known: identity of the training and held-out data, if another host has already determined it.
        progress: called after each piece of work.

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
            report=lambda line: print(line, flush=True),  # called only on the rank that tokenises
            progress=progress,
        )

    return prepared(data.train, known[0]), prepared(data.eval, known[1]) if data.eval else None


def cache_of(recipe: Recipe) -> Path:
    """Folder of the tokenised data."""
    cache = recipe.data.cache
    return expanded(cache).absolute() if cache else folder_of(recipe).parent / ".cache"
