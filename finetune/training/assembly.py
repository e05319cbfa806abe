"""Builds the parts of a run before its first step: model, adapters, data, engine.

Each rank checks its own inputs. `World.together` raises one rank's error on all ranks before the next collective, so
that a mistake ends the run with a message instead of a hang.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from accelerate import init_empty_weights

from data.dataset import Dataset, Known, open_known
from data.loader import EvaluationBatches, Loader, probe_batch
from data.packing import Batch
from data.show import amounts, describe
from data.sources import DataError
from data.tokenizer import Tokenizer, load_tokenizer
from finetune.checkpoint.layout import CheckpointError
from finetune.checkpoint.weights import load_weights
from finetune.distributed.expert_exchange import attach
from finetune.distributed.world import World
from finetune.engine import engine as engines
from finetune.engine.engine import ExpertEngine
from finetune.engine.zero import zeros_on_disk
from finetune.kernels.choose import KernelError, Kernels, choose, install
from finetune.kernels.trial import Place
from finetune.model.config import ModelConfig, Recompute
from finetune.model.model import PADDING, HybridMoEForCausalLM, initialise
from finetune.plan.adapter_targets import all_linear_sentence
from finetune.plan.planner import plan
from finetune.plan.recompute import asked_for, described
from finetune.plan.workload import GIB, Machine
from finetune.recipe.paths import expanded
from finetune.recipe.recipe import Recipe, RecipeError
from finetune.training.datasets import cache_of, datasets
from finetune.training.evaluation import to_device
from finetune.training.lora import AdapterError, inject
from finetune.training.router_loss import prove_reach, reads_logits

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """The parts of a run, on this rank's device."""

    engine: ExpertEngine
    model: HybridMoEForCausalLM
    loader: Loader
    train_packs: int  # sequences of the training data
    evaluation: Sequence[Batch]  # held-out micro-batches of this rank, read lazily
    probe: Batch  # this rank's part of the tokens whose routing is compared with the base model's
    adapted: list[str]  # modules with adapters; empty in full-parameter training
    data: dict[str, dict[str, int]]  # amounts of training and held-out data


