"""Activation memory per token: bytes that each operation of `model/` stores for the backward pass. Imports no torch.

The counts follow the operations in `model/`, or the fused kernels that replace them. Tests compare them with the
tensors that torch saves.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

from finetune.model.config import ModelConfig

FLOAT32 = 4  # bytes
INT64 = 8
DELTA_CHUNK_TOKENS = 64  # chunk_tokens of `chunked_gated_delta_rule`
LOSS_CHUNK_TOKENS = 2048  # chunk_tokens of `token_loss_sum`
# Copies of a chunk's logits while its loss is differentiated: logits and gradient in the dtype of the weights; logits,
# log-softmax and gradient in float32.
LOGIT_COPIES_FLOAT32 = 3
LOGIT_COPIES_WEIGHT = 2
LOSS_CHUNK_BYTES = 2**30  # CHUNK_BYTES of the fused loss: logits that exist simultaneously
TRANSIENT_TENSORS = 3  # simultaneous gradients of unfused operations, each as large as the half's largest saved tensor


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the saved tensors depend on, in addition to the sizes of the model."""

    weight_bytes: int
    full_parameter: bool  # stores the inputs of every weight, not only those of adapters
    sequence_tokens: int
    masked: bool  # attention isolates documents by a mask
    expert_adapter_rank: int = 0  # of adapters on the routed experts; 0: none
    router_losses: bool = False  # they read the router logits of every layer
    exchanged: bool = False  # expert parallelism: rows come from other ranks
    dropped: tuple[str, ...] = ()  # adapter targets with dropout: each stores its dropped-out input and the mask
    on_gpu: bool = False
    # Which computations use fused kernels; see `kernels` of a recipe.
    fused_experts: bool = False
    fused_layers: bool = False
    fused_mixers: bool = False
    cpu_mixers: bool = False  # plain torch with custom backward passes


class Sizes(NamedTuple):
    """Bytes per token of one layer."""

    mixer: float  # saved by the mixer half
    experts: float  # saved by the experts half
    between: float  # stored even if both halves are recomputed; includes the output of attention itself
    mixer_gradients: float  # exist simultaneously in the backward pass of that half
    experts_gradients: float


@functools.cache
def sizes(config: ModelConfig, setting: Setting) -> tuple[Sizes, ...]:
    """Activation memory of every layer."""
    kinds: dict[tuple[str, bool], Sizes] = {}
    for layer, mixer in enumerate(config.layer_types):
        kind = mixer, config.is_moe(layer)
        if kind not in kinds:
            kinds[kind] = Sizes(
                sum(mixer_tensors(config, layer, setting)),
                sum(experts_tensors(config, layer, setting)),
                kept_between_layers(config, layer, setting),
                mixer_gradients(config, layer, setting),
                experts_gradients(config, layer, setting),
            )
    return tuple(kinds[mixer, config.is_moe(layer)] for layer, mixer in enumerate(config.layer_types))


def mixer_tensors(config: ModelConfig, layer: int, setting: Setting) -> list[float]:
    """Bytes per token of every tensor that the mixer half of a layer saves, without the output of attention itself.

    Small tensors are not counted.
    """
    size = float(config.hidden_size * setting.weight_bytes)
    # The fused norms save only their input. That of the first is the layer's input, which is stored anyway.
    norms = [size] if setting.fused_layers else 2 * _norm(config.hidden_size, setting)
    if config.layer_types[layer] == "linear_attention":
        inputs = {"in_proj_qkvz": config.hidden_size, "in_proj_ba": config.hidden_size, "out_proj": config.value_dim}
        return [*norms, size, *_deltanet(config, setting), *_dropped(inputs, setting)]
    inputs = dict.fromkeys(("q_proj", "k_proj", "v_proj"), config.hidden_size)
    inputs["o_proj"] = config.num_attention_heads * config.head_dim
    return [*norms, size, *_attention(config, setting), *_dropped(inputs, setting)]


def experts_tensors(config: ModelConfig, layer: int, setting: Setting) -> list[float]:
    """Bytes per token of every tensor that the experts half (experts or dense MLP) of a layer saves."""
    size = float(config.hidden_size * setting.weight_bytes)
    # Experts that gather while loading save their input; the others save the gathered rows.
    fused = setting.fused_layers or gathers(setting)  # a fused router saves the same tensor
    inputs = [size] if setting.full_parameter or (config.is_moe(layer) and fused) else []
    shared = {"shared_expert": 2 * config.hidden_size + config.shared_expert_intermediate_size}
    return [
        *inputs,
        *(_moe(config, setting) if config.is_moe(layer) else _mlp(config, setting)),
        *(_dropped(shared, setting) if config.is_moe(layer) else []),
    ]


