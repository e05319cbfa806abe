"""The inputs of a plan: model, recipe, machine, and counts derived from them. Imports no torch."""

from dataclasses import dataclass
from functools import cached_property

from finetune.model.config import ALL, ModelConfig, Recompute
from finetune.plan.adapter_targets import adapter_parameters
from finetune.plan.exchange import UNKNOWN, Links
from finetune.plan.operations import attention_operations, recompute_operations, step_operations
from finetune.recipe.recipe import Recipe

GIB = 2**30
FREE_FRACTION = 0.08  # of a device, for memory that the allocator cannot use


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The machine of the run; `device_bytes` is the memory of one GPU, None without GPUs."""

    ranks: int
    ranks_per_node: int
    device_name: str
    device_bytes: int | None
    host_bytes: int | None = None  # memory of one node, if known
    disk_bytes: int | None = None  # free on the disk of the run folder, if known
    links: Links = UNKNOWN

    @property
    def ranks_here(self) -> int:
        """Ranks of one node."""
        return min(self.ranks, self.ranks_per_node)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The inputs of a plan. Memory functions take it; `planner.Plan` is their result."""

    config: ModelConfig
    recipe: Recipe
    machine: Machine
    weight_bytes: int  # of one weight
    accumulation: int  # micro-batches of one rank in an optimizer step
    dense: int  # parameters of the model outside the routed experts
    experts: int  # parameters of all routed experts
    dense_adapters: int  # parameters of the adapters on linear layers
    expert_adapters: int  # parameters of the adapters on the routed experts, of the whole model
    trained_dense: int  # parameters that train on every rank alike, adapters of linear layers included
    trained_experts: int  # of the whole model: the routed experts, or the adapters on them

    @property
    def trained(self) -> int:
        """Parameters that train."""
        return self.trained_dense + self.trained_experts

    @property
    def active_adapters(self) -> int:
        """Parameters of the adapters that process one token."""
        config = self.config
        return self.dense_adapters + self.expert_adapters * config.num_experts_per_tok // config.num_experts

    @property
    def shard(self) -> int:
        """Parameters whose masters and moments one rank stores.

        ZeRO partitions dense parameters over all ranks, experts over the ranks that hold the same experts.
        """
        if self.recipe.parallel.zero_stage == 0:
            return self.trained_dense + self.trained_experts // self.recipe.parallel.expert
        return -(-self.trained_dense // self.machine.ranks) + -(-self.trained_experts // self.machine.ranks)

    @property
    def room_bytes(self) -> int | None:
        """Bytes that a rank may use, of its GPU or of its share of the host; None if unknown."""
        if self.machine.device_bytes is not None:
            return int(self.machine.device_bytes * (1 - FREE_FRACTION))
        if self.machine.host_bytes is None:
            return None
        return int(self.machine.host_bytes * (1 - FREE_FRACTION)) // self.machine.ranks_here

    @property
    def counts_ahead(self) -> bool:
        """Whether a forward pass over all micro-batches counts the load before the step."""
        balance = self.recipe.router.balance
        return balance.coefficient > 0 and balance.kind == "global" and self.accumulation > 1

    @cached_property
    def operations(self) -> float:
        """Operations per token of training, without recomputation."""
        return step_operations(
            self.config,
            self.recipe.train.sequence_tokens,
            adapter_parameters=self.active_adapters,
            full_parameter=self.recipe.lora is None,
            router_trains=self.recipe.router.train,
        )

    @property
    def forward_operations(self) -> float:
        """Operations per token of one forward pass of the layers."""
        layers = self.operations_of((ALL,) * self.config.num_hidden_layers)
        return layers + attention_operations(self.config, self.recipe.train.sequence_tokens)

    def operations_of(self, layers: tuple[Recompute, ...], skips_down: bool = False) -> float:
        """Operations per token of the halves of layers that are recomputed."""
        config, tokens, adapters = self.config, self.recipe.train.sequence_tokens, self.active_adapters
        return recompute_operations(config, tokens, adapter_parameters=adapters, layers=layers, skips_down=skips_down)


def workload(config: ModelConfig, recipe: Recipe, machine: Machine) -> Workload:
    """Compute the inputs of the plan of `recipe` on `machine`.

    Raises:
        RecipeError: ranks, batch, experts or adapters are not compatible.
    """
    recipe.check_ranks(machine.ranks, config.num_experts)
    dense_adapters, expert_adapters = adapter_parameters(config, recipe)
    counts = config.parameter_counts()
    experts, dense = counts["experts"], sum(counts.values()) - counts["experts"]
    router = counts["router"] if recipe.router.train else 0
    if recipe.lora is None:
        trained_dense, trained_experts = dense - counts["router"] + router, experts
    else:
        trained_dense, trained_experts = dense_adapters + router, expert_adapters
    return Workload(
        config=config,
        recipe=recipe,
        machine=machine,
        weight_bytes=weight_bytes(recipe, machine),
        accumulation=recipe.accumulation(machine.ranks),
        dense=dense,
        experts=experts,
        dense_adapters=dense_adapters,
        expert_adapters=expert_adapters,
        trained_dense=trained_dense,
        trained_experts=trained_experts,
    )


def weight_bytes(recipe: Recipe, machine: Machine) -> int:
    """Bytes of one weight in the recipe's dtype; for `auto`, bfloat16 on GPUs and float32 on the CPU."""
    auto = "float32" if machine.device_bytes is None else "bfloat16"
    return {"float32": 4, "bfloat16": 2}[auto if recipe.model.dtype == "auto" else recipe.model.dtype]
