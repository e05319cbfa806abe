"""The `config.json` of a checkpoint that is written without a base, in the format of the released ones."""

from typing import Any

import torch

from finetune.model.config import ModelConfig


def released_config(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """A `config.json` in the format of the released ones.

    The rotary settings are written at the top level, which transformers 4 and 5 both read (version 4 silently ignores
    `rope_parameters` of version 5 and uses a base of 10,000). The layer types are written as `full_attention_interval`
    where they are regular, else in full.
    """
    interval = next(
        (
            every
            for every in range(1, config.num_hidden_layers + 2)
            if all(
                (mixer == "full_attention") == ((layer + 1) % every == 0)
                for layer, mixer in enumerate(config.layer_types)
            )
        ),
        None,
    )
    layers = {"full_attention_interval": interval} if interval else {"layer_types": list(config.layer_types)}
    values = {name: value for name, value in vars(config).items() if name != "layer_types"}
    return {
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": "qwen3_next",
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rope_scaling": None,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
        **values,
        "mlp_only_layers": list(config.mlp_only_layers),
        **layers,
    }
