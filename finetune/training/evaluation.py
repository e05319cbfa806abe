"""Evaluation without gradients: held-out loss, and routing of fixed probe tokens compared with the base model's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data.packing import Batch
from finetune.distributed.world import World
from finetune.model.model import HybridMoEForCausalLM
from finetune.training.router_loss import count_rows
from monitoring.paired import paired_change

NEVER_BETTER = "training never improved on the base: no held-out loss is below that before the first step"


@dataclass(frozen=True)
class HeldOut:
    """Mean loss over the supervised held-out tokens, and its parts by micro-batch for paired comparison."""

    loss: float
    tokens: int
    # Summed loss and supervised tokens of every micro-batch, in the order of the rows, whatever the number of ranks.
    parts: list[tuple[float, int]]


@torch.no_grad()
def held_out(model: HybridMoEForCausalLM, batches: Sequence[Batch], world: World) -> HeldOut:
    """Compute the held-out loss of the current model over all ranks. Collective.

    Args:
        batches: this rank's micro-batches, the same number on every rank. `data.loader.EvaluationBatches` assigns them
            to the ranks round-robin.
    """
    was_training = model.training
    model.eval()
    parts = torch.zeros(len(batches), world.size, 2, dtype=torch.float64, device=world.device)
    for place, batch in enumerate(batches):
        batch = to_device(batch, world.device)
        out = model(batch.input_ids, batch.segment_ids, labels=batch.labels)
        parts[place, world.rank, 0], parts[place, world.rank, 1] = out.loss_sum, out.token_count
    model.train(was_training)
    flat = world.sum(parts).flatten(0, 1).tolist()
    tokens = int(sum(count for _, count in flat))
    return HeldOut(sum(loss for loss, _ in flat) / max(tokens, 1), tokens, [(loss, int(n)) for loss, n in flat if n])


@dataclass(frozen=True)
class ProbedRouting:
    """Routing of this rank's probe tokens in every layer."""

    experts: Tensor  # (layers, tokens, top_k)
    counts: Tensor  # (layers, experts) rows
    probability_sums: Tensor  # (layers, experts) router probabilities summed over the tokens


@torch.no_grad()
def probe_routing(model: HybridMoEForCausalLM, batch: Batch, packs_at_once: int | None = None) -> ProbedRouting:
    """Route the probe tokens through the current model.

    Args:
        packs_at_once: sequences per forward pass, to stay within the memory of a micro-batch; by default all.
    """
    was_training = model.training
    model.eval()
    parts = []
    for ids, segments in zip(
        *(t.split(packs_at_once or len(t)) for t in (batch.input_ids, batch.segment_ids)), strict=True
    ):
        routings = model.route(ids, segments)
        parts.append(
            (
                torch.stack([r.experts for r in routings.values()]),
                count_rows(routings),
                torch.stack([r.probability_sum for r in routings.values()]),
            )
        )
    model.train(was_training)
    experts, counts, probabilities = zip(*parts, strict=True)
    return ProbedRouting(torch.cat(experts, dim=1), torch.stack(counts).sum(0), torch.stack(probabilities).sum(0))


@dataclass(frozen=True)
class RoutingComparison:
    """Probe routing of the base model and of the current model, over all ranks, on the host."""

    base_counts: Tensor
    counts: Tensor
    kept: Tensor  # (layers,) fraction of (token, choice) slots whose expert the base model also chooses for that token
    base_probabilities: Tensor  # (layers, experts) mean over the probe tokens
    probabilities: Tensor


def compare_routing(base: ProbedRouting, now: ProbedRouting, world: World) -> RoutingComparison:
    """Sum both routings over all ranks. Communicates; copies to the host once."""
    same = (now.experts.unsqueeze(-1) == base.experts.unsqueeze(-2)).any(-1).sum((1, 2))
    slots = torch.full_like(same, now.experts[0].numel())
    parts = [base.counts, now.counts, base.probability_sums, now.probability_sums, same[:, None], slots[:, None]]
    widths = [part.shape[1] for part in parts]
    joined = world.sum(torch.cat([part.double() for part in parts], dim=1)).cpu()
    base_counts, counts, base_sums, sums, kept, total = joined.split(widths, dim=1)
    tokens = base_sums.sum(1, keepdim=True).clamp_min(1)  # probabilities of a token sum to 1
    return RoutingComparison(
        base_counts.long(), counts.long(), (kept / total.clamp_min(1))[:, 0], base_sums / tokens, sums / tokens
    )


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move the batch to this device. The copy to a GPU is asynchronous, from pinned memory."""
    if device.type == "cuda":
        return Batch(*(tensor.pin_memory().to(device, non_blocking=True) for tensor in batch))
    return Batch(*(tensor.to(device) for tensor in batch))


def held_out_sentences(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Describe the change of held-out loss recorded in metrics.jsonl; empty with fewer than two evaluations."""
    evaluations = [record for record in records if record["kind"] == "eval"]
    if len(evaluations) < 2:
        return []
    before, after = evaluations[0], evaluations[-1]
    if before["loss"] is None or after["loss"] is None:
        return [f"held-out loss: not a number at step {(before if before['loss'] is None else after)['step']}"]
    line = f"held-out loss: {before['loss']:.4f} before, {after['loss']:.4f} after {after['step']} steps"
    better = any(record["loss"] is not None and record["loss"] < before["loss"] for record in evaluations[1:])
    worse = [NEVER_BETTER] if before["step"] == 0 and not better else []
    change = paired_change(before.get("parts", []), after.get("parts", []))
    if change is None:
        return [f"{line} (no standard error: it needs two or more batches that are the same in both)", *worse]
    mean, error = change
    line += f"; change {mean:+.4f} with standard error {error:.4f} over {len(after['parts'])} batches"
    return [line + (f" ({abs(mean) / error:.0f} standard errors)" if error else ""), *worse]
