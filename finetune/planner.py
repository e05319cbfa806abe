"""What a run will take before it starts: memory of every rank by component, host memory, disk, operations and time.

Plain arithmetic over ModelConfig, Recipe and a description of the machine. What trains is counted exactly; activations
are counted from the operations of `model/`; what cannot be known beforehand is an assumption, and every assumption is
a sentence of the plan. Imports no torch.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from finetune import recompute, state_bytes, working_bytes
from finetune.activations import FLOAT32, gathers
from finetune.adapter_targets import adapter_parameters
from finetune.arithmetic import attention_operations, recompute_operations, step_operations
from finetune.exchange_plan import NVLINK_GBIT, UNKNOWN, Exchange, Links, exchange
from finetune.model.config import ALL, ModelConfig, Recompute
from finetune.recipe import CHECKOUT, Recipe, RecipeError, resolve
from finetune.throughput import REFERENCE, Estimate, Job, estimate

GIB = 2**30
FREE_FRACTION = 0.08  # of a device, for what the allocator cannot use


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where the run will be; `device_bytes` is the memory of one GPU, None where there are none."""

    ranks: int
    ranks_per_node: int
    device_name: str
    device_bytes: int | None
    host_bytes: int | None = None  # memory of one node, if known
    disk_bytes: int | None = None  # free where the run folder goes, if known
    links: Links = UNKNOWN


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The needs of one run. Bytes of memory are those of one rank, the fullest."""

    config: ModelConfig
    recipe: Recipe
    machine: Machine
    weight_bytes: int
    accumulation: int
    dense_adapters: int  # parameters of the adapters on linear layers
    expert_adapters: int  # parameters of the adapters on the routed experts, of the whole model
    trained_dense: int  # parameters that train on every rank alike, adapters of linear layers included
    trained_experts: int  # of the whole model: the routed experts, or the adapters on them
    recompute: tuple[Recompute, ...]  # of every layer
    memory: dict[str, int]
    suggestion: str | None  # what would make it fit, when it does not

    @property
    def rank_bytes(self) -> int:
        """Memory of one rank, the runtime included."""
        return sum(self.memory.values())

    @property
    def room_bytes(self) -> int | None:
        """What a rank may use: of its GPU, or of its share of the host; None when that is not known."""
        if self.machine.device_bytes is not None:
            return int(self.machine.device_bytes * (1 - FREE_FRACTION))
        if self.machine.host_bytes is None:
            return None
        return int(self.machine.host_bytes * (1 - FREE_FRACTION)) // min(
            self.machine.ranks, self.machine.ranks_per_node
        )

    @property
    def shard(self) -> int:
        """Parameters whose float32 copy and moments one rank keeps.

        ZeRO divides dense parameters over all ranks, experts over those that hold the same ones.
        """
        if self.recipe.parallel.zero_stage == 0:
            return self.trained_dense + self.trained_experts // self.recipe.parallel.expert
        return -(-self.trained_dense // self.machine.ranks) + -(-self.trained_experts // self.machine.ranks)

    @property
    def offload_disk_bytes(self) -> int:
        """Disk of one node that holds the optimizer's state."""
        on_disk = self.recipe.parallel.offload == "nvme"
        return on_disk * 3 * FLOAT32 * self.shard * min(self.machine.ranks, self.machine.ranks_per_node)

    @property
    def offload_host_bytes(self) -> int:
        """Memory of one node that the optimizer's state takes beside the GPUs."""
        if self.machine.device_bytes is None:
            return 0  # it is among the memory of the ranks
        return state_bytes.offloaded(self) * min(self.machine.ranks, self.machine.ranks_per_node)

    @property
    def host_fits(self) -> bool | None:
        """Whether a node has room for what is offloaded; None when its memory is not known."""
        if self.machine.host_bytes is None:
            return None
        return self.offload_host_bytes <= self.machine.host_bytes * (1 - FREE_FRACTION)

    @property
    def fits(self) -> bool | None:
        """Whether every rank has room, and every node for what is offloaded; None when the memory is not known."""
        if self.room_bytes is None:
            return None
        return self.rank_bytes <= self.room_bytes and self.host_fits is not False

    @property
    def trained(self) -> int:
        """Parameters that train."""
        return self.trained_dense + self.trained_experts

    @property
    def active_adapters(self) -> int:
        """Parameters of the adapters that one token passes through."""
        config = self.config
        return self.dense_adapters + self.expert_adapters * config.num_experts_per_tok // config.num_experts

    @property
    def host_load_bytes(self) -> int:
        """Host memory of one node while weights are read: a stored tensor at a time in each rank."""
        ranks = min(self.machine.ranks, self.machine.ranks_per_node)
        held = 0 if self.machine.device_bytes is not None else self.rank_bytes - working_bytes.RUNTIME_HOST_BYTES
        return ranks * (held + state_bytes.largest_stored(self.config) + working_bytes.RUNTIME_HOST_BYTES)

    @property
    def host_save_bytes(self) -> int:
        """Host memory of the rank that stores most of a checkpoint while it is written."""
        return 3 * FLOAT32 * (self.trained_dense + self.trained_experts // self.recipe.parallel.expert)

    @property
    def checkpoint_bytes(self) -> int:
        """One checkpoint: float32 values and both moments of what trains."""
        return 3 * FLOAT32 * self.trained

    @property
    def checkpoints_bytes(self) -> int:
        """Disk for all that are kept, the best among them or beside them, and the one being written."""
        checkpoint = self.recipe.checkpoint
        return (checkpoint.keep + checkpoint.keep_best + 1) * self.checkpoint_bytes

    @property
    def merged_bytes(self) -> int:
        """Disk for the exported model."""
        return state_bytes.STORED_BYTES * sum(self.config.parameter_counts().values())

    @property
    def operations(self) -> float:
        """Operations per token of training, recomputation not counted."""
        return step_operations(
            self.config,
            self.recipe.train.sequence_tokens,
            adapter_parameters=self.active_adapters,
            full_parameter=self.recipe.lora is None,
            router_trains=self.recipe.router.train,
        )

    @property
    def recomputed(self) -> float:
        """Operations per token of what is computed once more in the backward pass, and to count load ahead."""
        skips_down = gathers(working_bytes.setting(self))
        return self._operations_of(self.recompute, skips_down) + self.counts_ahead * self._forward_operations

    @property
    def recomputed_share(self) -> float:
        """Of the operations that `train.recompute: full` does again, how many this plan does."""
        return self._operations_of(self.recompute) / self._operations_of((ALL,) * self.config.num_hidden_layers)

    @property
    def _forward_operations(self) -> float:
        layers = self._operations_of((ALL,) * self.config.num_hidden_layers)
        return layers + attention_operations(self.config, self.recipe.train.sequence_tokens)

    def _operations_of(self, layers: tuple[Recompute, ...], skips_down: bool = False) -> float:
        config, tokens, adapters = self.config, self.recipe.train.sequence_tokens, self.active_adapters
        return recompute_operations(config, tokens, adapter_parameters=adapters, layers=layers, skips_down=skips_down)

    @property
    def counts_ahead(self) -> bool:
        """Whether each micro-batch passes forward once before the step, to count the load of the whole batch."""
        balance = self.recipe.router.balance
        return balance.coefficient > 0 and balance.kind == "global" and self.accumulation > 1

    @property
    def exchanging_passes(self) -> float:
        """Forward passes in which rows travel, of the mean MoE layer: one, and those of `recomputed`."""
        again = sum(self.recompute[layer].experts for layer in self.config.moe_layers)
        return 1 + again / max(1, len(self.config.moe_layers)) + self.counts_ahead

    @property
    def exchange(self) -> Exchange | None:
        """What expert-parallel ranks send each other in a step; None where every rank holds all experts."""
        config, train, expert = self.config, self.recipe.train, self.recipe.parallel.expert
        if expert == 1:
            return None
        name, links = self.machine.device_name, self.machine.links
        if links.node_gbit is None and ("H100" in name or "H200" in name) and "PCIe" not in name:
            links = replace(links, node_gbit=NVLINK_GBIT)
        return exchange(
            layers=len(config.moe_layers),
            micro_batches=self.accumulation,
            tokens=train.micro_batch_tokens,
            hidden=config.hidden_size,
            weight_bytes=self.weight_bytes,
            num_experts=config.num_experts,
            experts_per_token=config.num_experts_per_tok,
            expert_size=expert,
            ranks=self.machine.ranks,
            ranks_per_node=self.machine.ranks_per_node,
            forward_passes=self.exchanging_passes,
            links=links,
        )

    @property
    def throughput(self) -> Estimate | str:
        """Tokens a second of all ranks together; or why there is no estimate."""
        return estimate(
            Job(
                config=self.config,
                recipe=self.recipe,
                device=self.machine.device_name,
                cards=self.machine.ranks,
                layers_computed_again=any(map(any, self.recompute)),
                operations=self.operations,
                recomputed=self.recomputed,
                accumulation=self.accumulation,
                exchange=self.exchange,
            )
        )


def model_config(recipe: Recipe, root: Path = CHECKOUT) -> tuple[ModelConfig, str]:
    """The sizes of the recipe's model, and a sentence that says where they come from.

    Raises:
        RecipeError: the model is not on this machine and is none of the released ones.
        ConfigError: its config.json is none that can be trained.
    """
    path = recipe.model.path
    folder = resolve(path, root)
    if folder is not None:
        return ModelConfig.from_folder(folder), f"sizes from {folder / 'config.json'}"
    cached = try_to_load_from_cache(path, "config.json")
    if isinstance(cached, str):
        return ModelConfig.from_folder(Path(cached).parent), f"sizes from {cached}"
    if not path.rpartition("/")[2].startswith(("Qwen3-Coder-Next", "Qwen3-Next-80B-A3B")):
        raise RecipeError(
            f"{recipe.name}: model.path: '{path}' is not on this machine and its sizes are not known here; "
            "download it first (hf download), or give a folder"
        )
    config = ModelConfig.from_dict(json.loads(REFERENCE.read_text(encoding="utf-8")))
    return config, (
        f"{path} is not on this machine: sizes from the reference config;"
        " the checkpoint's own config.json decides at load"
    )


def plan(config: ModelConfig, recipe: Recipe, machine: Machine) -> Plan:
    """What `recipe` takes on `machine`.

    Raises:
        RecipeError: the ranks, the batch, the experts or the adapters do not go together.
    """
    made = _plan(config, recipe, machine)
    return replace(made, suggestion=_suggestion(made)) if made.fits is False else made


def _plan(config: ModelConfig, recipe: Recipe, machine: Machine) -> Plan:
    recipe.check_ranks(machine.ranks, config.num_experts)
    dense_adapters, expert_adapters = adapter_parameters(config, recipe)
    counts = config.parameter_counts()
    experts, dense = counts["experts"], sum(counts.values()) - counts["experts"]
    router = counts["router"] if recipe.router.train else 0
    if recipe.lora is None:
        trained_dense, trained_experts = dense - counts["router"] + router, experts
    else:
        trained_dense, trained_experts = dense_adapters + router, expert_adapters
    made = Plan(
        config=config,
        recipe=recipe,
        machine=machine,
        weight_bytes=weight_bytes(recipe, machine),
        accumulation=recipe.accumulation(machine.ranks),
        dense_adapters=dense_adapters,
        expert_adapters=expert_adapters,
        trained_dense=trained_dense,
        trained_experts=trained_experts,
        recompute=recompute.asked_for(config, recipe.train.recompute) or (ALL,) * config.num_hidden_layers,
        memory={},
        suggestion=None,
    )
    state = state_bytes.on_rank(made, dense, experts)

    def with_recompute(layers: tuple[Recompute, ...]) -> Plan:
        changed = replace(made, recompute=layers)
        return replace(changed, memory=state | working_bytes.on_rank(changed))

    room = made.room_bytes
    if "auto" in recipe.train.recompute and room is not None:

        def fits(layers: tuple[Recompute, ...]) -> bool:
            changed = with_recompute(layers)
            return changed.rank_bytes + working_bytes.uneven_load(changed) <= room

        return with_recompute(recompute.least(config, working_bytes.setting(made), fits))
    return with_recompute(made.recompute)


def weight_bytes(recipe: Recipe, machine: Machine) -> int:
    """Bytes of one weight: of the recipe's number format, or of what suits the machine."""
    auto = "float32" if machine.device_bytes is None else "bfloat16"
    return {"float32": 4, "bfloat16": 2}[auto if recipe.model.dtype == "auto" else recipe.model.dtype]


def _suggestion(made: Plan) -> str:
    """The least change that makes the run fit, or what it would fit on."""
    variants = _smaller(made)
    words, recipe = variants[-1] if variants else ("", made.recipe)
    offloaded = []
    if made.machine.device_bytes is not None and recipe.parallel.offload == "none":  # slower than all before
        moved = words + (" and " if words else "") + "parallel.offload: cpu"
        offloaded.append((moved, _changed(recipe, "parallel", offload="cpu")))
    for change, smaller in variants + offloaded:
        if _plan(made.config, smaller, made.machine).fits:
            return f"set {change}"
    ranks, experts = 2 * made.machine.ranks, made.config.num_experts
    while made.machine.device_bytes is not None and ranks <= experts:
        spread = _changed(recipe, "parallel", expert=ranks)
        spread = _changed(spread, "train", global_batch_tokens=spread.train.micro_batch_tokens * ranks)
        if experts % ranks == 0 and _plan(made.config, spread, replace(made.machine, ranks=ranks)).fits:
            others = " and ".join(word for word in words.split(" and ") if word and "parallel.expert" not in word)
            return f"use {ranks} such GPUs and set parallel.expert: {ranks}" + (f" and {others}" if others else "")
        ranks *= 2
    return "use more memory a rank: no setting of this recipe makes it fit"


def _smaller(made: Plan) -> list[tuple[str, Recipe]]:
    """Recipes that need less and less memory and mean the same training; what costs least time is changed first."""
    recipe, ranks = made.recipe, made.machine.ranks
    changed: dict[str, object] = {}
    variants: list[tuple[str, Recipe]] = []

    def change(section: str, key: str, value: object) -> None:
        nonlocal recipe
        recipe = _changed(recipe, section, **{key: value})
        changed[f"{section}.{key}"] = value
        words = (f"{name}: {' '.join(to) if isinstance(to, tuple) else to}" for name, to in changed.items())
        variants.append((" and ".join(words), recipe))

    if recipe.parallel.zero_stage < 2:
        change("parallel", "zero_stage", 2)
    for expert in range(recipe.parallel.expert + 1, ranks + 1):
        if ranks % expert == 0 and made.config.num_experts % expert == 0:
            change("parallel", "expert", expert)
    if not any(word in recipe.train.recompute for word in ("auto", "full")):
        change("train", "recompute", ("full",))
    while recipe.packs_per_micro_batch % 2 == 0:
        change("train", "micro_batch_tokens", recipe.train.micro_batch_tokens // 2)
    return variants


def _changed(recipe: Recipe, section: str, **update: object) -> Recipe:
    return recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=update)})
