"""Float32 masters of trainable parameters: replicated (ZeRO-0), or partitioned over ranks by DeepSpeed (ZeRO-1, 2).

Both classes hold masters and optimizer state in float32 whatever the dtype of the weights, sum gradients in float32
over micro-batches and ranks, and clip by the norm over all ranks, experts of other ranks included. Their state is read
and written by whole parameter. Source of the stages: arXiv 1910.02054.
"""

import mmap
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from deepspeed.utils.timer import NoopTimer
from torch import Tensor, nn

from finetune.distributed.expert_exchange import is_marked
from finetune.engine.eight_bit import SCALES, TABLES
from finetune.engine.optimizer import initial_state
from finetune.recipe.recipe import RecipeError


class Sharded(DeepSpeedZeroOptimizer):  # type: ignore[misc]
    """ZeRO-1 and 2: each rank holds masters and moments of its partition of every group, on device, host or disk."""

    def __init__(self, optimizer: torch.optim.Optimizer, engine: DeepSpeedEngine):
        self.loss_is_finite = torch.tensor(True)  # in the current step, over all ranks; if not, the step is skipped
        offload = engine.zero_offload_optimizer()
        on_disk = offload is not None and offload.device == OffloadDeviceEnum.nvme
        self._zeros: Callable[[Tensor], Tensor] = partial(zeros_on_disk, offload.nvme_path) if on_disk else _zeros
        self._on_disk = on_disk
        super().__init__(
            optimizer,
            engine.param_names,
            timers=NoopTimer(),
            optimizer_params=None,
            contiguous_gradients=engine.zero_contiguous_gradients(),
            reduce_bucket_size=engine.zero_reduce_bucket_size(),
            allgather_bucket_size=engine.zero_allgather_bucket_size(),
            dp_process_group=engine.seq_data_parallel_group,
            expert_parallel_group=engine.expert_parallel_group if engine.has_moe_layers else None,
            expert_data_parallel_group=engine.expert_data_parallel_group if engine.has_moe_layers else None,
            reduce_scatter=engine.zero_reduce_scatter(),
            overlap_comm=engine.zero_overlap_comm(),
            offload_optimizer_config=offload,
            clip_grad=engine.gradient_clipping(),
            gradient_accumulation_dtype=engine.get_data_types()[1],
            communication_data_type=engine.communication_data_type,
            gradient_accumulation_steps=engine.gradient_accumulation_steps(),
            partition_grads=engine.zero_optimization_stage() == ZeroStageEnum.gradients,
            has_moe_layers=engine.has_moe_layers,
            check_grad_overflow=engine.bfloat16_enabled() and engine._config.bfloat16_config.check_grad_overflow,
        )
        # State is allocated here, not in the first step, so that lack of memory shows at the start. DeepSpeed 0.19.8
        # would also link parameters and moments after the first group's step, before the other groups have moments.
        for group, partition in zip(optimizer.param_groups, self.single_partition_of_fp32_groups, strict=True):
            self.optimizer.state[partition] = initial_state(optimizer, group, partition.detach(), self._zeros)
        self._lazy_init_hp_params_optimizer_state()

    def initialize_optimizer_states(self) -> None:
        """Move masters to disk if offloaded there, then initialise as DeepSpeed does. Called by its constructor."""
        if self._on_disk:
            for partition in self.single_partition_of_fp32_groups:
                partition.data = self._zeros(partition.detach()).copy_(partition.detach())
        super().initialize_optimizer_states()

    def scaled_global_norm(self, norm_type: int = 2) -> Tensor:
        """Norm of the gradient over all ranks; infinite if a loss was not finite, so that DeepSpeed skips the step."""
        norm = torch.as_tensor(super().scaled_global_norm(norm_type))
        return torch.where(self.loss_is_finite.to(norm.device), norm, torch.inf)

    def _gradient_reduction_buffer_dtype(self) -> torch.dtype:
        """Dtype of the gradient reduction buffer. DeepSpeed's ZeRO-2 would round to bfloat16."""
        return torch.float32

    def read(self, parameter: nn.Parameter, kind: str) -> Tensor:
        """The whole master (`fp32`) or moment of a parameter, on its device. Collective."""
        if kind == "fp32":
            return safe_get_full_fp32_param(parameter)
        return safe_get_full_optimizer_state(parameter, kind)

    def write(self, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
        """Set this rank's partition of a master or moment from the whole tensor `value`."""
        if kind == "fp32":
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, kind)

    def set_step(self, step: int) -> None:
        """Set the optimizer's step count; SGD has none."""
        for partition in self.single_partition_of_fp32_groups:
            if "step" in self.optimizer.state[partition]:
                self.optimizer.state[partition]["step"].fill_(step)

    def kinds(self, parameter: nn.Parameter) -> list[str]:
        """Names of what is kept about a parameter: `fp32` and what the optimizer keeps."""
        state = self.optimizer.state[self.single_partition_of_fp32_groups[0]]
        return ["fp32", *(kind for kind in state if kind != "step")]


