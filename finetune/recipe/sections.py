"""The sections of a recipe: every setting, its type, its unit, its limits and what it does. Imports no torch.

`finetune/recipe/recipe.py` puts them together and reads a recipe file into them.
"""

from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from finetune.recipe.paths import path_problem

MixerTarget = Literal["q_proj", "k_proj", "v_proj", "o_proj", "in_proj_qkvz", "in_proj_ba", "out_proj"]
Target = Literal[MixerTarget, "shared_expert", "experts"]
TargetWord = Literal[Target, "all-linear"]
MIXER_TARGETS: tuple[MixerTarget, ...] = get_args(MixerTarget)

RecomputeWord = Literal["auto", "full", "none", "deltanet", "attention", "experts"]


def _words(choices: tuple[str, ...]) -> tuple[Any, ...]:
    """The annotations of a list of words, which may be written as its only one."""
    word: dict[str, Any] = {"enum": list(choices), "type": "string"}
    return (
        Field(min_length=1),
        BeforeValidator(lambda value: (value,) if isinstance(value, str) else value),
        WithJsonSchema({"anyOf": [{"items": word, "minItems": 1, "type": "array"}, word]}),
    )


Recomputed = Annotated[tuple[RecomputeWord, ...], *_words(get_args(RecomputeWord))]
Targets = Annotated[tuple[TargetWord, ...], *_words(get_args(TargetWord))]

Tokens = Annotated[int, Field(gt=0, json_schema_extra={"unit": "tokens"})]
Steps = Annotated[int, Field(gt=0, json_schema_extra={"unit": "steps"})]
StepsOrNever = Annotated[int, Field(ge=0, json_schema_extra={"unit": "steps"})]
Count = Annotated[int, Field(gt=0)]
Ranks = Annotated[int, Field(gt=0, le=2**16)]
Fraction = Annotated[float, Field(ge=0, lt=1, json_schema_extra={"unit": "fraction"})]
Coefficient = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1)]


def _possible(text: str) -> str:
    problem = path_problem(text)
    if problem is not None:
        raise PydanticCustomError("path", "{problem}", {"problem": problem})
    return text


PathText = Annotated[str, Field(min_length=1), AfterValidator(_possible)]


class Section(BaseModel):
    """What all sections share: exact types, no unknown keys, no change after reading."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, use_attribute_docstrings=True)


class Model(Section):
    """The model that is trained."""

    path: PathText
    """Folder of the checkpoint, or the hub id of one (Qwen/Qwen3-Coder-Next)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the weights; auto is bfloat16 on a GPU and float32 on a CPU."""
    init: Literal["pretrained", "random"] = "pretrained"
    """Where the weights come from: the checkpoint, or a seeded draw that reads only its config.json and tokenizer."""


class Source(Section):
    """One place that rows come from."""

    path: PathText
    """File or folder of rows, or a glob (rows/**/*.jsonl)."""
    format: Literal["auto", "chat", "sharegpt", "alpaca", "prompt_completion", "text"] = "auto"
    """Format of the rows; auto recognises it by their columns."""


class Data(Section):
    """Training data and held-out data."""

    train: Annotated[tuple[Source, ...], Field(min_length=1)]
    """Sources of the training rows: a list such as [{path: rows.jsonl}]."""
    eval: tuple[Source, ...] = ()
    """Sources of the held-out rows, likewise; no file may be in both."""
    packing: Literal["packed", "padded"] = "packed"
    """packed: several documents in a sequence, isolated from each other; padded: one document in a sequence."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """Action on a row that cannot be used: stop, or skip it; skipped rows are counted and reported."""
    over_long: Literal["drop", "stop"] = "drop"
    """Action on a conversation longer than train.sequence_tokens: drop it, or stop; text is split instead."""
    cache: PathText | None = None
    """Folder of tokenised data; null is .cache in output.dir."""


class Train(Section):
    """Length of the run, batch sizes, recomputation and evaluation."""

    steps: StepsOrNever = 0
    """Optimizer steps of the whole run; 0 if train.epochs is set."""
    epochs: Annotated[float, Field(ge=0, le=1e6, json_schema_extra={"unit": "epochs"})] = 0.0
    """Passes over the training data, in place of train.steps; 0.5 is half of the data. The number of steps is rounded
    up."""
    sequence_tokens: Annotated[int, Field(ge=2, le=2**24, json_schema_extra={"unit": "tokens"})] = 4096
    """Length of a training sequence, and the longest document."""
    micro_batch_tokens: Tokens = 4096
    """Tokens in one forward pass of one rank; a multiple of train.sequence_tokens."""
    global_batch_tokens: Tokens = 65536
    """Tokens of one optimizer step over all ranks and micro-batches, padding included."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the order of the data, the initial adapters and all other random numbers."""
    recompute: Recomputed = ("auto",)
    """Activations that are recomputed in the backward pass instead of stored: full (all; least memory), none (fastest,
    most memory), a list of deltanet, attention, experts, or auto (as little as memory allows, by the plan)."""
    eval_every_steps: StepsOrNever = 0
    """Interval of held-out evaluation; also before the first step and after the last, with 0 only then."""
    log_every_steps: Steps = 10
    """Interval of progress lines; the first and the last step always write one."""
    early_stopping_patience: Annotated[int, Field(ge=0, json_schema_extra={"unit": "evaluations"})] = 0
    """Consecutive evaluations without a lower held-out loss after which the run ends; 0 is never."""
    early_stopping_threshold: Coefficient = 0.0
    """Amount by which a held-out loss must be below the previous lowest to count as lower."""
    on_nan: Literal["stop", "skip"] = "stop"
    """Action on a step whose loss or gradient is not finite: stop, and store its batch in the run folder; or skip it
    without an update, and stop after five in a row."""


