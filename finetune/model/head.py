"""The language-model head: the summed next-token loss, chunk by chunk, so that the full logits never exist."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORED = -100  # a label that is not supervised


def token_loss_sum(
    hidden: Float[Tensor, "batch time hidden"],
    weight: Float[Tensor, "vocabulary hidden"],
    labels: Int[Tensor, "batch time"],
    supervised: int | None = None,
    chunk_tokens: int = 2048,
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """Cross entropy summed over the supervised tokens, in float32, and their number. The definition.

    The head is applied to supervised positions only, `chunk_tokens` at a time. The logits of all chunks but the last
    are recomputed in the backward pass, so at most chunk_tokens x vocabulary logits exist, in float32.

    Args:
        labels: the token that each position must predict (already shifted), or -100.
        supervised: the number of labels other than -100; None: computed, with a host synchronisation.
        chunk_tokens: supervised positions of one chunk.
    """
    hidden, targets = supervised_rows(hidden, labels, supervised)
    loss = hidden.new_zeros((), dtype=torch.float32)
    *others, last = zip(hidden.split(chunk_tokens), targets.split(chunk_tokens), strict=True)
    for x, target in others:
        loss = loss + checkpoint(_cross_entropy_sum, x, weight, target, use_reentrant=False)
    # The backward pass starts with the last chunk, so storing its logits does not raise the peak memory.
    loss = loss + _cross_entropy_sum(last[0], weight, last[1])
    return loss, (labels != IGNORED).sum()


def supervised_rows(
    hidden: Float[Tensor, "batch time hidden"], labels: Int[Tensor, "batch time"], supervised: int | None
) -> tuple[Float[Tensor, "supervised hidden"], Int[Tensor, " supervised"]]:
    """Hidden states and labels of the supervised positions; synchronises with the host if `supervised` is None."""
    has_label = labels.flatten() != IGNORED
    count = int(has_label.sum()) if supervised is None else supervised
    places = torch.nonzero_static(has_label, size=count).squeeze(-1)
    return hidden.flatten(0, 1).index_select(0, places), labels.flatten()[places]


def _cross_entropy_sum(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight).float(), target, reduction="sum")
