"""Everything DeepSpeed: its configuration derived from the recipe, the engine, the step, and its state by parameter.

Two silent traps are closed here. DeepSpeed recognises expert parallelism only by its own layer classes, so unmarked
experts would be overwritten by rank 0's: `ExpertEngine` follows the parameters instead. And its optimizer state is in
flat partitions of this number of ranks: `training_state` and `restore` go by parameter name and expert id.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor, nn

from finetune.model.model import HybridMoEForCausalLM
from finetune.optim import adamw, parameter_groups
from finetune.parallel.experts import is_expert_parameter
from finetune.parallel.world import World, group_name
from finetune.recipe import Recipe

MOMENTS = ("exp_avg", "exp_avg_sq")


class ExpertEngine(DeepSpeedEngine):  # type: ignore[misc]
    """DeepSpeed's engine, told by the parameters rather than by layer classes whether some are expert-parallel."""

    @property
    def has_moe_layers(self) -> bool:
        """Whether trainable parameters differ between expert ranks (ZeRO-1 and 2 assert if only frozen ones do)."""
        module = self.__dict__.get("_modules", {}).get("module")
        if module is None:
            return False
        return any(p.requires_grad and not getattr(p, "allreduce", True) for p in module.parameters())

    @has_moe_layers.setter
    def has_moe_layers(self, value: bool) -> None:
        """Ignored: DeepSpeed sets it by looking for its own layers."""


def mark_experts(model: nn.Module, world: World) -> None:
    """Tell DeepSpeed which parameters belong to this expert rank alone, frozen ones included."""
    for name, parameter in model.named_parameters():
        if is_expert_parameter(name):
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.group_name = group_name(world.expert_size)  # type: ignore[attr-defined]


def deepspeed_config(recipe: Recipe, *, accumulation: int, dtype: torch.dtype) -> dict[str, Any]:
    """DeepSpeed's own configuration for this recipe; every default that would surprise is written out."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": recipe.optim.clip_norm,
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {
            "stage": recipe.parallel.zero_stage,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "overlap_comm": False,
            "reduce_bucket_size": 100_000_000,
            "allgather_bucket_size": 100_000_000,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    if dtype == torch.bfloat16:
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
    return config


def start(model: HybridMoEForCausalLM, recipe: Recipe, world: World, *, accumulation: int) -> ExpertEngine:
    """The engine around `model`, whose parameters are already in place on this rank's device. Collective."""
    mark_experts(model, world)
    groups = parameter_groups(model, recipe.optim.weight_decay)
    split = split_params_into_different_moe_groups_for_optimizer(groups)
    optimizer = adamw(split, recipe.optim, fused=world.device.type == "cuda")
    config = deepspeed_config(recipe, accumulation=accumulation, dtype=next(model.parameters()).dtype)
    return ExpertEngine(
        args=None,
        model=model,
        optimizer=optimizer,
        model_parameters=[p for p in model.parameters() if p.requires_grad],
        dist_init_required=False,
        config=config,
        config_class=DeepSpeedConfig(config),
    )


def set_learning_rate(engine: ExpertEngine, lr: float) -> None:
    """Use this learning rate for the next step, in every group."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


def training_state(engine: ExpertEngine, world: World) -> dict[str, Tensor]:
    """Float32 values and AdamW moments of what trains, as far as this rank is the one to store them. Collective.

    Keys are `{parameter}::{fp32|exp_avg|exp_avg_sq}`, for expert parameters with `::{expert id}` behind, so that the
    state can be read back at any number of ranks and any expert parallel size. Dense parameters are stored by rank 0,
    experts by the first rank that holds them.
    """
    _link_moments(engine)
    tensors = {}
    for name, parameter in _trainable(engine):
        values = {"fp32": safe_get_full_fp32_param(parameter)}
        values |= {moment: safe_get_full_optimizer_state(parameter, moment) for moment in MOMENTS}
        for kind, value in values.items():
            assert value is not None, f"DeepSpeed has no {kind} for {name}"
            if not is_expert_parameter(name):
                if world.is_main:
                    tensors[f"{name}::{kind}"] = value.detach().cpu().clone()
            elif world.expert_data_rank == 0:
                for place, expert in enumerate(engine.module.local_experts):
                    tensors[f"{name}::{kind}::{expert}"] = value[place].detach().cpu().clone()
    return tensors


def restore(engine: ExpertEngine, read: Callable[[str], Tensor], *, step: int) -> None:
    """Put a stored training state into the engine, at whatever layout it runs now. Collective.

    Args:
        read: the stored tensor of this key, as `training_state` named it.
        step: optimizer steps taken when the state was stored.
    """
    for state, partition in _partitions(engine):
        state[partition] = {
            "step": torch.tensor(float(step), device=partition.device),  # where the fused AdamW expects it
            **{moment: torch.zeros_like(partition) for moment in MOMENTS},
        }
    _link_moments(engine)
    for name, parameter in _trainable(engine):

        def whole(kind: str, name: str = name) -> Tensor:
            if not is_expert_parameter(name):
                return read(f"{name}::{kind}")
            return torch.stack([read(f"{name}::{kind}::{expert}") for expert in engine.module.local_experts])

        safe_set_full_fp32_param(parameter, whole("fp32"))
        for moment in MOMENTS:
            safe_set_full_optimizer_state(parameter, whole(moment), moment)
    # Without this the first forward pass would still use the weights from before.
    engine.optimizer.update_lp_params()
    engine.global_steps = step


def _trainable(engine: ExpertEngine) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in engine.module.named_parameters() if p.requires_grad)


def _link_moments(engine: ExpertEngine) -> None:
    """Connect each parameter to its slice of the moments.

    DeepSpeed 0.19.8 does so once, in the first step: in most cases while only the first group has moments, and never
    for moments that were put in before a step.
    """
    engine.optimizer._hp_optimizer_states_linked = False
    engine.optimizer._lazy_init_hp_params_optimizer_state()


def _partitions(engine: ExpertEngine) -> list[tuple[dict[Any, Any], Tensor]]:
    """The inner optimizer's state, and the flat float32 partitions of this rank that are its parameters."""
    optimizer = engine.optimizer
    if isinstance(optimizer, BF16_Optimizer):
        flat = optimizer.fp32_groups_flat_partition
    else:
        flat = optimizer.single_partition_of_fp32_groups
    return [(optimizer.optimizer.state, partition) for partition in flat]
