"""DeepSpeed's engine: its configuration from the recipe, its construction, and its training state by parameter name.

Three defaults of DeepSpeed would be silently wrong here:

- It recognises expert parallelism only by its own layer classes and would overwrite other experts by rank 0's.
  `ExpertEngine` detects expert parallelism by marked parameters.
- It casts all parameters to bfloat16, decay rates included, and reduces gradients in bfloat16. `ExpertEngine` keeps the
  dtypes, and `zero.py` reduces in float32.
- It stores optimizer state in flat partitions for one number of ranks. `training_state` and `restore` use parameter
  names and expert ids.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.config import ZERO_OPTIMIZATION
from torch import Tensor, nn

from finetune.distributed.expert_exchange import is_expert_parameter, is_marked
from finetune.distributed.world import World, group_name
from finetune.engine.optimizer import optimizer_of, parameter_groups
from finetune.engine.zero import Replicated, Sharded
from finetune.model.model import HybridMoEForCausalLM
from finetune.recipe.paths import expanded
from finetune.recipe.recipe import Recipe

REDUCE_BUCKET = 100_000_000  # elements of gradients per reduction


class ExpertEngine(DeepSpeedEngine):  # type: ignore[misc]
    """DeepSpeed's engine, which detects expert parallelism by marked parameters instead of layer classes."""

    @property
    def has_moe_layers(self) -> bool:
        """Whether trainable parameters differ between expert ranks (ZeRO-1 and 2 assert if only frozen ones do)."""
        module = self.__dict__.get("_modules", {}).get("module")
        if module is None:
            return False
        return any(p.requires_grad and is_marked(p) for p in module.parameters())

    @has_moe_layers.setter
    def has_moe_layers(self, value: bool) -> None:
        """Ignore the value, which DeepSpeed sets by searching for its own layers."""

    def _cast_module_mixed_precision(self, *_: object) -> None:
        """Do nothing: parameters keep the dtypes of `HybridMoEForCausalLM.cast`, float32 for the decay rates."""

    def _do_optimizer_sanity_check(self, basic_optimizer: torch.optim.Optimizer) -> str:
        """Use the ZeRO path for every dtype; DeepSpeed would choose among four, which sum gradients differently."""
        return str(ZERO_OPTIMIZATION)

    def _configure_zero_optimizer(self, optimizer: torch.optim.Optimizer) -> Sharded | Replicated:
        return Sharded(optimizer, self) if self.zero_optimization_stage() else Replicated(optimizer, self)

    def buffered_allreduce_fallback(self, grads: object = None, elements_per_buffer: int = 0) -> None:
        """Reduce gradients. DeepSpeed calls this at stage 0, at the end of a step's last backward pass."""
        self.optimizer.reduce()

    def clip_fp32_gradients(self) -> None:
        """Do nothing. DeepSpeed calls this at stage 0, where `Replicated.step` clips by the norm over all ranks."""


def mark_experts(model: nn.Module, world: World) -> None:
    """Mark the parameters that belong to this expert rank alone, frozen ones included, for DeepSpeed."""
    for name, parameter in model.named_parameters():
        if is_expert_parameter(name):
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.group_name = group_name(world.expert_size)  # type: ignore[attr-defined]


def deepspeed_config(
    recipe: Recipe, *, accumulation: int, dtype: torch.dtype, bucket: int = REDUCE_BUCKET, on_gpu: bool = False
) -> dict[str, Any]:
    """DeepSpeed's configuration for this recipe.

    Args:
        accumulation: micro-batches per optimizer step.
        dtype: of the weights.
        bucket: elements of the gradient reduction buffer, which DeepSpeed allocates in full.
        on_gpu: whether offloaded state is copied to and from a GPU, and host memory is pinned.
    """
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": recipe.optim.clip_norm,
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": {
            "stage": recipe.parallel.zero_stage,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "overlap_comm": False,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": 100_000_000,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    if recipe.parallel.offload != "none":
        path = recipe.parallel.offload_path
        config["zero_optimization"]["offload_optimizer"] = {
            "device": recipe.parallel.offload,
            "nvme_path": path and str(expanded(path)),
            "pin_memory": recipe.parallel.offload == "cpu" and on_gpu,
        }
    if dtype == torch.bfloat16:
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
    return config


def start(model: HybridMoEForCausalLM, recipe: Recipe, world: World, *, accumulation: int) -> ExpertEngine:
    """Build the engine for `model`, whose parameters are already on this rank's device. Collective."""
    mark_experts(model, world)
    groups = parameter_groups(model, recipe.optim.weight_decay)
    split = split_params_into_different_moe_groups_for_optimizer(groups)
    on_gpu = world.device.type == "cuda"
    # The host updates offloaded states in place. The unfused optimizer would need temporary tensors of the same size.
    optimizer = optimizer_of(split, recipe.optim, fused=on_gpu or recipe.parallel.offload != "none")
    config = deepspeed_config(
        recipe,
        accumulation=accumulation,
        dtype=next(model.parameters()).dtype,
        bucket=min(REDUCE_BUCKET, sum(p.numel() for p in model.parameters() if p.requires_grad)),
        on_gpu=on_gpu,
    )
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
    """Set the learning rate of the next step, in every group."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


def training_state(engine: ExpertEngine, world: World) -> dict[str, Tensor]:
    """Copy master values and optimizer state of the parameters that this rank stores to the host. Collective.

    Rank 0 stores dense parameters; the first rank that holds an expert stores it. The state can be restored at any
    number of ranks, expert-parallel size, ZeRO stage and offload setting.

    Returns:
        Float32 tensors by `{parameter}::{kind}`, for expert parameters `{parameter}::{kind}::{expert id}`, where kind
        is fp32 or a name of the optimizer's (exp_avg, momentum_buffer, ...).
    """
    tensors = {}
    for name, parameter in _trainable(engine):
        for kind in engine.optimizer.kinds(parameter):
            value = engine.optimizer.read(parameter, kind)
            if not is_expert_parameter(name):
                if world.is_main:
                    tensors[f"{name}::{kind}"] = value.detach().to("cpu", copy=True)
            elif world.expert_data_rank == 0:
                for place, expert in enumerate(engine.module.local_experts):
                    tensors[f"{name}::{kind}::{expert}"] = value[place].detach().to("cpu", copy=True)
    return tensors


def restore(engine: ExpertEngine, read: Callable[[str], Tensor], *, step: int) -> None:
    """Restore a stored training state into the engine, whatever its parallel layout. Collective.

    Args:
        read: returns the stored tensor for a key of `training_state`.
        step: optimizer steps taken when the state was stored.
    """
    for name, parameter in _trainable(engine):

        def whole(kind: str, name: str = name) -> Tensor:
            if not is_expert_parameter(name):
                return read(f"{name}::{kind}")
            return torch.stack([read(f"{name}::{kind}::{expert}") for expert in engine.module.local_experts])

        for kind in engine.optimizer.kinds(parameter):
            engine.optimizer.write(parameter, kind, whole(kind))
    engine.optimizer.set_step(step)
    # Otherwise the first forward pass would use the old weights.
    engine.optimizer.update_lp_params()
    engine.global_steps = step


def set_values(engine: ExpertEngine, values: Mapping[str, Tensor]) -> None:
    """Set trainable parameters to these float32 values, before the first step. Collective.

    Args:
        values: by parameter name, in this rank's shapes.
    """
    for name, parameter in _trainable(engine):
        if name in values:
            engine.optimizer.write(parameter, "fp32", values[name])
    engine.optimizer.update_lp_params()


def _trainable(engine: ExpertEngine) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in engine.module.named_parameters() if p.requires_grad)
