"""Operations per token of training a `qwen3_next` model.

A multiply-add is two operations. Every matrix takes part in a forward product and a product for the gradient of its
input. A trainable matrix also takes part in a product for its own gradient.

Source: the definitions in `model/`; the chunked form of the delta rule (arXiv 2412.06464, section 3.3).
"""

from collections.abc import Sequence

from finetune.model.config import ModelConfig, Recompute
from finetune.plan.activations import DELTA_CHUNK_TOKENS

# Forward plus backward of softmax attention, in forward passes: the forward has two products, the backward five.
ATTENTION_PASSES = 3.5
DELTA_RULE_PASSES = 3.0


def active_parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters of the matrices that multiply one token, by component. Other operations are negligible."""
    hidden, moe = config.hidden_size, len(config.moe_layers)
    linear = config.layer_types.count("linear_attention")
    heads, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    deltanet = hidden * (2 * config.key_dim + 3 * config.value_dim + 2 * config.linear_num_value_heads)
    return {
        "deltanet": linear * deltanet,
        "attention": (config.num_hidden_layers - linear) * hidden * (3 * heads + 2 * kv),
        "experts": moe * config.num_experts_per_tok * 3 * hidden * config.moe_intermediate_size,
        "router": moe * hidden * config.num_experts,
        "shared_expert": moe * hidden * (3 * config.shared_expert_intermediate_size + 1),
        "dense_mlp": (config.num_hidden_layers - moe) * 3 * hidden * config.intermediate_size,
        "lm_head": config.vocab_size * hidden,
    }


def step_operations(
    config: ModelConfig, sequence_tokens: int, *, adapter_parameters: int, full_parameter: bool, router_trains: bool
) -> float:
    """Operations per token of forward and backward, without recomputation."""
    active = active_parameters(config)
    trained = sum(active.values()) if full_parameter else 0
    if full_parameter != router_trains:
        trained += active["router"] if router_trains else -active["router"]
    attention, delta_rule = _mixer_operations(config, sequence_tokens)
    matrices = 4 * sum(active.values()) + 2 * trained + 6 * adapter_parameters
    return matrices + ATTENTION_PASSES * attention + DELTA_RULE_PASSES * delta_rule


def recompute_operations(
    config: ModelConfig,
    sequence_tokens: int,
    *,
    adapter_parameters: int,
    layers: Sequence[Recompute],
    skips_down: bool = False,
) -> float:
    """Operations per token of the recomputed halves of layers. Adapters count in proportion.

    Args:
        layers: what each layer recomputes.
        skips_down: recomputation skips the experts' last product, whose output nothing reads.
    """
    halves = [half_operations(config, layer, sequence_tokens) for layer in range(config.num_hidden_layers)]
    again = sum(m * r.mixer + e * r.experts for (m, e), r in zip(halves, layers, strict=True))
    again += 2 * adapter_parameters * again / sum(map(sum, halves))
    return again - skips_down * down_operations(config) * sum(layers[layer].experts for layer in config.moe_layers)


def attention_operations(config: ModelConfig, sequence_tokens: int) -> float:
    """Forward operations per token of attention itself, over all layers; it is never recomputed."""
    return _mixer_operations(config, sequence_tokens)[0]


def down_operations(config: ModelConfig) -> float:
    """Forward operations per token of the experts' down projection in one layer."""
    return 2.0 * config.num_experts_per_tok * config.hidden_size * config.moe_intermediate_size


def half_operations(config: ModelConfig, layer: int, sequence_tokens: int) -> tuple[float, float]:
    """Forward operations per token of one layer's halves: the mixer, and the router and experts or the dense MLP.

    Attention itself does not count, because its output is stored and never recomputed.
    """
    active = active_parameters(config)
    linear, moe = config.layer_types.count("linear_attention"), len(config.moe_layers)
    _, delta_rule = _mixer_operations(config, sequence_tokens)
    if config.layer_types[layer] == "linear_attention":
        mixer = (2 * active["deltanet"] + delta_rule) / linear
    else:
        mixer = 2 * active["attention"] / (config.num_hidden_layers - linear)
    if config.is_moe(layer):
        return mixer, 2 * (active["experts"] + active["router"] + active["shared_expert"]) / moe
    return mixer, 2 * active["dense_mlp"] / (config.num_hidden_layers - moe)


def _mixer_operations(config: ModelConfig, sequence_tokens: int) -> tuple[float, float]:
    """Forward operations per token of causal attention and of the delta rule, over all layers, without projections."""
    linear = config.layer_types.count("linear_attention")
    # Two products of 2 x time operations each, halved by the causal mask.
    attention = 2.0 * sequence_tokens * config.num_attention_heads * config.head_dim
    key, value = config.linear_key_head_dim, config.linear_value_head_dim
    rule = config.linear_num_value_heads * (6.0 * key * value + 4 * DELTA_CHUNK_TOKENS * (key + value))
    return (config.num_hidden_layers - linear) * attention, linear * rule