class Replicated:
    """ZeRO-0: every rank holds masters and moments of all its trainable parameters.

    It replaces DeepSpeed's optimizer: version 0.19.8 sums bfloat16 gradients in bfloat16 at this stage, and with expert
    parallelism uses the mean of the ranks' norms as the norm (its issue 8475). A float32 parameter is its own master.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, engine: DeepSpeedEngine):
        self.optimizer = optimizer
        self.loss_is_finite = torch.tensor(True)  # in the current step, over all ranks; if not, the step is skipped
        self.overflow = False  # whether the last step was skipped because a loss or the gradient was not finite
        self._global_grad_norm = 0.0  # read by the engine
        self._clip_norm: float = engine.gradient_clipping()
        self._bucket: int = engine.zero_reduce_bucket_size()
        self._expert_groups = engine.expert_parallel_group
        self._expert_data_groups = engine.expert_data_parallel_group
        self._masters: dict[nn.Parameter, nn.Parameter] = {}
        for group in optimizer.param_groups:
            parameters = group["params"]
            self._masters |= {parameter: _master(parameter) for parameter in parameters}
            group["params"] = [self._masters[parameter] for parameter in parameters]
            for parameter, master in zip(parameters, group["params"], strict=True):
                experts = len(parameter) if is_marked(parameter) else 0
                optimizer.state[master] = initial_state(optimizer, group, master.detach(), _zeros, experts)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups."""
        return self.optimizer.param_groups

    def reduce(self) -> None:
        """Average the accumulated gradients over all ranks. Collective.

        A parameter without a gradient on this rank counts as zero, because every rank must join every reduction.
        """
        by_group: dict[str | None, list[Tensor]] = {}
        for parameter, master in self._masters.items():
            if master.grad is None:
                master.grad = torch.zeros_like(master)
            by_group.setdefault(_expert_group(parameter), []).append(master.grad)
        for name, gradients in by_group.items():
            group = self._expert_data_groups[name] if name else None
            for bucket in _buckets(gradients, self._bucket):
                flat = torch.cat([gradient.flatten() for gradient in bucket])
                dist.all_reduce(flat, group=group)
                # An expert's gradient already sums the rows of all ranks of its group, so the divisor is the same.
                flat /= dist.get_world_size()
                for gradient, mean in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                    gradient.copy_(mean.view_as(gradient))

    def step(self) -> None:
        """Clip gradients, update masters and weights; do nothing if a loss or the gradient is not finite."""
        norm = self._norm()
        self.overflow = not (norm.isfinite() & self.loss_is_finite)
        self._global_grad_norm = float("inf") if self.overflow else float(norm)
        if self.overflow:
            return
        if self._clip_norm:
            scale = (self._clip_norm / (norm + 1e-6)).clamp(max=1)
            for master in self._masters.values():
                assert master.grad is not None, "reduce comes before step"
                master.grad.mul_(scale)
        self.optimizer.step()
        self.update_lp_params()

    def _norm(self) -> Tensor:
        """Gradient norm over all parameters, those of experts on other ranks included. Collective."""
        squares: dict[str | None, Tensor] = {}
        for parameter, master in self._masters.items():
            assert master.grad is not None, "reduce comes before step"
            group = _expert_group(parameter)
            squares[group] = squares.get(group, torch.zeros_like(master.grad.sum())) + master.grad.square().sum()
        for name, square in squares.items():
            if name:
                dist.all_reduce(square, group=self._expert_groups[name])
        return torch.stack(list(squares.values())).sum().sqrt()

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for master in self._masters.values():
            master.grad = None

    @torch.no_grad()
    def update_lp_params(self) -> None:
        """Copy the masters, rounded to the dtype of the weights, into the weights."""
        for parameter, master in self._masters.items():
            if parameter is not master:
                parameter.copy_(master)

    def read(self, parameter: nn.Parameter, kind: str) -> Tensor:
        """The master (`fp32`) or a moment of a parameter, or the scales of one, for experts a row each."""
        master = self._masters[parameter]
        if kind == "fp32":
            return master.detach()
        kept = self.optimizer.state[master][kind]
        return kept.view(len(parameter), -1) if kind in SCALES and is_marked(parameter) else kept

    def write(self, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
        """Replace a master or moment."""
        self.read(parameter, kind).copy_(value)

    def set_step(self, step: int) -> None:
        """Steps that the optimizer is to count as taken; SGD counts none."""
        for master in self._masters.values():
            state = self.optimizer.state[master]
            if "step" in state:  # a tensor of torch's optimizers, a number of bitsandbytes'
                state["step"] = step if isinstance(state["step"], int) else state["step"].fill_(step)

    def kinds(self, parameter: nn.Parameter) -> list[str]:
        """Names of what is kept about a parameter: `fp32` and what the optimizer keeps."""
        kept = self.optimizer.state[self._masters[parameter]]
        return ["fp32", *(kind for kind in kept if kind != "step" and kind not in TABLES)]


def zeros_on_disk(folder: str | Path, like: Tensor) -> Tensor:
    """Allocate float32 zeros of the shape of `like` in an unnamed file that is mapped into memory.

    The kernel pages them between disk and memory. The space on disk is freed when this process ends in any way.

    Raises:
        RecipeError: the folder is not writable, or the disk has too little space.
    """
    size = max(1, like.numel()) * torch.float32.itemsize
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, size)  # detects a full disk now; later it would be a bus error
            mapped = mmap.mmap(file.fileno(), size)
    except OSError as error:
        raise RecipeError(
            f"parallel.offload_path: {folder}: cannot hold {size / 1e9:.2f} GB more of the optimizer's state"
            f" ({error.strerror}); free space there, or name a folder on another disk"
        ) from None
    # The file has at least one element, because torch refuses an empty buffer and a rank may have an empty partition.
    return torch.frombuffer(mapped, dtype=torch.float32)[: like.numel()].view(like.shape)


def _zeros(like: Tensor) -> Tensor:
    return torch.zeros_like(like)


def _master(parameter: nn.Parameter) -> nn.Parameter:
    """The float32 master of a parameter, which accumulates its gradients; a float32 parameter is its own master."""
    if parameter.dtype == torch.float32:
        return parameter
    master = nn.Parameter(parameter.detach().float())

    def collect(parameter: Tensor) -> None:
        assert parameter.grad is not None, "called when there is a gradient"
        gradient = parameter.grad.float()
        master.grad = gradient if master.grad is None else master.grad.add_(gradient)
        parameter.grad = None

    parameter.register_post_accumulate_grad_hook(collect)
    return master


def _expert_group(parameter: nn.Parameter) -> str | None:
    """Name of the expert process groups of an expert parameter; None for a dense parameter."""
    return getattr(parameter, "group_name", None) if is_marked(parameter) else None


def _buckets(tensors: Iterable[Tensor], elements: int) -> Iterator[list[Tensor]]:
    """Split tensors, in order, into buckets of at most `elements` elements; a larger tensor has its own bucket."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(t.numel() for t in bucket) + tensor.numel() > elements:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
