"""Small `qwen3_next` configurations with awkward sizes, and parameters that no default hides behind.

Each configuration is a plain dict as it stands in a `config.json`: `ModelConfig.from_dict(values)` reads it, and so
does `Qwen3NextConfig(**values)` of transformers.
"""

import copy
import math
from typing import Any

import torch
from torch import nn

TINY: dict[str, Any] = {
    "architectures": ["Qwen3NextForCausalLM"],
    "model_type": "qwen3_next",
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "partial_rotary_factor": 0.25,
    "rope_theta": 10_000.0,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
    "intermediate_size": 40,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "max_position_embeddings": 512,
    "initializer_range": 0.02,
}


def tiny_config(**changes: Any) -> dict[str, Any]:
    """The base configuration (3 DeltaNet layers, then 1 attention layer; 8 experts, top 2), with `changes`."""
    unknown = set(changes) - set(TINY) - {"full_attention_interval", "layer_types", "rope_parameters"}
    assert not unknown, f"no such keys in a config.json: {sorted(unknown)}"
    return {**copy.deepcopy(TINY), **changes}


# By name, so that a test's id says which one failed.
CONFIGS: dict[str, dict[str, Any]] = {
    "base": tiny_config(),
    "odd-heads": tiny_config(
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=12,
        partial_rotary_factor=0.5,
        linear_num_key_heads=3,
        linear_num_value_heads=6,
        linear_key_head_dim=5,
        linear_value_head_dim=7,
        linear_conv_kernel_dim=3,
        hidden_size=28,
        vocab_size=101,
    ),
    "dense-layers": tiny_config(mlp_only_layers=[0, 3], rope_theta=5_000_000.0, num_experts_per_tok=3),
    "sparse-step-2-tied": tiny_config(decoder_sparse_step=2, tie_word_embeddings=True, full_attention_interval=2),
    "layer-types-top-1": tiny_config(
        num_hidden_layers=3,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        num_experts_per_tok=1,
        norm_topk_prob=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.375},
    ),
    "all-experts-not-normalised": tiny_config(
        num_experts=5,
        num_experts_per_tok=5,
        norm_topk_prob=False,
        moe_intermediate_size=9,
        shared_expert_intermediate_size=1,
        linear_num_key_heads=1,
        linear_num_value_heads=5,
    ),
}


def randomise(model: nn.Module, seed: int) -> None:
    """Fill every parameter so that each one matters: norms off the identity, decays spread, matrices of gain about 1.

    Works on our model and on transformers', which name their parameters alike.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_draw(name, parameter.shape, generator))


def _draw(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    normal = torch.randn(shape, generator=generator)
    if name.endswith("A_log"):
        return torch.empty(shape).uniform_(0.01, 1, generator=generator).log()
    if name.endswith("dt_bias"):
        return normal - 2
    if name.endswith("linear_attn.norm.weight"):  # the one norm with a plain weight
        return 1 + 0.3 * normal
    if name.endswith("conv1d.weight"):
        return 0.4 * normal
    if len(shape) == 1 or name.endswith("embed_tokens.weight"):
        return (0.3 if len(shape) == 1 else 0.12) * normal
    # What writes to the residual stream is as small as the embedding: a later layer that drowned the earlier ones would
    # also blow up float32 rounding, and parity could not be asked for to 2e-5.
    writes = name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight", "experts.down_proj"))
    # Logits have a spread of about 0.6; with more of it their rounding would grow past 2e-5 too, in transformers first.
    gain = 0.12 if writes else 0.6 if name.endswith("lm_head.weight") else 1
    return normal * gain / math.sqrt(shape[-1])
