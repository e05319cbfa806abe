"""The language-model head: logits, and the summed next-token loss without ever holding all logits at once."""

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
    """Sum of cross entropies over the supervised tokens, in float32, and how many there are.

    labels[b, t] is the token that position t must predict (already shifted), or -100; `supervised` is how many of them
    are not -100, and without it the host waits for that. Only supervised positions reach the head, `chunk_tokens` at a
    time, and the logits of all but the last are computed again in the backward pass: the most that exists is
    chunk_tokens x vocabulary in float32, not batch x time x vocabulary.
    """
    hidden, targets = supervised_rows(hidden, labels, supervised)
    loss = hidden.new_zeros((), dtype=torch.float32)
    *others, last = zip(hidden.split(chunk_tokens), targets.split(chunk_tokens), strict=True)
    for x, target in others:
        loss = loss + checkpoint(_cross_entropy_sum, x, weight, target, use_reentrant=False)
    # The backward pass begins with the last chunk, so keeping its logits costs no more than computing them again would.
    loss = loss + _cross_entropy_sum(last[0], weight, last[1])
    return loss, (labels != IGNORED).sum()


def supervised_rows(
    hidden: Float[Tensor, "batch time hidden"], labels: Int[Tensor, "batch time"], supervised: int | None
) -> tuple[Float[Tensor, "supervised hidden"], Int[Tensor, " supervised"]]:
    """Hidden states and labels of the positions that have a label; the host waits only where it has no number."""
    has_label = labels.flatten() != IGNORED
    count = int(has_label.sum()) if supervised is None else supervised
    places = torch.nonzero_static(has_label, size=count).squeeze(-1)
    return hidden.flatten(0, 1).index_select(0, places), labels.flatten()[places]


def _cross_entropy_sum(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight).float(), target, reduction="sum")
