"""Bytes that the forward pass keeps for the backward pass, a token at a time: what each operation of `model/` saves.

Plain arithmetic over a ModelConfig. Counted from the operations as they are written there (fused kernels would save
less), and compared in the tests with what torch really saves. Imports no torch.
"""

from dataclasses import dataclass

from finetune.model.config import ModelConfig

FLOAT32 = 4  # bytes
INT64 = 8
DELTA_CHUNK_TOKENS = 64  # chunk_tokens of `chunked_gated_delta_rule`
LOSS_CHUNK_TOKENS = 2048  # chunk_tokens of `token_loss_sum`
# Per logit of a chunk while its loss is differentiated: the logits and their gradient in the dtype of the weights;
# logits, log-softmax and their gradients in float32.
LOGIT_COPIES_FLOAT32 = 3
LOGIT_COPIES_WEIGHT = 2


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the saved tensors depend on, beside the sizes of the model."""

    weight_bytes: int
    full_parameter: bool  # inputs of every weight are kept, not only those of adapters
    sequence_tokens: int
    packed: bool  # a mask keeps documents apart in attention
    expert_adapter_rank: int = 0  # of adapters on the routed experts; 0: none
    router_losses: bool = False  # they read the logits of every layer


def layer_tensors(config: ModelConfig, layer: int, setting: Setting) -> list[float]:
    """Bytes per token of every tensor that one layer saves, small ones left out."""
    hidden, weight = config.hidden_size, setting.weight_bytes
    is_linear = config.layer_types[layer] == "linear_attention"
    norms = 2 * _norm(hidden, setting)
    inputs = [float(hidden * weight)] * (2 if setting.full_parameter else 1)
    mixer = _deltanet(config, setting) if is_linear else _attention(config, setting)
    return norms + inputs + mixer + (_moe(config, setting) if config.is_moe(layer) else _mlp(config, setting))


def kept_between_layers(config: ModelConfig, layer: int, setting: Setting) -> float:
    """Bytes per token that a layer leaves even when it is computed again: its output, and what its router said."""
    logits = FLOAT32 * config.num_experts if setting.router_losses else 0
    routing = logits + config.num_experts_per_tok * (INT64 + setting.weight_bytes)
    return config.hidden_size * setting.weight_bytes + (routing if config.is_moe(layer) else 0)


def loss_bytes(config: ModelConfig, tokens: int, setting: Setting) -> int:
    """Bytes held while the loss of one chunk of `tokens` is differentiated."""
    per_logit = LOGIT_COPIES_FLOAT32 * FLOAT32 + LOGIT_COPIES_WEIGHT * setting.weight_bytes
    return min(tokens, LOSS_CHUNK_TOKENS) * config.vocab_size * per_logit


def _norm(width: int, setting: Setting) -> list[float]:
    return [float(FLOAT32 * width)] * (3 if setting.full_parameter else 2)


def _deltanet(config: ModelConfig, setting: Setting) -> list[float]:
    heads, weight = config.linear_num_value_heads, setting.weight_bytes
    keys, values = heads * config.linear_key_head_dim, config.value_dim  # keys are repeated for every value head
    channels = 2 * config.key_dim + config.value_dim
    state = heads * config.linear_key_head_dim * config.linear_value_head_dim / DELTA_CHUNK_TOKENS  # one a chunk
    rule = [keys] * 10 + [values] * 6 + [keys + values] + [heads * DELTA_CHUNK_TOKENS] * 6 + [state]
    convolution = [channels] * (config.linear_conv_kernel_dim if setting.full_parameter else 0)
    outside = [channels] + [values] * (3 if setting.full_parameter else 2)
    return [float(FLOAT32 * size) for size in rule + convolution] + [float(weight * size) for size in outside]


def _attention(config: ModelConfig, setting: Setting) -> list[float]:
    queries = config.num_attention_heads * config.head_dim
    keys, weight, time = config.num_key_value_heads * config.head_dim, setting.weight_bytes, setting.sequence_tokens
    norms = _norm(queries, setting) + _norm(keys, setting)
    mask = [time * weight] if setting.packed else []
    attended = queries if setting.packed else keys  # beside a mask, keys and values are repeated for every head
    return [*norms, *[float(weight * queries)] * 4, *[float(weight * attended)] * 2, *map(float, mask)]


def _moe(config: ModelConfig, setting: Setting) -> list[float]:
    hidden, top_k, weight = config.hidden_size, config.num_experts_per_tok, setting.weight_bytes
    width, shared = config.moe_intermediate_size, config.shared_expert_intermediate_size
    more = 1 if setting.full_parameter else 0
    # The weights of the experts, and the factors that adapt them, both keep what they are multiplied with.
    by_row = more or bool(setting.expert_adapter_rank)
    rows = [top_k * hidden] * (2 + by_row) + [top_k * 2 * width] + [top_k * width] * (1 + by_row)
    rows += [top_k * setting.expert_adapter_rank] * 2
    alone = [hidden] + [shared] * (3 + more)
    router = [FLOAT32 * config.num_experts, 3 * INT64 * top_k, *[FLOAT32 * hidden] * more]
    return [float(weight * size) for size in rows + alone] + [float(size) for size in router]


def _mlp(config: ModelConfig, setting: Setting) -> list[float]:
    return [float(setting.weight_bytes * config.intermediate_size)] * (4 if setting.full_parameter else 3)