class Optim(Section):
    """The optimizer and its schedule."""

    name: Literal["adamw", "adam", "sgd", "adafactor", "adamw_8bit"] = "adamw"
    """AdamW with decoupled weight decay; Adam, whose decay is added to the gradient; SGD with optim.momentum;
    Adafactor, which stores sums of rows and columns instead of moments; all torch's. Or adamw_8bit, AdamW of
    bitsandbytes (an extra package): 8-bit moments for matrices of at least 4,096 numbers, a quarter of the memory; it
    needs parallel.zero_stage 0."""

    lr: Annotated[float, Field(gt=0, le=1)] = 1e-4
    """Peak learning rate."""
    warmup_steps: StepsOrNever = 0
    """Steps over which the learning rate rises linearly from 0 to its peak."""
    warmup_ratio: Fraction = 0.0
    """Warm-up as a fraction of the run's steps, rounded up; in place of optim.warmup_steps."""
    schedule: Literal["constant", "constant_with_warmup", "linear", "cosine", "wsd"] = "cosine"
    """Learning rate after warm-up: constant (which other tools call constant_with_warmup), linear or half-cosine decay
    to final_lr_fraction, or constant with a linear decay at the end (wsd: warm-up, stable, decay)."""
    decay_ratio: Annotated[float, Field(gt=0, le=1, json_schema_extra={"unit": "fraction"})] = 0.1
    """Length of the decay of schedule wsd, as a fraction of the run's steps, rounded up."""
    final_lr_fraction: Annotated[float, Field(ge=0, le=1, json_schema_extra={"unit": "fraction"})] = 0.1
    """Learning rate after the last step, as a fraction of its peak; not for a constant schedule."""
    weight_decay: Coefficient = 0.0
    """Weight decay of matrices; norms, biases and DeltaNet's decay rates have none."""
    beta1: Fraction = 0.9
    """Decay rate of the moving average of gradients."""
    beta2: Fraction = 0.95
    """Decay rate of the moving average of squared gradients."""
    momentum: Fraction = 0.9
    """Momentum of sgd; 0 is none."""
    eps: Annotated[float, Field(gt=0, lt=1)] = 1e-8
    """Term added to the denominator of the update of adamw, adamw_8bit and adam."""
    clip_norm: Coefficient = 1.0
    """Largest gradient norm, over all parameters and ranks; larger gradients are scaled to it. 0 is no clipping."""


