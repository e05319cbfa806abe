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
    """What a row holds; auto tells by its columns."""


class Data(Section):
    """What is trained on, and what is only measured."""

    train: Annotated[tuple[Source, ...], Field(min_length=1)]
    """Sources of the training rows."""
    eval: tuple[Source, ...] = ()
    """Sources of the held-out rows."""
    packing: Literal["packed", "padded"] = "packed"
    """packed: many documents in a sequence, kept apart exactly; padded: one document in a sequence."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """What to do about a row that cannot be read; skipped rows are counted and reported."""
    over_long: Literal["drop", "stop"] = "drop"
    """What to do about a conversation longer than train.sequence_tokens; text is split instead."""
    cache: PathText | None = None
    """Folder of tokenised data; null is .cache in output.dir."""


class Train(Section):
    """How much is trained, and in what portions."""

    steps: StepsOrNever = 0
    """Optimizer steps of the whole run; 0 where train.epochs says how many."""
    epochs: Annotated[float, Field(ge=0, le=1e6, json_schema_extra={"unit": "epochs"})] = 0.0
    """Passes over the training data, in place of train.steps; 0.5 is half of it. The steps are as many as it takes for
    every sequence to be seen that often, rounded up."""
    sequence_tokens: Annotated[int, Field(ge=2, le=2**24, json_schema_extra={"unit": "tokens"})] = 4096
    """Length of a training sequence; no document reaches further."""
    micro_batch_tokens: Tokens = 4096
    """What one rank forwards at once: whole sequences."""
    global_batch_tokens: Tokens = 65536
    """What one optimizer step is taken on: all ranks and micro-batches, padding included."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Fixes the order of the data, the adapters and every random draw."""
    recompute: Recomputed = ("auto",)
    """What is computed again in the backward pass instead of kept, in every layer that has it: full (everything, which
    keeps almost nothing), none (fastest, much memory), or a list of deltanet, attention, experts; auto: as little as
    the plan finds memory for."""
    eval_every_steps: StepsOrNever = 0
    """How often the held-out loss is measured; always before the first step and after the last, 0 is only then."""
    log_every_steps: Steps = 10
    """How often a line of progress is written; the first and the last step always write one."""
    early_stopping_patience: Annotated[int, Field(ge=0, json_schema_extra={"unit": "evaluations"})] = 0
    """Evaluations in a row without a lower held-out loss after which the run ends; 0 is never."""
    early_stopping_threshold: Coefficient = 0.0
    """By how much a held-out loss must be below the lowest before to count as lower."""
    on_nan: Literal["stop", "skip"] = "stop"
    """What to do about a step whose loss or gradient is not finite: stop, and keep its batch in the run folder; or skip
    it, which changes nothing that trains, and stop when five come in a row."""


class Optim(Section):
    """The optimizer and its schedule."""

    name: Literal["adamw", "adam", "sgd", "adafactor", "adamw_8bit"] = "adamw"
    """AdamW with decoupled weight decay; Adam, whose decay is added to the gradient; SGD with optim.momentum;
    Adafactor, which keeps sums of rows and columns instead of moments; all torch's. Or adamw_8bit, AdamW of
    bitsandbytes (an extra package), which keeps the moments of matrices of at least 4,096 numbers in 8 bits, a quarter
    of their memory; it needs parallel.zero_stage 0."""

    lr: Annotated[float, Field(gt=0, le=1)] = 1e-4
    """Learning rate at its peak."""
    warmup_steps: StepsOrNever = 0
    """Steps over which the learning rate rises to its peak, in a straight line from 0."""
    warmup_ratio: Fraction = 0.0
    """The same as a fraction of the run's steps, rounded up; in place of optim.warmup_steps."""
    schedule: Literal["constant", "constant_with_warmup", "linear", "cosine", "wsd"] = "cosine"
    """How the learning rate goes on from its peak: stays there (constant, which other tools call constant_with_warmup),
    falls to final_lr_fraction in a straight line (linear) or along half a cosine (cosine), or stays and falls in a
    straight line at the end (wsd: warm-up, stable, decay)."""
    decay_ratio: Annotated[float, Field(gt=0, le=1, json_schema_extra={"unit": "fraction"})] = 0.1
    """Fraction of the run's steps, at its end and rounded up, in which schedule wsd lets the learning rate fall."""
    final_lr_fraction: Annotated[float, Field(ge=0, le=1, json_schema_extra={"unit": "fraction"})] = 0.1
    """Learning rate after the last step, as a fraction of its peak; not for a constant schedule."""
    weight_decay: Coefficient = 0.0
    """Decoupled decay of matrices towards zero; norms, biases and decay rates have none."""
    beta1: Fraction = 0.9
    """Memory of the gradient's mean."""
    beta2: Fraction = 0.95
    """Memory of the gradient's square."""
    momentum: Fraction = 0.9
    """Memory of the gradient's sum in sgd; 0 is none."""
    eps: Annotated[float, Field(gt=0, lt=1)] = 1e-8
    """Added to the denominator of the update; of adamw, adamw_8bit and adam."""
    clip_norm: Coefficient = 1.0
    """Largest norm of the whole gradient, over all ranks; 0 is no clipping."""


