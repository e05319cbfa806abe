"""Everything DeepSpeed: its configuration derived from the recipe, the engine, the step, and its state by parameter.

Three silent traps are closed here. DeepSpeed recognises expert parallelism only by its own layer classes, so unmarked
experts would be overwritten by rank 0's: `ExpertEngine` follows the parameters instead. It would round every parameter
to bfloat16, the decay rates too, and with it gradients on their way: `zero.py` keeps both in float32. And its optimizer
state is in flat partitions of this number of ranks: `training_state` and `restore` go by parameter name and expert id.
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

REDUCE_BUCKET = 100_000_000  # gradients, in elements, that are sent at once


class ExpertEngine(DeepSpeedEngine):  # type: ignore[misc]
    """DeepSpeed's engine, told by the parameters rather than by layer classes whether some are expert-parallel."""

    @property
    def has_moe_layers(self) -> bool:
        """Whether trainable parameters differ between expert ranks (ZeRO-1 and 2 assert if only frozen ones do)."""
        module = self.__dict__.get("_modules", {}).get("module")
        if module is None:
            return False
        return any(p.requires_grad and is_marked(p) for p in module.parameters())

    @has_moe_layers.setter
    def has_moe_layers(self, value: bool) -> None:
        """Ignored: DeepSpeed sets it by looking for its own layers."""

    def _cast_module_mixed_precision(self, *_: object) -> None:
        """Parameters keep their dtype: `HybridMoEForCausalLM.cast` chose it, float32 for the decay rates."""

    def _do_optimizer_sanity_check(self, basic_optimizer: torch.optim.Optimizer) -> str:
        """One optimizer for every dtype; DeepSpeed would choose among four, which sum gradients differently."""
        return str(ZERO_OPTIMIZATION)

    def _configure_zero_optimizer(self, optimizer: torch.optim.Optimizer) -> Sharded | Replicated:
        return Sharded(optimizer, self) if self.zero_optimization_stage() else Replicated(optimizer, self)

    def buffered_allreduce_fallback(self, grads: object = None, elements_per_buffer: int = 0) -> None:
        """Called by DeepSpeed at the end of a step's last backward pass when the stage is 0."""
        self.optimizer.reduce()

    def clip_fp32_gradients(self) -> None:
        """Nothing: called by DeepSpeed when the stage is 0, whose optimizer clips by the norm over all ranks itself."""


def mark_experts(model: nn.Module, world: World) -> None:
    """Tell DeepSpeed which parameters belong to this expert rank alone, frozen ones included."""
    for name, parameter in model.named_parameters():
        if is_expert_parameter(name):
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.group_name = group_name(world.expert_size)  # type: ignore[attr-defined]


def deepspeed_config(
    recipe: Recipe, *, accumulation: int, dtype: torch.dtype, bucket: int = REDUCE_BUCKET, on_gpu: bool = False
) -> dict[str, Any]:
    """DeepSpeed's own configuration for this recipe; every default that would surprise is written out.

    Args:
        dtype: of the weights.
        bucket: elements of the buffer that gradients are gathered in, which is allocated whole.
        on_gpu: whether what is offloaded travels to a GPU and back.
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
    """The engine around `model`, whose parameters are already in place on this rank's device. Collective."""
    mark_experts(model, world)
    groups = parameter_groups(model, recipe.optim.weight_decay)
    split = split_params_into_different_moe_groups_for_optimizer(groups)
    on_gpu = world.device.type == "cuda"
    # Offloaded states are updated by the host in place: the unfused form would hold further tensors as large as they.
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
    """Use this learning rate for the next step, in every group."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


def training_state(engine: ExpertEngine, world: World) -> dict[str, Tensor]:
    """Float32 values of what trains, and what the optimizer keeps, as far as this rank stores them. Collective.

    Keys are `{parameter}::{kind}`, where kind is fp32 or a name of the optimizer's (exp_avg, momentum_buffer, ...), for
    expert parameters with `::{expert id}` behind, so that the state can be read back at any number of ranks, expert
    parallel size, ZeRO stage and place of the optimizer's state. Dense parameters are stored by rank 0, experts by the
    first rank that holds them.
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
    """Put a stored training state into the engine, at whatever layout it runs now. Collective.

    Args:
        read: the stored tensor of this key, as `training_state` named it.
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
    # Without this the first forward pass would still use the weights from before.
    engine.optimizer.update_lp_params()
    engine.global_steps = step


def set_values(engine: ExpertEngine, values: Mapping[str, Tensor]) -> None:
    """Put these float32 values into parameters that train, before the first step. Collective.

    Args:
        values: by parameter, as this rank holds it.
    """
    for name, parameter in _trainable(engine):
        if name in values:
            engine.optimizer.write(parameter, "fp32", values[name])
    engine.optimizer.update_lp_params()


def _trainable(engine: ExpertEngine) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in engine.module.named_parameters() if p.requires_grad)