def assemble(recipe: Recipe, folder: Path, world: World, say: Say, progress: Callable[[], None]) -> Assembly:
    """Build the parts of a run. Collective.

    Args:
        folder: of the base checkpoint.
        say: prints a sentence for the user, on rank 0 only.
        progress: called after each piece of work, and later before every block of every forward pass.
    """
    config = ModelConfig.from_folder(folder)
    train, held_out = _datasets_of_all(recipe, lambda: load_tokenizer(folder, config.vocab_size), world, progress)
    say(f"training data: {describe(train)}")
    if held_out is not None:
        say(f"held-out data: {describe(held_out)}")
    model = _model(recipe, config, folder, world, say, progress)
    if recipe.lora is not None and "all-linear" in recipe.lora.targets:
        say(all_linear_sentence(config, recipe.lora))
    adapted = _choose_what_trains(model, recipe, world, say)
    packs, seed = recipe.packs_per_micro_batch, recipe.train.seed
    probe_packs = min(len(train), -(-recipe.monitor.probe_tokens // recipe.train.sequence_tokens))
    probe = _part(probe_batch(train, packs=probe_packs, seed=seed), world)
    one_micro_batch = Batch(*(tensor[:packs] for tensor in probe))
    for name, norm in prove_reach(model, one_micro_batch, recipe.router, world).items():
        say(f"proved: the loss of {name} reaches what trains (gradient norm {norm:.3g})")

    if recipe.parallel.offload == "nvme" and recipe.parallel.offload_path:
        with world.together(RecipeError):  # tests write access; the full size is allocated later
            zeros_on_disk(expanded(recipe.parallel.offload_path), torch.empty(1))
    accumulation = recipe.accumulation(world.size)
    loader = Loader(
        train,
        packs_per_micro_batch=packs,
        micro_batches_per_step=accumulation,
        rank=world.rank,
        ranks=world.size,
        seed=seed,
    )
    return Assembly(
        engine=engines.start(model, recipe, world, accumulation=accumulation),
        model=model,
        loader=loader,
        train_packs=len(train),
        evaluation=[]
        if held_out is None
        else EvaluationBatches(held_out, packs_per_micro_batch=packs, rank=world.rank, ranks=world.size),
        probe=probe,
        adapted=adapted,
        data={"train": amounts(train), **({"eval": amounts(held_out)} if held_out is not None else {})},
    )


def _check_amount(train: Dataset, recipe: Recipe) -> None:
    packs = recipe.train.global_batch_tokens // recipe.train.sequence_tokens
    if len(train) < packs:
        raise DataError(
            f"data.train: fills {len(train):,} sequences of {recipe.train.sequence_tokens:,} tokens, but one optimizer"
            f" step takes {packs:,}; lower train.global_batch_tokens or train.sequence_tokens, or add data"
        )


def _choose_what_trains(model: HybridMoEForCausalLM, recipe: Recipe, world: World, say: Say) -> list[str]:
    """Inject adapters and freeze what does not train; return the names of the adapted modules."""
    adapted = []
    with world.together(AdapterError):
        if recipe.lora is not None:
            lora = recipe.lora
            adapted = inject(
                model,
                rank=lora.rank,
                alpha=lora.alpha,
                dropout=lora.dropout,
                targets=lora.targets,
                seed=recipe.train.seed,
                rslora=lora.use_rslora,
            )
    for name, parameter in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            parameter.requires_grad_(recipe.router.train)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    say(
        f"training {sum(p.numel() for p in trained):,} parameters on this rank in {len(trained)} tensors"
        + (f": adapters on {len(adapted)} modules ({_counted(adapted)})" if adapted else "")
    )
    return adapted


def dtype_of(recipe: Recipe, device: torch.device) -> torch.dtype:
    """Dtype of the weights: the recipe's; for `auto`, bfloat16 on a GPU and float32 on the CPU."""
    if recipe.model.dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[recipe.model.dtype]
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _datasets_of_all(
    recipe: Recipe, tokenizer: Callable[[], Tokenizer], world: World, progress: Callable[[], None]
) -> tuple[Dataset, Dataset | None]:
    """Open training and held-out data on every rank. Collective.

    Rank 0 reads the sources, the first rank of every other host builds or verifies its cache, the others open it.
    Bad data is therefore reported after one pass over it, and a host hashes nothing twice.
    """
    found: list[Known | None] = [None, None]
    with world.together(DataError):
        if world.is_main:
            found = [made.known if made else None for made in datasets(recipe, tokenizer(), (None, None), progress)]
    found = cast(list[Known | None], world.gather(found)[0])
    with world.together(DataError):
        if world.leads_host and not world.is_main:  # on a shared disk this only verifies rank 0's cache
            datasets(recipe, tokenizer(), found, progress)
    with world.together(DataError):
        train, held_out = (open_known(cache_of(recipe), known) if known else None for known in found)
        assert train is not None, "there is training data, or rank 0 has said why not"
        _check_amount(train, recipe)
    return train, held_out


def _model(
    recipe: Recipe, config: ModelConfig, folder: Path, world: World, say: Say, progress: Callable[[], None]
) -> HybridMoEForCausalLM:
    dtype, room = dtype_of(recipe, world.device), world.free_memory()
    with init_empty_weights(include_buffers=True):  # with buffers excluded, it would untie the head
        model = HybridMoEForCausalLM(config, world.experts(config.num_experts))
    with world.together(CheckpointError, KernelError, RecipeError):
        kernels = choose(
            experts=recipe.kernels.experts,
            layers=recipe.kernels.layers,
            mixers=recipe.kernels.mixers,
            place=Place(config, world.device, dtype),
            progress=progress,
        )
        if recipe.model.init == "pretrained":
            load_weights(model, folder, dtype, world.device, say, progress=progress)
        else:
            model.to_empty(device=world.device).cast(dtype)
            model.tie()
            initialise(model, recipe.train.seed)
    install(model, kernels)
    for block in model.model.blocks:  # every forward pass runs them, also evaluation and recomputation
        block.register_forward_pre_hook(lambda *_: progress())
    if world.expert_group is not None:
        attach(model, world.expert_group)
    chosen, why = _recompute(recipe, config, kernels, world, room)
    model.recompute = chosen
    model.keep_router_logits = reads_logits(recipe.router)
    say(
        f"{sum(config.parameter_counts().values()):,} parameters, "
        + (f"weights from {folder}" if recipe.model.init == "pretrained" else f"drawn with seed {recipe.train.seed}")
        + f", {str(dtype).removeprefix('torch.')} on {world.device}; {len(model.local_experts)} of {config.num_experts}"
        f" experts a layer on each rank"
    )
    for sentence in (*kernels.said, f"computed again in the backward pass: {described(config, chosen)}, {why}"):
        say(sentence)
    return model


def _recompute(
    recipe: Recipe, config: ModelConfig, kernels: Kernels, world: World, room: int
) -> tuple[tuple[Recompute, ...], str]:
    """Choose what every layer recomputes in the backward pass, the same on all ranks; return it with the reason.

    Communicates.

    Args:
        room: bytes available on every rank, model included.
    """
    asked = asked_for(config, recipe.train.recompute)
    if asked is not None:
        return asked, "as the recipe asks"
    on_gpu = world.device.type == "cuda"
    machine = Machine(
        ranks=world.size,
        ranks_per_node=1,  # `room` is the memory of one rank
        device_name=str(world.device),
        device_bytes=room if on_gpu else None,
        host_bytes=None if on_gpu else room,
    )
    forms = recipe.kernels.model_copy(update=kernels.names)
    made = plan(config, recipe.model_copy(update={"kernels": forms}), machine)
    # Plans differ where a kernel is available on some cards only. What any rank recomputes, all ranks recompute.
    counts = world.sum(torch.tensor(made.recompute, dtype=torch.int32, device=world.device))
    agreed = tuple(Recompute(mixer > 0, experts > 0) for mixer, experts in counts.tolist())
    return agreed, f"as the plan of {made.rank_bytes / GIB:.1f} in {(made.work.room_bytes or 0) / GIB:.1f} GiB allows"


def _part(batch: Batch, world: World) -> Batch:
    """Select the packs of this rank, after padding packs that give every rank the same number."""
    short = -batch.input_ids.shape[0] % world.size
    fills = {"input_ids": 0, "labels": -100, "segment_ids": PADDING}
    padded = [
        torch.cat((tensor, tensor.new_full((short, tensor.shape[1]), fills[name])))
        for name, tensor in batch._asdict().items()
    ]
    return to_device(Batch(*(tensor[world.rank :: world.size] for tensor in padded)), world.device)


def _counted(names: list[str]) -> str:
    kinds = [name.rpartition(".")[2] for name in names]
    return ", ".join(f"{kind} {kinds.count(kind)}" for kind in dict.fromkeys(kinds))
