"""What the exchange between expert-parallel ranks sends, and how long the links take for it. Imports no torch.

Rows of `hidden` numbers travel to their expert's rank and back: two transfers in each forward pass, and two of their
gradients in the backward pass. With even load every rank of a group receives as much from each of the others. What a
rank keeps is not sent; what goes to a rank of its own machine takes NVLink, the rest the machine's network.
"""

from dataclasses import dataclass

GBIT = 1e9 / 8  # bytes
NVLINK_GBIT = 3600.0  # each way, of one H100 or H200 (SXM): 450 GB/s
COUNT_BYTES = 8  # rows of one expert, told ahead of the rows


@dataclass(frozen=True, kw_only=True)
class Links:
    """What the links carry each way, in Gbit/s; None when it is not known."""

    node_gbit: float | None = None  # of one rank to the others of its machine
    network_gbit: float | None = None  # of one machine, over all its cards, shared by its ranks


UNKNOWN = Links()


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """What the rank that sends most over the network sends for one layer and one micro-batch; and how often."""

    layers: int
    micro_batches: int  # of one optimizer step
    forward_passes: float  # with those that are done once more, of the mean layer
    node_bytes: float
    network_bytes: float
    ranks_per_node: int
    links: Links

    @property
    def times(self) -> int:
        """How often a step sends `node_bytes` and `network_bytes`."""
        return self.layers * self.micro_batches

    @property
    def seconds(self) -> float | None:
        """The least that the exchange of one optimizer step takes; None where a link that it needs is not known.

        Both kinds of link work at the same time, and all ranks of a machine share its network.
        """
        taken = [0.0]
        for size, gbit, ranks in (
            (self.node_bytes, self.links.node_gbit, 1),
            (self.network_bytes, self.links.network_gbit, self.ranks_per_node),
        ):
            if size and gbit is None:
                return None
            if size and gbit is not None:
                taken.append(size * ranks / (gbit * GBIT))
        return self.times * max(taken)


def exchange(
    *,
    layers: int,
    micro_batches: int,
    tokens: int,
    hidden: int,
    weight_bytes: int,
    num_experts: int,
    experts_per_token: int,
    expert_size: int,
    ranks: int,
    ranks_per_node: int,
    forward_passes: float,
    links: Links,
) -> Exchange:
    """The exchange of a run whose expert groups are consecutive ranks, on machines that are filled one after another.

    Args:
        tokens: of one micro-batch, all of them routed.
        forward_passes: of one micro-batch in one step, of the mean layer; with one backward pass.
    """
    rows = tokens * experts_per_token * hidden * weight_bytes * (2 * forward_passes + 2)
    counts = num_experts * COUNT_BYTES * forward_passes
    each = (rows + counts) / expert_size  # to one rank of the group
    away = max(_peers_away(rank, expert_size, ranks_per_node) for rank in range(ranks))
    return Exchange(
        layers=layers,
        micro_batches=micro_batches,
        forward_passes=forward_passes,
        node_bytes=each * (expert_size - 1 - away),
        network_bytes=each * away,
        ranks_per_node=min(ranks, ranks_per_node),
        links=links,
    )


def _peers_away(rank: int, expert_size: int, ranks_per_node: int) -> int:
    """Ranks of this rank's expert group that are on another machine."""
    first = rank // expert_size * expert_size
    group = range(first, first + expert_size)
    return sum(peer // ranks_per_node != rank // ranks_per_node for peer in group)
