"""Bytes that the forward pass keeps for the backward pass, a token at a time: what each operation of `model/` saves.

Plain arithmetic over a ModelConfig. Counted from the operations as they are written there, or from the fused kernels
that take their place, and compared in the tests with what torch really saves. Imports no torch.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

from finetune.model.config import ModelConfig

FLOAT32 = 4  # bytes
INT64 = 8
DELTA_CHUNK_TOKENS = 64  # chunk_tokens of `chunked_gated_delta_rule`
LOSS_CHUNK_TOKENS = 2048  # chunk_tokens of `token_loss_sum`
# Per logit of a chunk while its loss is differentiated: the logits and their gradient in the dtype of the weights;
# logits, log-softmax and their gradients in float32.
LOGIT_COPIES_FLOAT32 = 3
LOGIT_COPIES_WEIGHT = 2
LOSS_CHUNK_BYTES = 2**30  # CHUNK_BYTES of the fused loss: logits that exist at once
TRANSIENT_TENSORS = 3  # gradients as large as a half's largest saved tensor that exist at once where torch makes them


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the saved tensors depend on, beside the sizes of the model."""

    weight_bytes: int
    full_parameter: bool  # inputs of every weight are kept, not only those of adapters
    sequence_tokens: int
    masked: bool  # a mask keeps documents apart in attention
    expert_adapter_rank: int = 0  # of adapters on the routed experts; 0: none
    router_losses: bool = False  # they read the logits of every layer
    exchanged: bool = False  # rows come from other ranks
    dropped: tuple[str, ...] = ()  # adapter targets with dropout: each keeps its own input, and what was dropped
    on_gpu: bool = False
    # Which computations are fused kernels; see `kernels` of a recipe.
    fused_experts: bool = False
    fused_layers: bool = False
    fused_mixers: bool = False
    cpu_mixers: bool = False  # plain torch with backward passes of its own


class Sizes(NamedTuple):
    """Bytes per token of one layer."""

    mixer: float  # saved by the mixer's half
    experts: float  # saved by the experts' half
    between: float  # left even when both are computed again; attention's own output among it
    mixer_gradients: float  # made at once in the backward pass of that half
    experts_gradients: float


@functools.cache
def sizes(config: ModelConfig, setting: Setting) -> tuple[Sizes, ...]:
    """What every layer takes."""
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
    """Bytes per token of every tensor that the mixer's half of a layer saves, without what attention itself gives.

    Small ones are left out.
    """
    size = float(config.hidden_size * setting.weight_bytes)
    # The fused norms keep their input alone: that of the first is the layer's, which is kept anyway.
    norms = [size] if setting.fused_layers else 2 * _norm(config.hidden_size, setting)
    if config.layer_types[layer] == "linear_attention":
        inputs = {"in_proj_qkvz": config.hidden_size, "in_proj_ba": config.hidden_size, "out_proj": config.value_dim}
        return [*norms, size, *_deltanet(config, setting), *_dropped(inputs, setting)]
    inputs = dict.fromkeys(("q_proj", "k_proj", "v_proj"), config.hidden_size)
    inputs["o_proj"] = config.num_attention_heads * config.head_dim
    return [*norms, size, *_attention(config, setting), *_dropped(inputs, setting)]


def experts_tensors(config: ModelConfig, layer: int, setting: Setting) -> list[float]:
    """The same of the half that holds the experts, or a dense MLP."""
    size = float(config.hidden_size * setting.weight_bytes)
    # Experts that gather while they load keep their input; those that gather before keep what was gathered.
    fused = setting.fused_layers or gathers(setting)  # a fused router keeps it too, and it is the same
    inputs = [size] if setting.full_parameter or (config.is_moe(layer) and fused) else []
    shared = {"shared_expert": 2 * config.hidden_size + config.shared_expert_intermediate_size}
    return [
        *inputs,
        *(_moe(config, setting) if config.is_moe(layer) else _mlp(config, setting)),
        *(_dropped(shared, setting) if config.is_moe(layer) else []),
    ]


def gathers(setting: Setting) -> bool:
    """Whether the experts read each row where its token lies, and never hold a copy of it for every expert.

    Computed again, such experts end before their last product, whose output nothing reads.
    """
    return setting.fused_experts and not setting.exchanged


def kept_between_layers(config: ModelConfig, layer: int, setting: Setting) -> float:
    """Bytes per token that a layer leaves even when it is computed again.

    Its output, what attention itself gave (which is never computed again), and what its router said.
    """
    attended = attention_output(config, setting) if config.layer_types[layer] == "full_attention" else 0
    logits = 2 * FLOAT32 * config.num_experts if setting.router_losses else 0  # they, and the losses' softmax
    routing = logits + config.num_experts_per_tok * (INT64 + setting.weight_bytes)
    return config.hidden_size * setting.weight_bytes + attended + (routing if config.is_moe(layer) else 0)


def attention_output(config: ModelConfig, setting: Setting) -> int:
    """Bytes per token of what attention itself gives: its output, and in float32 the logarithms of its divisors."""
    return config.num_attention_heads * (config.head_dim * setting.weight_bytes + FLOAT32)


