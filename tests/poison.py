"""Weights that are all finite and still give a loss that is not a number, for the sequences with one token.

A base with an infinite number is refused when it is loaded, so a step that is not finite has to come from elsewhere.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def poison(base: Path, token: int) -> None:
    """Let the first layer overflow on this token, and on no other.

    Its embedding alone has something in the first number, which the first projection multiplies by the largest that
    there is.
    """
    tensors = load_file(base / "model.safetensors")
    embedding, projection = (
        tensors[name] for name in ("model.embed_tokens.weight", "model.layers.0.linear_attn.in_proj_qkvz.weight")
    )
    embedding[:, 0] = 0
    embedding[token, 0] = 1
    projection[:, 0] = torch.finfo(projection.dtype).max
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
