"""Activation recomputation in the backward pass: as the recipe says, or as little as memory allows.

Every layer has two halves, mixer and experts. A recomputed half stores only its input and the output of attention
itself; other halves store what `activations.py` counts. All ranks must choose alike: with expert parallelism,
recomputed experts exchange rows. Imports no torch.
"""

from collections.abc import Callable, Sequence

from finetune.model.config import ALL, NOTHING, ModelConfig, Recompute
from finetune.plan.activations import Setting, gathers, sizes
from finetune.plan.operations import down_operations, half_operations

OPERATIONS_WHILE_A_BYTE_TRAVELS = 900  # 400 TFLOP/s over 450 GB/s between cards of one machine


def asked_for(config: ModelConfig, words: Sequence[str]) -> tuple[Recompute, ...] | None:
    """What every layer recomputes according to `train.recompute`; None for `auto`."""
    if "auto" in words:
        return None
    kinds = {"linear_attention": "deltanet", "full_attention": "attention"}
    return tuple(
        ALL if "full" in words else Recompute(kinds[kind] in words, "experts" in words) for kind in config.layer_types
    )


def least(
    config: ModelConfig, setting: Setting, fits: Callable[[tuple[Recompute, ...]], bool]
) -> tuple[Recompute, ...]:
    """Choose the least recomputation that fits.

    Halves are stored greedily, in descending order of operations saved per byte.

    Args:
        fits: whether memory suffices for a choice.
    """
    chosen = [ALL] * config.num_hidden_layers
    worth = []
    for layer, size in enumerate(sizes(config, setting)):
        mixer, experts = half_operations(config, layer, setting.sequence_tokens)
        if config.is_moe(layer) and setting.exchanged:  # recomputation would dispatch and combine rows again
            rows = 2 * config.num_experts_per_tok * config.hidden_size * setting.weight_bytes
            experts += OPERATIONS_WHILE_A_BYTE_TRAVELS * rows
        elif config.is_moe(layer) and gathers(setting):
            experts -= down_operations(config)
        worth += [(mixer / size.mixer, layer, 0), (experts / size.experts, layer, 1)]
    for _, layer, half in sorted(worth, reverse=True):
        before = chosen[layer]
        chosen[layer] = before._replace(experts=False) if half else before._replace(mixer=False)
        if not fits(tuple(chosen)):
            chosen[layer] = before
    return tuple(chosen)


def described(config: ModelConfig, layers: Sequence[Recompute]) -> str:
    """Describe the choice: how many layers of each kind recompute what."""
    if all(again == NOTHING for again in layers):
        return "nothing"
    if all(again == ALL for again in layers):
        return "every layer"
    parts = []
    for name, kind in (("DeltaNet", "linear_attention"), ("attention", "full_attention")):
        of_kind = [again.mixer for again, mixer in zip(layers, config.layer_types, strict=True) if mixer == kind]
        if any(of_kind):
            parts.append(f"{name} of {sum(of_kind)} of {len(of_kind)} layers")
    if experts := sum(again.experts for again in layers):
        parts.append(f"experts of {experts} of {len(layers)} layers")
    return " and ".join(parts)
