"""Bytes and time of the exchange between expert-parallel ranks. Imports no torch.

Rows of `hidden` numbers are dispatched to the rank of their expert and combined: two transfers in each forward pass,
and two transfers of gradients in the backward pass. Load is assumed even, so that all pairs of ranks in a group
exchange equally many rows. Rows for experts on the same rank are not sent. Rows for ranks of the same machine use
NVLink, the others the machine's network.
"""

from dataclasses import dataclass

GBIT = 1e9 / 8  # bytes
NVLINK_GBIT = 3600.0  # per direction, of one H100 or H200 (SXM): 450 GB/s
COUNT_BYTES = 8  # number of rows for one expert, sent before the rows


@dataclass(frozen=True, kw_only=True)
class Links:
    """Bandwidth of the links per direction, in Gbit/s; None if unknown."""

    node_gbit: float | None = None  # of one rank, to ranks of its machine
    network_gbit: float | None = None  # of one machine, over all network cards, shared by its ranks


UNKNOWN = Links()


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """Bytes that the busiest rank on the network sends for one layer and micro-batch, and how often per step."""

    layers: int
    micro_batches: int  # of one optimizer step
    forward_passes: float  # recomputation included, mean over layers
    node_bytes: float
    network_bytes: float
    ranks_per_node: int
    links: Links

    @property
    def times(self) -> int:
        """How often one step sends `node_bytes` and `network_bytes`."""
        return self.layers * self.micro_batches

    @property
    def seconds(self) -> float | None:
        """Lower bound for the exchange of one optimizer step; None if the bandwidth of a needed link is unknown.

        Both kinds of link work simultaneously, and all ranks of a machine share its network.
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
    """Compute the exchange of a run. Expert groups are consecutive ranks, and ranks fill one machine after another.

    Args:
        tokens: of one micro-batch, all of them routed.
        forward_passes: per micro-batch in one step, mean over layers; there is one backward pass.
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
    """Number of ranks in this rank's expert group that are on another machine."""
    first = rank // expert_size * expert_size
    group = range(first, first + expert_size)
    return sum(peer // ranks_per_node != rank // ranks_per_node for peer in group)
