"""Estimates memory of every rank by component, host memory, disk, operations and time before a run starts.

The inputs are ModelConfig, Recipe and a description of the machine. Trainable parameters are counted exactly,
activations from the operations of `model/`. The report states every assumption. Imports no torch.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from finetune.model.config import ALL, ModelConfig, Recompute
from finetune.plan import optimizer_state, recompute
from finetune.plan import state_memory as state_bytes
from finetune.plan import working_memory as working_bytes
from finetune.plan.activations import FLOAT32, gathers
from finetune.plan.exchange import NVLINK_GBIT, Exchange, exchange
from finetune.plan.throughput import REFERENCE, Estimate, Job, estimate
from finetune.plan.workload import FREE_FRACTION, Machine, Workload, workload
from finetune.recipe.paths import CHECKOUT, resolve
from finetune.recipe.recipe import Recipe, RecipeError


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The needs of one run. Memory is that of the rank that needs most."""

    work: Workload
    recompute: tuple[Recompute, ...]  # of every layer
    memory: dict[str, int]  # bytes by component
    suggestion: str | None = None  # change that makes the run fit, if it does not fit

    @property
    def rank_bytes(self) -> int:
        """Bytes of one rank, runtime included."""
        return sum(self.memory.values())

    @property
    def offload_disk_bytes(self) -> int:
        """Disk bytes of one node for the offloaded optimizer state."""
        on_disk = self.work.recipe.parallel.offload == "nvme"
        kept = FLOAT32 * (1 + optimizer_state.moments(self.work.recipe.optim))
        return on_disk * kept * self.work.shard * self.work.machine.ranks_here

    @property
    def offload_host_bytes(self) -> int:
        """Host bytes of one node for the offloaded optimizer state; 0 without GPUs."""
        if self.work.machine.device_bytes is None:
            return 0  # counted in the memory of the ranks
        return state_bytes.offloaded(self.work) * self.work.machine.ranks_here

    @property
    def host_fits(self) -> bool | None:
        """Whether the offloaded state fits in a node's memory; None if that is unknown."""
        if self.work.machine.host_bytes is None:
            return None
        return self.offload_host_bytes <= self.work.machine.host_bytes * (1 - FREE_FRACTION)

    @property
    def fits(self) -> bool | None:
        """Whether the run fits in the memory of ranks and nodes; None if the memory of a rank is unknown."""
        if self.work.room_bytes is None:
            return None
        return self.rank_bytes <= self.work.room_bytes and self.host_fits is not False

    @property
    def host_load_bytes(self) -> int:
        """Host bytes of one node while weights are read, one stored tensor at a time on each rank."""
        ranks = self.work.machine.ranks_here
        held = 0 if self.work.machine.device_bytes is not None else self.rank_bytes - working_bytes.RUNTIME_HOST_BYTES
        return ranks * (held + state_bytes.largest_stored(self.work.config) + working_bytes.RUNTIME_HOST_BYTES)

    @property
    def host_save_bytes(self) -> int:
        """Host memory of the rank that stores most of a checkpoint while it is written."""
        expert = self.work.recipe.parallel.expert
        trained = self.work.trained_dense + self.work.trained_experts // expert
        return FLOAT32 * trained + optimizer_state.state_bytes(self.work, trained, expert=expert)

    @property
    def checkpoint_bytes(self) -> int:
        """One checkpoint: float32 values of what trains, and what the optimizer keeps about them."""
        return FLOAT32 * self.work.trained + optimizer_state.state_bytes(self.work, self.work.trained, expert=1)

    @property
    def checkpoints_bytes(self) -> int:
        """Disk bytes for the kept checkpoints, the best one, and the one being written."""
        checkpoint = self.work.recipe.checkpoint
        return (checkpoint.keep + checkpoint.keep_best + 1) * self.checkpoint_bytes

    @property
    def merged_bytes(self) -> int:
        """Disk bytes of the merged export."""
        return state_bytes.STORED_BYTES * sum(self.work.config.parameter_counts().values())

    @property
    def recomputed(self) -> float:
        """Operations per token of recomputation, and of the forward pass that counts load before the step."""
        skips_down = gathers(working_bytes.setting(self.work))
        return (
            self.work.operations_of(self.recompute, skips_down) + self.work.counts_ahead * self.work.forward_operations
        )

    @property
    def recomputed_share(self) -> float:
        """Recomputed operations as a fraction of those with `train.recompute: full`."""
        return self.work.operations_of(self.recompute) / self.work.operations_of(
            (ALL,) * self.work.config.num_hidden_layers
        )

    @property
    def exchanging_passes(self) -> float:
        """Forward passes that exchange rows, mean over MoE layers: one, and those of `recomputed`."""
        again = sum(self.recompute[layer].experts for layer in self.work.config.moe_layers)
        return 1 + again / max(1, len(self.work.config.moe_layers)) + self.work.counts_ahead

    @property
    def exchange(self) -> Exchange | None:
        """The exchange between expert-parallel ranks; None without expert parallelism."""
        config, train, expert = self.work.config, self.work.recipe.train, self.work.recipe.parallel.expert
        if expert == 1:
            return None
        name, links = self.work.machine.device_name, self.work.machine.links
        if links.node_gbit is None and ("H100" in name or "H200" in name) and "PCIe" not in name:
            links = replace(links, node_gbit=NVLINK_GBIT)
        return exchange(
            layers=len(config.moe_layers),
            micro_batches=self.work.accumulation,
            tokens=train.micro_batch_tokens,
            hidden=config.hidden_size,
            weight_bytes=self.work.weight_bytes,
            num_experts=config.num_experts,
            experts_per_token=config.num_experts_per_tok,
            expert_size=expert,
            ranks=self.work.machine.ranks,
            ranks_per_node=self.work.machine.ranks_per_node,
            forward_passes=self.exchanging_passes,
            links=links,
        )

    @property
    def throughput(self) -> Estimate | str:
        """Tokens per second of all ranks together, or the reason why there is no estimate."""
        return estimate(
            Job(
                config=self.work.config,
                recipe=self.work.recipe,
                device=self.work.machine.device_name,
                cards=self.work.machine.ranks,
                layers_computed_again=any(map(any, self.recompute)),
                operations=self.work.operations,
                recomputed=self.recomputed,
                accumulation=self.work.accumulation,
                exchange=self.exchange,
            )
        )