def gathers(setting: Setting) -> bool:
    """Whether the expert kernels gather rows while loading, without a copy of each row per chosen expert.

    The recomputation of such experts skips their last product, whose output nothing reads.
    """
    return setting.fused_experts and not setting.exchanged


def kept_between_layers(config: ModelConfig, layer: int, setting: Setting) -> float:
    """Bytes per token that a layer stores even if it is recomputed.

    These are its output, the output of attention itself (which is never recomputed), and the routing.
    """
    attended = attention_output(config, setting) if config.layer_types[layer] == "full_attention" else 0
    logits = 2 * FLOAT32 * config.num_experts if setting.router_losses else 0  # and the softmax of the router losses
    routing = logits + config.num_experts_per_tok * (INT64 + setting.weight_bytes)
    return config.hidden_size * setting.weight_bytes + attended + (routing if config.is_moe(layer) else 0)


def attention_output(config: ModelConfig, setting: Setting) -> int:
    """Bytes per token of the output of attention itself, and its float32 log-sum-exp."""
    return config.num_attention_heads * (config.head_dim * setting.weight_bytes + FLOAT32)


def mixer_gradients(config: ModelConfig, layer: int, setting: Setting) -> float:
    """Bytes per token of gradients and temporary tensors that exist simultaneously in the mixer's backward pass."""
    own = setting.fused_mixers or setting.cpu_mixers
    if not own or config.layer_types[layer] != "linear_attention":
        return TRANSIENT_TENSORS * max(mixer_tensors(config, layer, setting))
    # States before and after each chunk, corrections and values, queries and keys repeated per value head, and the
    # projection.
    by_head = config.linear_num_value_heads * config.linear_key_head_dim
    if setting.cpu_mixers:  # float32, all heads simultaneously, three matrices per chunk
        matrices = 3 * config.linear_num_value_heads * DELTA_CHUNK_TOKENS
        return FLOAT32 * (2 * _states(config) + 4 * config.value_dim + 3 * by_head + matrices)
    rule = 2 * _states(config) + 2 * config.value_dim + 2 * by_head
    return float(setting.weight_bytes * (rule + 2 * config.key_dim + 2 * config.value_dim))


def experts_gradients(config: ModelConfig, layer: int, setting: Setting) -> float:
    """Bytes per token of gradients and temporary tensors that exist simultaneously in the experts' backward pass."""
    if not config.is_moe(layer) or not gathers(setting):
        return TRANSIENT_TENSORS * max(experts_tensors(config, layer, setting))
    top_k, hidden, width = config.num_experts_per_tok, config.hidden_size, config.moe_intermediate_size
    trains = setting.full_parameter or setting.expert_adapter_rank > 0  # then activations and gathered rows also exist
    # Rows and activations, as in the forward pass. The gradient of the pre-activations overwrites them.
    rows = hidden + width + (2 * hidden if trains else 0)
    return float(setting.weight_bytes * (top_k * rows + 2 * hidden))


def loss_bytes(config: ModelConfig, tokens: int, setting: Setting) -> int:
    """Bytes that exist while the loss of a micro-batch of `tokens` is differentiated, chunk by chunk."""
    if setting.fused_layers:
        logits = min(LOSS_CHUNK_BYTES, tokens * config.vocab_size * setting.weight_bytes)
        # Weight gradient: the float32 sum; in the weight's dtype a chunk's or the rounded sum, and the scaled result.
        head = config.vocab_size * config.hidden_size * (FLOAT32 + 2 * setting.weight_bytes)
        return logits + head * setting.full_parameter + 3 * tokens * config.hidden_size * setting.weight_bytes
    per_logit = LOGIT_COPIES_FLOAT32 * FLOAT32 + LOGIT_COPIES_WEIGHT * setting.weight_bytes
    return min(tokens, LOSS_CHUNK_TOKENS) * config.vocab_size * per_logit