class Lora(Section):
    """Low-rank adapters on a frozen base."""

    rank: Annotated[int, Field(gt=0, le=4096)] = 16
    """Inner size of every adapter."""
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 32.0
    """Scale: an adapter adds alpha / rank times the product of its factors."""
    use_rslora: bool = False
    """Rank-stabilised scale: alpha / sqrt(rank) in place of alpha / rank (arXiv 2312.03732)."""
    init_from: Text | None = None
    """Folder of an adapter in peft's form that the adapters start from, in place of a draw; of the same rank, scale and
    layers. The optimizer starts anew, and the data may be other data."""
    dropout: Fraction = 0.0
    """Share of an adapter's inputs that is dropped in training; not for the routed experts."""
    targets: Targets = MIXER_TARGETS
    """Which layers: of attention (q_proj k_proj v_proj o_proj), of DeltaNet (in_proj_qkvz in_proj_ba out_proj), the
    shared expert (shared_expert), every routed expert (experts). all-linear is all of these that the model has but the
    routed experts, which are written beside it where they are meant: [all-linear, experts]."""


class Balance(Section):
    """The penalty on uneven load of the experts, per layer."""

    kind: Literal["global", "micro", "sequence"] = "global"
    """Over which tokens load is even: those of the whole step, of a micro-batch, or of each document."""
    coefficient: Coefficient = 0.0
    """Weight of the penalty beside the loss per token; 0 is off."""


class Router(Section):
    """The routers of the experts."""

    train: bool = False
    """Whether the router weights are trained, beside adapters or in full-parameter training."""
    balance: Balance = Balance()
    """The penalty on uneven load of the experts, per layer."""
    z_coefficient: Coefficient = 0.0
    """Weight of the penalty on large router logits; 0 is off."""


class Parallel(Section):
    """How the work is divided over processes."""

    ranks: Ranks = 1
    """Processes that are started where there is no GPU, and that `plan` assumes; with GPUs there is one for each."""
    expert: Ranks = 1
    """Ranks that share one copy of the experts; divides the ranks and the number of experts."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """What ZeRO divides over the ranks: 0 nothing, 1 the optimizer's state, 2 the gradients too; 3, the weights too, is
    refused: parallel.expert divides nearly all of them."""
    offload: Literal["none", "cpu", "nvme"] = "none"
    """Where the optimizer's state is kept and updated: on the rank's device, in host memory, or on a disk."""
    offload_path: PathText | None = None
    """Folder on a fast local disk for offload nvme; nothing stays in it after the run."""


class Kernels(Section):
    """Which form of a computation is used where there are several."""

    experts: Literal["auto", "fused", "grouped", "loop"] = "auto"
    """Kernels of our own for GPUs, torch's grouped matrix product, or one expert after the other; auto takes the first
    of them that runs and is right here."""
    layers: Literal["auto", "fused", "plain"] = "auto"
    """Norms, router, shared expert and loss in kernels of our own or in plain torch; auto is fused on a GPU."""
    mixers: Literal["auto", "fused", "plain"] = "auto"
    """DeltaNet and attention between their projections in kernels of our own or in plain torch; auto is fused on a GPU,
    and on a CPU plain torch with backward passes of its own."""


class Monitor(Section):
    """What is watched beside the loss."""

    routing_every_steps: StepsOrNever = 10
    """How often the load of every expert is recorded; 0 is never."""
    drift_every_steps: StepsOrNever = 0
    """How often routing is compared with that of the frozen base on the same tokens (LoRA only); 0 is never."""
    probe_tokens: Tokens = 4096
    """Tokens on which drift is measured, rounded up to whole sequences."""
    wandb: Literal["offline", "online", "off"] = "offline"
    """Whether Weights & Biases records the run: in the run folder, on its server, or not at all."""
    project: Text = "nextune"
    """Project of the Weights & Biases run."""


class Checkpoint(Section):
    """What a run can be continued from."""

    every_steps: StepsOrNever = 100
    """How often one is written; always after the last step, 0 is only then."""
    keep: Count = 2
    """How many are kept, the newest."""
    resume_from: Text | None = None
    """What the run starts from in place of its newest checkpoint: step-N or best, an earlier one of its own, which it
    goes back to once; or the folder of another run (or of one of its checkpoints), whose weights, optimizer state and
    place in the data a new run goes on from."""
    keep_best: bool = False
    """Whether the one with the lowest held-out loss is kept too; an evaluation that finds a lower loss writes one, a
    few steps later where the one before is still being written then."""


class Output(Section):
    """Where results go."""

    dir: PathText = "runs"
    """Folder that holds the run folder; relative to the current folder."""
