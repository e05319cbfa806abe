"""The exchange leaves the host and the device something to do: how often a host waits, and what runs meanwhile."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.utils.checkpoint import checkpoint

from data.packing import Batch
from finetune.distributed import expert_exchange as experts
from finetune.kernels.torch.experts import experts_grouped
from finetune.model.config import ModelConfig
from finetune.model.model import HybridMoEForCausalLM
from finetune.model.moe import MoE
from finetune.recipe.recipe import Router
from finetune.training.router_loss import router_loss
from finetune.training.step import token_counts
from tests.configs import randomise, tiny_config
from tests.host_waits import host_waits
from tests.ranks import ranks


def a_model(local: range | None = None) -> HybridMoEForCausalLM:
    model = HybridMoEForCausalLM(ModelConfig.from_dict(tiny_config()), local)
    randomise(model, seed=3)
    for block in model.modules():
        if isinstance(block, MoE):
            block.experts.compute = experts_grouped
    return model


def a_batch(*segments: list[int]) -> Batch:
    ids = torch.arange(len(segments) * len(segments[0])).view(len(segments), -1) % 50
    return Batch(ids, ids.roll(-1, 1), torch.tensor(segments))


def train_once(model: HybridMoEForCausalLM, batch: Batch, router: Router) -> None:
    out = model(batch.input_ids, batch.segment_ids, labels=batch.labels)
    assert out.loss_sum is not None
    shares = torch.full((4, 8), 1 / 8)
    tokens = token_counts([batch])[1]
    loss = router_loss(out.routings, batch.segment_ids, router, step_shares=shares, step_tokens=tokens)
    (out.loss_sum + loss).backward()


def test_the_counter_sees_what_would_wait() -> None:
    x, mask = torch.arange(4.0), torch.tensor([True, False, True, True])
    weight = torch.ones(4, requires_grad=True)
    for what, waits in (
        (lambda: x.tolist(), 1),
        (lambda: float(x.sum()), 1),
        (lambda: bool(mask.any()), 1),
        (lambda: x[mask], 1),
        (lambda: torch.bincount(mask.long()), 1),
        (lambda: x.repeat_interleave(mask.long()), 1),
        (lambda: mask.unique(), 1),
        (lambda: x.repeat_interleave(mask.long(), output_size=3), 0),
        (lambda: torch.nonzero_static(mask, size=3), 0),
        (lambda: (weight[torch.tensor([1, 2])] * 2).sum().backward(), 0),
        (lambda: weight[mask].sum().backward(), 2),
    ):
        with host_waits() as found:
            what()
        assert len(found) == waits, found


LOSSES = Router.model_validate({"train": True, "balance": {"coefficient": 0.1}, "z_coefficient": 0.1})


IN_A_PASS = ["tolist"]  # what documents there are, and how many tokens are supervised


def test_a_pass_waits_once_where_all_experts_are_here() -> None:
    """Packed documents with padding, recomputed, with both router losses: every branch of the layout."""
    model = a_model()
    model.recompute = True
    with host_waits() as waits:
        train_once(model, a_batch([0, 0, 0, 1, 1, -1], [0, 0, 0, 0, 0, 0]), LOSSES)
    assert waits == IN_A_PASS


def waits_on_rank(rank: int, recompute: bool) -> list[str]:
    model = a_model(range(4 * rank, 4 * rank + 4))
    model.recompute = recompute
    experts.attach(model, dist.group.WORLD)
    with host_waits() as waits:
        train_once(model, a_batch([0, 0, 1, 1, -1] if rank else [0] * 5), Router())
    return waits


def test_a_layer_waits_once_more_where_experts_are_elsewhere() -> None:
    """Four layers, forward and backward; when they are computed again, they wait again."""
    assert ranks(2, waits_on_rank, False) == [[*IN_A_PASS, *["tolist"] * 4]] * 2
    assert ranks(2, waits_on_rank, True) == [[*IN_A_PASS, *["tolist"] * 4, *["tolist"] * 4]] * 2


class _Told(torch.autograd.Function):
    """Identity that says when it is passed, forward and backward."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, log: list[str], name: str) -> Tensor:
        ctx.log, ctx.name = log, name  # type: ignore[attr-defined]
        log.append(name)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.log.append(f"{ctx.name}, backward")  # type: ignore[attr-defined]
        return gradient, None, None


class _Observed(nn.Module):
    def __init__(self, module: nn.Module, log: list[str], name: str):
        super().__init__()
        self.module, self.log, self.name = module, log, name

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        out: Tensor = _Told.apply(self.module(x, *more), self.log, self.name)
        return out


def events_on_rank(rank: int, recompute: bool) -> list[str]:
    log: list[str] = []
    start, finish = experts._Way.start, experts._Way.finish

    def started(way: experts._Way, rows: Tensor, *, reverse: bool = False) -> None:
        log.append("gradients leave" if reverse else "rows leave")
        start(way, rows, reverse=reverse)

    def finished(way: experts._Way) -> Tensor:
        log.append("all here")
        return finish(way)

    experts._Way.start, experts._Way.finish = started, finished  # type: ignore[method-assign]
    block = MoE(ModelConfig.from_dict(tiny_config()), 4)
    randomise(block, seed=3)
    experts.attach(block, dist.group.WORLD)
    block.shared_expert = _Observed(block.shared_expert, log, "shared expert")  # type: ignore[assignment]
    block.experts = _Observed(block.experts, log, "experts")  # type: ignore[assignment]
    x = torch.randn(5 - rank, 32, requires_grad=True)
    out, _ = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
    log.append("loss")
    out.sum().backward()
    return log


FORWARD = ["rows leave", "shared expert", "all here", "experts", "rows leave", "all here"]
BACKWARD = [
    "gradients leave",
    "all here",
    "experts, backward",
    "gradients leave",
    "shared expert, backward",
    "all here",
]


def test_the_shared_expert_is_computed_while_rows_travel_forward_and_backward() -> None:
    assert ranks(2, events_on_rank, False) == [[*FORWARD, "loss", *BACKWARD]] * 2


def test_recomputed_layers_overlap_too() -> None:
    assert ranks(2, events_on_rank, True) == [[*FORWARD, "loss", *FORWARD, *BACKWARD]] * 2