def _dropped(inputs: dict[str, int], setting: Setting) -> list[float]:
    """Bytes per token that dropout before the adapters of these targets saves: the mask and the dropped-out input."""
    each = setting.weight_bytes + (1 if setting.on_gpu else setting.weight_bytes)
    return [float(size * each) for target, size in inputs.items() if target in setting.dropped]


def _norm(width: int, setting: Setting) -> list[float]:
    return [float(FLOAT32 * width)] * (3 if setting.full_parameter else 2)


def _states(config: ModelConfig) -> float:
    """Elements per token of the recurrent state, which is stored once per chunk."""
    heads = config.linear_num_value_heads
    return heads * config.linear_key_head_dim * config.linear_value_head_dim / DELTA_CHUNK_TOKENS


def _deltanet(config: ModelConfig, setting: Setting) -> list[float]:
    heads, weight, values = config.linear_num_value_heads, setting.weight_bytes, config.value_dim
    channels = 2 * config.key_dim + values
    if setting.fused_mixers:
        # Projections, their convolution, two matrices per chunk, the outputs of the rule and of the gated norm.
        kept = [channels + values, 2 * heads, channels, 2 * heads * DELTA_CHUNK_TOKENS, values, values]
        return [float(weight * size) for size in kept] + [float(FLOAT32 * heads)] * 4
    outside = [channels] + [values] * (3 if setting.full_parameter else 2)
    if setting.cpu_mixers:
        # Queries, keys, values, corrections, output, and four matrices per chunk; four tensors of the gated norm.
        rule = [config.key_dim] * 2 + [values] * 7 + [_states(config)]
        rule += [heads * DELTA_CHUNK_TOKENS, config.linear_num_key_heads * DELTA_CHUNK_TOKENS] * 2
        outside += [2 * config.key_dim] + [channels + values] * setting.full_parameter
        return [float(FLOAT32 * size) for size in rule] + [float(weight * size) for size in outside]
    keys = heads * config.linear_key_head_dim  # keys are repeated per value head
    rule = [keys] * 10 + [values] * 6 + [keys + values] + [heads * DELTA_CHUNK_TOKENS] * 6 + [_states(config)]
    convolution = [channels] * (config.linear_conv_kernel_dim if setting.full_parameter else 0)
    return [float(FLOAT32 * size) for size in rule + convolution] + [float(weight * size) for size in outside]


def _attention(config: ModelConfig, setting: Setting) -> list[float]:
    queries = config.num_attention_heads * config.head_dim
    keys, weight, time = config.num_key_value_heads * config.head_dim, setting.weight_bytes, setting.sequence_tokens
    mask = [float(time * weight)] if setting.masked else []
    attended = queries if setting.masked else keys  # with a mask, keys and values are repeated per head
    if setting.fused_mixers:
        # Queries with gates, and keys, before and after norm and rotation; values; the gated output.
        kept = [2 * queries, keys, queries, attended, attended, queries]
        return [float(weight * size) for size in kept] + mask
    norms = _norm(queries, setting) + _norm(keys, setting)
    return [*norms, *[float(weight * queries)] * 3, *[float(weight * attended)] * 2, *mask]


def _moe(config: ModelConfig, setting: Setting) -> list[float]:
    hidden, top_k, weight = config.hidden_size, config.num_experts_per_tok, setting.weight_bytes
    width, shared = config.moe_intermediate_size, config.shared_expert_intermediate_size
    more = 1 if setting.full_parameter else 0
    rank = setting.expert_adapter_rank
    if setting.fused_experts:
        # Pre-activations; with an exchange, rows as received from other ranks and as returned.
        rows = [top_k * 2 * width] + [top_k * hidden] * (0 if gathers(setting) else 2) + [top_k * rank]
    else:
        # The experts' weights and the factors of their adapters each save their inputs.
        by_row = more or bool(rank)
        rows = [top_k * hidden] * (1 + by_row) + [top_k * 2 * width] + [top_k * width] * (1 + by_row)
        rows += [top_k * rank] * 2
    alone = [hidden] + [shared] * (3 + more - setting.fused_layers)
    router = [FLOAT32 * config.num_experts, 3 * INT64 * top_k]
    router += [] if setting.fused_layers else [FLOAT32 * hidden] * more
    return [float(weight * size) for size in rows + alone] + [float(size) for size in router]


def _mlp(config: ModelConfig, setting: Setting) -> list[float]:
    kept = 3 + setting.full_parameter - setting.fused_layers
    return [float(setting.weight_bytes * config.intermediate_size)] * kept
