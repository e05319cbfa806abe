"""Sizes of the adapters that a recipe's targets select in a model. Imports no torch."""

from finetune.model.config import ModelConfig
from finetune.recipe.recipe import Recipe, RecipeError
from finetune.recipe.sections import Lora, Target


def target_sizes(config: ModelConfig) -> dict[Target, int]:
    """Inputs plus outputs of every adapter target, summed over the layers that have it."""
    hidden, moe = config.hidden_size, len(config.moe_layers)
    linear = config.layer_types.count("linear_attention")
    full = config.num_hidden_layers - linear
    heads, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return {
        "q_proj": full * (hidden + 2 * heads),
        "k_proj": full * (hidden + kv),
        "v_proj": full * (hidden + kv),
        "o_proj": full * (heads + hidden),
        "in_proj_qkvz": linear * (hidden + 2 * config.key_dim + 2 * config.value_dim),
        "in_proj_ba": linear * (hidden + 2 * config.linear_num_value_heads),
        "out_proj": linear * (config.value_dim + hidden),
        "shared_expert": moe * 3 * (hidden + config.shared_expert_intermediate_size),
        "experts": moe * config.num_experts * (2 * hidden + 3 * config.moe_intermediate_size),
    }


def meant_targets(config: ModelConfig, lora: Lora) -> tuple[Target, ...]:
    """The targets of this recipe, with `all-linear` expanded for this model."""
    everything = "all-linear" in lora.targets
    return tuple(
        target
        for target, size in target_sizes(config).items()
        if target in lora.targets or (everything and size and target != "experts")
    )


def adapter_parameters(config: ModelConfig, recipe: Recipe) -> tuple[int, int]:
    """Number of adapter parameters on linear layers, and on all routed experts.

    An adapter has rank x (inputs + outputs) parameters. Every expert has one adapter for each of its two matrices.

    Raises:
        RecipeError: a target that no layer of this model has.
    """
    if recipe.lora is None:
        return 0, 0
    sizes, targets = target_sizes(config), meant_targets(config, recipe.lora)
    absent = [target for target in targets if not sizes[target]]
    if absent:
        raise RecipeError(f"{recipe.name}: lora.targets: no layer of this model has {', '.join(absent)}; leave it out")
    everything = recipe.lora.rank * sum(sizes[target] for target in targets)
    on_experts = recipe.lora.rank * sizes["experts"] if "experts" in targets else 0
    return everything - on_experts, on_experts


def all_linear_sentence(config: ModelConfig, lora: Lora) -> str:
    """Sentence that says what `all-linear` selects in this model."""
    linear = [target for target in meant_targets(config, lora) if target != "experts"]
    return (
        f"lora.targets all-linear: {', '.join(linear)}; not the router, the shared expert's gate, dense MLPs, the"
        " embedding and the output layer"
        + ("" if "experts" in lora.targets else ", and not the routed experts ([all-linear, experts] adapts them)")
    )
