"""Notes about a run that can start; printed by `plan` and at the start of training."""

from pathlib import Path

from finetune.checkpoint.adapter_limits import adapter_limits
from finetune.model.config import ModelConfig
from finetune.recipe.notes import notes
from finetune.recipe.recipe import Recipe
from finetune.run.place import place_notes


def start_notes(recipe: Recipe, config: ModelConfig, folder: Path) -> list[str]:
    """One sentence each: settings without effect, positions beyond the base's, limits of the adapter, the run folder.

    Args:
        config: configuration of the base model.
        folder: the run folder, which need not exist.
    """
    sentences = notes(recipe)
    tokens, positions = recipe.train.sequence_tokens, config.max_position_embeddings
    if tokens > positions and recipe.model.init == "pretrained":
        sentences.append(
            f"train.sequence_tokens: sequences of {tokens:,} tokens, but the base model was trained on positions up to"
            f" {positions:,} (max_position_embeddings of its config.json) and may do badly beyond them"
        )
    if recipe.lora is not None:
        sentences += adapter_limits(recipe.lora.targets, trains_routers=recipe.router.train)
    return sentences + place_notes(folder)