def model_config(recipe: Recipe, root: Path = CHECKOUT) -> tuple[ModelConfig, str]:
    """Find the sizes of the recipe's model; return them and a sentence that names their source.

    Raises:
        RecipeError: the model is not on this machine and is not a released one.
        ConfigError: its config.json describes a model that cannot be trained here.
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
    """Plan `recipe` on `machine`.

    Raises:
        RecipeError: ranks, batch, experts or adapters are not compatible.
    """
    made = _plan(config, recipe, machine)
    return replace(made, suggestion=_suggestion(made)) if made.fits is False else made


def _plan(config: ModelConfig, recipe: Recipe, machine: Machine) -> Plan:
    work = workload(config, recipe, machine)
    state = state_bytes.on_rank(work)

    def with_recompute(layers: tuple[Recompute, ...]) -> Plan:
        return Plan(work=work, recompute=layers, memory=state | working_bytes.on_rank(work, layers))

    def fits(layers: tuple[Recompute, ...]) -> bool:
        assert work.room_bytes is not None
        return with_recompute(layers).rank_bytes + working_bytes.uneven_load(work, layers) <= work.room_bytes

    if "auto" in recipe.train.recompute and work.room_bytes is not None:
        return with_recompute(recompute.least(config, working_bytes.setting(work), fits))
    asked = recompute.asked_for(config, recipe.train.recompute)
    return with_recompute(asked or (ALL,) * config.num_hidden_layers)


def _suggestion(made: Plan) -> str:
    """The cheapest change of settings that makes the run fit, or else how many GPUs it needs."""
    variants = _smaller(made)
    words, recipe = variants[-1] if variants else ("", made.work.recipe)
    offloaded = []
    if made.work.machine.device_bytes is not None and recipe.parallel.offload == "none":  # the slowest change
        moved = words + (" and " if words else "") + "parallel.offload: cpu"
        offloaded.append((moved, _changed(recipe, "parallel", offload="cpu")))
    for change, smaller in variants + offloaded:
        if _plan(made.work.config, smaller, made.work.machine).fits:
            return f"set {change}"
    ranks, experts = 2 * made.work.machine.ranks, made.work.config.num_experts
    while made.work.machine.device_bytes is not None and ranks <= experts:
        spread = _changed(recipe, "parallel", expert=ranks)
        spread = _changed(spread, "train", global_batch_tokens=spread.train.micro_batch_tokens * ranks)
        if experts % ranks == 0 and _plan(made.work.config, spread, replace(made.work.machine, ranks=ranks)).fits:
            others = " and ".join(word for word in words.split(" and ") if word and "parallel.expert" not in word)
            return f"use {ranks} such GPUs and set parallel.expert: {ranks}" + (f" and {others}" if others else "")
        ranks *= 2
    return "use more memory a rank: no setting of this recipe makes it fit"


def _smaller(made: Plan) -> list[tuple[str, Recipe]]:
    """Recipes of the same training that need less and less memory. Changes that cost least time come first."""
    recipe, ranks = made.work.recipe, made.work.machine.ranks
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
        if ranks % expert == 0 and made.work.config.num_experts % expert == 0:
            change("parallel", "expert", expert)
    if not any(word in recipe.train.recompute for word in ("auto", "full")):
        change("train", "recompute", ("full",))
    while recipe.packs_per_micro_batch % 2 == 0:
        change("train", "micro_batch_tokens", recipe.train.micro_batch_tokens // 2)
    return variants


def _changed(recipe: Recipe, section: str, **update: object) -> Recipe:
    return recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=update)})
