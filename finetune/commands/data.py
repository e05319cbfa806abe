"""`data`: training sequences as the model sees them."""

from rich.console import Console

from data.show import describe, show_pack
from data.tokenizer import load_tokenizer
from finetune.checkpoint.weights import resolve_model
from finetune.model.config import ModelConfig
from finetune.recipe.recipe import Recipe
from finetune.training.datasets import datasets


def show_data(recipe: Recipe, packs: int) -> int:
    """Print the first sequences of the training data."""
    folder = resolve_model(recipe.model.path)
    tokenizer = load_tokenizer(folder, ModelConfig.from_folder(folder).vocab_size)
    train, _ = datasets(recipe, tokenizer)
    console = Console(highlight=False)
    console.print(describe(train))
    for pack in range(min(packs, len(train))):
        for line in show_pack(train, tokenizer, pack):
            console.print(line)
    return 0