def mixer_gradients(config: ModelConfig, layer: int, setting: Setting) -> float:
    """Bytes per token of gradients, and tensors made for them, that exist at once in the mixer's backward pass."""
    own = setting.fused_mixers or setting.cpu_mixers
    if not own or config.layer_types[layer] != "linear_attention":
        return TRANSIENT_TENSORS * max(mixer_tensors(config, layer, setting))
    # Of the states before and after each chunk, of corrections and values, of queries and keys by value head, and of
    # the projection.
    by_head = config.linear_num_value_heads * config.linear_key_head_dim
    if setting.cpu_mixers:  # in float32, of all heads at once, with three matrices a chunk
        matrices = 3 * config.linear_num_value_heads * DELTA_CHUNK_TOKENS
        return FLOAT32 * (2 * _states(config) + 4 * config.value_dim + 3 * by_head + matrices)
    rule = 2 * _states(config) + 2 * config.value_dim + 2 * by_head
    return float(setting.weight_bytes * (rule + 2 * config.key_dim + 2 * config.value_dim))


def experts_gradients(config: ModelConfig, layer: int, setting: Setting) -> float:
    """The same in the backward pass of the experts' half."""
    if not config.is_moe(layer) or not gathers(setting):
        return TRANSIENT_TENSORS * max(experts_tensors(config, layer, setting))
    top_k, hidden, width = config.num_experts_per_tok, config.hidden_size, config.moe_intermediate_size
    trains = setting.full_parameter or setting.expert_adapter_rank > 0  # then activations and gathered rows exist too
    # Rows and activations, as in the forward pass; the gradient of the pre-activations takes their own memory.
    rows = hidden + width + (2 * hidden if trains else 0)
    return float(setting.weight_bytes * (top_k * rows + 2 * hidden))


def loss_bytes(config: ModelConfig, tokens: int, setting: Setting) -> int:
    """Bytes held while the loss of one chunk of `tokens` is differentiated."""
    if setting.fused_layers:
        logits = min(LOSS_CHUNK_BYTES, tokens * config.vocab_size * setting.weight_bytes)
        # The weight's gradient: summed in float32, a chunk's, in the weight's dtype, and times what follows.
        head = config.vocab_size * config.hidden_size * (FLOAT32 + 2 * setting.weight_bytes)
        return logits + head * setting.full_parameter + 3 * tokens * config.hidden_size * setting.weight_bytes
    per_logit = LOGIT_COPIES_FLOAT32 * FLOAT32 + LOGIT_COPIES_WEIGHT * setting.weight_bytes
    return min(tokens, LOSS_CHUNK_TOKENS) * config.vocab_size * per_logit


def _dropped(inputs: dict[str, int], setting: Setting) -> list[float]:
    """What dropout keeps before the adapters of these targets: which numbers it dropped, and what is left of them."""
    each = setting.weight_bytes + (1 if setting.on_gpu else setting.weight_bytes)
    return [float(size * each) for target, size in inputs.items() if target in setting.dropped]


def _norm(width: int, setting: Setting) -> list[float]:
    return [float(FLOAT32 * width)] * (3 if setting.full_parameter else 2)


def _states(config: ModelConfig) -> float:
    """Numbers of the recurrent state that is kept once a chunk, for each token."""
    heads = config.linear_num_value_heads
    return heads * config.linear_key_head_dim * config.linear_value_head_dim / DELTA_CHUNK_TOKENS


def _deltanet(config: ModelConfig, setting: Setting) -> list[float]:
    heads, weight, values = config.linear_num_value_heads, setting.weight_bytes, config.value_dim
    channels = 2 * config.key_dim + values
    if setting.fused_mixers:
        # Projections, their convolution, two matrices a chunk, the output of the rule and that of the gated norm.
        kept = [channels + values, 2 * heads, channels, 2 * heads * DELTA_CHUNK_TOKENS, values, values]
        return [float(weight * size) for size in kept] + [float(FLOAT32 * heads)] * 4
    outside = [channels] + [values] * (3 if setting.full_parameter else 2)
    if setting.cpu_mixers:
        # Queries, keys, values, corrections, output, and four matrices a chunk; four tensors of the gated norm.
        rule = [config.key_dim] * 2 + [values] * 7 + [_states(config)]
        rule += [heads * DELTA_CHUNK_TOKENS, config.linear_num_key_heads * DELTA_CHUNK_TOKENS] * 2
        outside += [2 * config.key_dim] + [channels + values] * setting.full_parameter
        return [float(FLOAT32 * size) for size in rule] + [float(weight * size) for size in outside]
    keys = heads * config.linear_key_head_dim  # keys are repeated for every value head
    rule = [keys] * 10 + [values] * 6 + [keys + values] + [heads * DELTA_CHUNK_TOKENS] * 6 + [_states(config)]
    convolution = [channels] * (config.linear_conv_kernel_dim if setting.full_parameter else 0)
    return [float(FLOAT32 * size) for size in rule + convolution] + [float(weight * size) for size in outside]


def _attention(config: ModelConfig, setting: Setting) -> list[float]:
    queries = config.num_attention_heads * config.head_dim
    keys, weight, time = config.num_key_value_heads * config.head_dim, setting.weight_bytes, setting.sequence_tokens
    mask = [float(time * weight)] if setting.masked else []
    attended = queries if setting.masked else keys  # beside a mask, keys and values are repeated for every head
    if setting.fused_mixers:
        # Queries with their gates and keys, before and after norm and rotation; values; the gated output.
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
        # Pre-activations; rows that travel twice, as they arrive and as they have come back.
        rows = [top_k * 2 * width] + [top_k * hidden] * (0 if gathers(setting) else 2) + [top_k * rank]
    else:
        # The weights of the experts, and the factors that adapt them, both keep what they are multiplied with.
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