class Lora(Section):
    """Low-rank adapters on a frozen base."""

    rank: Annotated[int, Field(gt=0, le=4096)] = 16
    """Rank of every adapter."""
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 32.0
    """Scale: the product of an adapter's factors is multiplied by alpha / rank."""
    use_rslora: bool = False
    """Rank-stabilised scale: alpha / sqrt(rank) in place of alpha / rank (arXiv 2312.03732)."""
    init_from: Text | None = None
    """Folder of an adapter in peft's form whose values the adapters start from. Rank, scale and layers must be the
    same; the optimizer state is new, and the data may differ."""
    dropout: Fraction = 0.0
    """Dropout probability of an adapter's inputs; not for the routed experts."""
    targets: Targets = MIXER_TARGETS
    """Layers that get an adapter: of attention (q_proj k_proj v_proj o_proj), of DeltaNet (in_proj_qkvz in_proj_ba
    out_proj), the shared expert (shared_expert), the routed experts (experts). all-linear is all of these that the
    model has, except the routed experts; [all-linear, experts] includes them."""


class Balance(Section):
    """The penalty on uneven load of the experts, per layer."""

    kind: Literal["global", "micro", "sequence"] = "global"
    """Tokens over which load is balanced: those of the whole step, of a micro-batch, or of each document."""
    coefficient: Coefficient = 0.0
    """Weight of the balance loss, added to the loss per token; 0 is off."""


class Router(Section):
    """The routers of the experts."""

    train: bool = False
    """Whether the router weights are trained, beside adapters or in full-parameter training."""
    balance: Balance = Balance()
    """The penalty on uneven load of the experts, per layer."""
    z_coefficient: Coefficient = 0.0
    """Weight of the router z-loss, a penalty on large router logits; 0 is off."""


class Parallel(Section):
    """Partition of experts, optimizer state and gradients over ranks."""

    ranks: Ranks = 1
    """Number of ranks on a machine without GPUs, where `plan` assumes it too; with GPUs, one rank a GPU is started."""
    expert: Ranks = 1
    """Expert parallel size: ranks over which one copy of the experts is partitioned. It must divide the number of ranks
    and the number of experts."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """What ZeRO partitions over the ranks: 0 nothing, 1 the optimizer state, 2 the gradients too; 3, the weights too,
    is refused, because parallel.expert partitions nearly all of them."""
    offload: Literal["none", "cpu", "nvme"] = "none"
    """Where the optimizer state is stored and updated: on the rank's device (none), in host memory, or on a disk."""
    offload_path: PathText | None = None
    """Folder on a fast local disk for parallel.offload nvme; empty again after the run."""


class Kernels(Section):
    """Implementation of each part of the model."""

    experts: Literal["auto", "fused", "grouped", "loop"] = "auto"
    """fused: our GPU kernels; grouped: torch's grouped matrix product; loop: one expert after another; auto: the first
    of these that runs and is correct on this machine."""
    layers: Literal["auto", "fused", "plain"] = "auto"
    """Norms, router, shared expert and loss: our kernels (fused) or plain torch; auto is fused on a GPU."""
    mixers: Literal["auto", "fused", "plain"] = "auto"
    """DeltaNet and attention between their projections: our kernels (fused) or plain torch; auto is fused on a GPU, and
    plain torch with our own backward passes on a CPU."""


class Monitor(Section):
    """Measures of routing, and Weights & Biases."""

    routing_every_steps: StepsOrNever = 10
    """Interval at which the load of every expert is recorded; 0 is never."""
    drift_every_steps: StepsOrNever = 0
    """Interval at which routing is compared with the frozen base on the same tokens (LoRA only); 0 is never."""
    probe_tokens: Tokens = 4096
    """Tokens on which drift is measured, rounded up to whole sequences."""
    wandb: Literal["offline", "online", "off"] = "offline"
    """Whether Weights & Biases records the run: in the run folder, on its server, or not at all."""
    project: Text = "nextune"
    """Project of the Weights & Biases run."""


class Checkpoint(Section):
    """Checkpoints: when they are written, which are kept, and where a run starts from."""

    every_steps: StepsOrNever = 100
    """Interval of checkpoints; one is always written after the last step, with 0 only then."""
    keep: Count = 2
    """Number of newest checkpoints that are kept."""
    resume_from: Text | None = None
    """Start of the run in place of its newest checkpoint: step-N or best, an earlier checkpoint of this run, to which
    it returns once; or the folder of another run or checkpoint, from whose weights, optimizer state and position in
    the data a new run starts."""
    keep_best: bool = False
    """Whether the checkpoint with the lowest held-out loss is kept too. An evaluation that finds a lower loss writes
    one; a few steps later if an earlier checkpoint is still being written."""


class Output(Section):
    """Where results are written."""

    dir: PathText = "runs"
    """Parent of the run folder (which is DIR/NAME); relative to the current folder."""
