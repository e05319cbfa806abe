"""The contenders of the LoRA step benchmark: one adapted model with the same parameters in this project and its peers.

The base peer is transformers with peft and torch's grouped matrix product for the experts, and on a GPU
flash-linear-attention and causal-conv1d. Variants add Liger's fused loss and norms, and the experts of Unsloth or
axolotl: their own code from their own packages, called through transformers' registry of expert implementations.

Parameters have the same names in every contender, so filling them by name makes all models equal.
"""

import importlib
import importlib.metadata
import importlib.util
import sys
import types
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from finetune.kernels.choose import choose, install
from finetune.kernels.trial import Place
from finetune.model.config import ModelConfig
from finetune.model.model import HybridMoEForCausalLM
from finetune.plan.planner import Plan, plan
from finetune.plan.recompute import described
from finetune.plan.working_memory import RUNTIME_DEVICE_BYTES
from finetune.plan.workload import FREE_FRACTION, GIB, Machine
from finetune.recipe.load import load_recipe
from finetune.recipe.paths import CHECKOUT
from finetune.training.lora import inject

RANK, ALPHA = 16, 32.0
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "in_proj_qkvz", "in_proj_ba", "out_proj")
NO_RECOMPUTE = "_no_recompute"  # suffix of a name: no activation is recomputed, where memory allows
FULL_RECOMPUTE = "_full_recompute"  # suffix, of this project only: every layer is recomputed, as by the peers
LEAN_GIB = 30  # memory for which this project plans otherwise: that of the leanest peer

# Widths of Qwen3-Next-80B-A3B and Qwen3-Coder-Next.
FULL: dict[str, Any] = {
    "model_type": "qwen3_next", "vocab_size": 151936, "hidden_size": 2048, "full_attention_interval": 4,
    "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256, "partial_rotary_factor": 0.25,
    "rope_theta": 5_000_000.0, "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128,
    "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "num_experts": 512, "num_experts_per_tok": 10,
    "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512, "intermediate_size": 5120,
    "norm_topk_prob": True, "max_position_embeddings": 262144, "rms_norm_eps": 1e-6, "hidden_act": "silu",
}  # fmt: skip


@dataclass(frozen=True)
class Contender:
    """A model ready to train, from any project."""

    model: nn.Module
    layers: nn.ModuleList  # for truncating the model
    loss: Callable[[Tensor], Tensor]  # token ids (batch, time) -> mean loss of the next token
    logits: Callable[[Tensor, Tensor], Tensor]  # ids, positions -> (batch, positions, vocabulary), without gradient
    autocast: Callable[[], AbstractContextManager[object]]  # around the forward pass
    about: str  # the kernels in use, with versions
    settle: Callable[[int, int], str] = lambda batch, time: ""  # before such batches; says what is recomputed


class MissingError(RuntimeError):
    """A package that a contender needs is not installed."""


def build(name: str, values: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Contender:
    """The contender of this name, with parameters not yet filled.

    Raises:
        MissingError: a package is not installed.
    """
    if name.startswith("nextune"):
        return _nextune(values, device, dtype, name.removeprefix("nextune"))
    recompute = not name.endswith(NO_RECOMPUTE)
    name = name.removesuffix(NO_RECOMPUTE)
    base, *parts = name.split("_liger")
    if base not in ("transformers_peft", "transformers_peft_fla"):
        raise ValueError(f"no contender is called {name}")
    return _transformers(values, device, dtype, recompute=recompute, fla=base.endswith("_fla"), extra=parts)


def _nextune(values: dict[str, Any], device: torch.device, dtype: torch.dtype, recompute: str) -> Contender:
    """The model as in `finetune.training.assembly`, without loading a checkpoint."""
    if recompute not in ("", FULL_RECOMPUTE, NO_RECOMPUTE):
        raise ValueError(f"no contender is called nextune{recompute}")
    with _built_on(device, dtype):
        model = HybridMoEForCausalLM(ModelConfig.from_dict(values))
    config = model.settings
    kernels = choose(experts="auto", layers="auto", mixers="auto", place=Place(config, device, dtype))
    install(model, kernels)
    model.recompute = recompute != NO_RECOMPUTE
    model.keep_router_logits = False
    inject(model, rank=RANK, alpha=ALPHA, dropout=0.0, targets=TARGETS, seed=0)
    model.train()

    def loss(ids: Tensor) -> Tensor:
        labels = torch.cat((ids[:, 1:], ids.new_full((len(ids), 1), -100)), dim=1)
        output = model(ids, torch.zeros_like(ids), labels=labels)
        assert output.loss_sum is not None
        return output.loss_sum / output.token_count

    def logits(ids: Tensor, positions: Tensor) -> Tensor:
        return model(ids, torch.zeros_like(ids)).logits[:, positions]

    def settle(batch: int, time: int) -> str:
        cut = first_layers(config, len(model.model.layers))
        if not recompute:
            # The plan keeps part of a GPU free and counts CUDA's own memory; the measured figures include neither.
            card = (LEAN_GIB * GIB + RUNTIME_DEVICE_BYTES) / (1 - FREE_FRACTION)
            model.recompute = planned(cut, batch, time, int(card)).recompute
        return f"again: {described(cut, model.recompute)}"

    return Contender(model, model.model.layers, loss, logits, nullcontext, "; ".join(kernels.said), settle)


def first_layers(config: ModelConfig, depth: int) -> ModelConfig:
    """The sizes of a model truncated to its first `depth` layers."""
    return replace(config, num_hidden_layers=depth, layer_types=config.layer_types[:depth])


def planned(config: ModelConfig, batch: int, time: int, device_bytes: int) -> Plan:
    """The plan of a LoRA run on one GPU with `device_bytes` of memory, in micro-batches of `batch` sequences."""
    count = batch * time
    sizes = (f"train.sequence_tokens={time}", f"train.micro_batch_tokens={count}", f"train.global_batch_tokens={count}")
    recipe = load_recipe(
        CHECKOUT / "recipes" / "code.yaml", [*sizes, "parallel.ranks=1", "parallel.expert=1"], check_paths=False
    )
    return plan(config, recipe, Machine(ranks=1, ranks_per_node=1, device_name="a GPU", device_bytes=device_bytes))


def _transformers(
    values: dict[str, Any], device: torch.device, dtype: torch.dtype, *, recompute: bool, fla: bool, extra: list[str]
) -> Contender:
    """transformers' model with peft's adapters, as in its Trainer: float32 adapters, the rest under autocast."""
    if fla:
        lift_refusal()
        _installed("causal_conv1d")
    modeling = importlib.import_module("transformers.models.qwen3_next.modeling_qwen3_next")
    peft = importlib.import_module("peft")
    if extra:
        _installed("liger_kernel")
        importlib.import_module("liger_kernel.transformers").apply_liger_kernel_to_qwen3_next(swiglu=False)
    config = modeling.Qwen3NextConfig(**values)
    config._experts_implementation = _experts(extra[0].removeprefix("_") if extra else "")
    with _built_on(device, dtype):
        model = modeling.Qwen3NextForCausalLM(config)
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    lora = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=list(TARGETS), bias="none")
    adapted = peft.get_peft_model(model, lora)
    adapted.train()
    found = {
        name.rpartition(".lora_A")[0].rpartition(".")[2] for name, p in adapted.named_parameters() if p.requires_grad
    }
    assert found - {""} == set(TARGETS), f"peft adapted {sorted(found)}"

    def autocast() -> AbstractContextManager[object]:
        return torch.autocast(device.type, torch.bfloat16) if dtype == torch.bfloat16 else nullcontext()

    def loss(ids: Tensor) -> Tensor:
        return adapted(input_ids=ids, labels=ids, use_cache=False).loss

    def logits(ids: Tensor, positions: Tensor) -> Tensor:
        return adapted(input_ids=ids, use_cache=False, logits_to_keep=positions).logits

    packages = (
        ["transformers", "peft"] + ["flash-linear-attention", "causal-conv1d"] * fla + ["liger-kernel"] * bool(extra)
    )
    about = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
    return Contender(
        adapted, model.model.layers, loss, logits, autocast, f"{about}, experts {config._experts_implementation}"
    )


def _experts(kind: str) -> str:
    """Register these experts with transformers; returns their name there."""
    if not kind:
        return "grouped_mm"
    if kind == "unsloth":
        # Its packages' __init__ imports the rest of Unsloth, which the experts do not use.
        bare_package("unsloth_zoo")
        bare_package("unsloth_zoo.temporary_patches")
        function = importlib.import_module("unsloth_zoo.temporary_patches.moe_utils").forward_moe_backend
    elif kind == "axolotl":
        bare_package("axolotl.integrations.kernels")
        module = importlib.import_module("axolotl.integrations.kernels.libs.scattermoe_lora.experts")
        function = module.scattermoe_experts_forward
    elif kind == "experts":
        liger = importlib.import_module("liger_kernel.ops.fused_moe").LigerFusedMoEFunction

        def function(self: Any, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
            return liger.apply(x, self.gate_up_proj, self.down_proj, experts.int(), weights)

    else:
        raise ValueError(f"no experts are called {kind}")
    importlib.import_module("transformers.integrations.moe").ALL_EXPERTS_FUNCTIONS.register(kind, function)
    return kind


def bare_package(name: str) -> None:
    """Make the submodules of a package importable without running its `__init__`."""
    parent, _, last = name.rpartition(".")
    if parent:
        folders = [f"{folder}/{last}" for folder in importlib.import_module(parent).__path__]
    else:
        spec = _installed(name)
        folders = list(spec.submodule_search_locations or [])
    package = types.ModuleType(name)
    package.__path__ = folders
    sys.modules[name] = package


def _installed(name: str) -> Any:
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise MissingError(f"{name} is not installed")
    return spec


def lift_refusal() -> None:
    """Let flash-linear-attention train on Hopper with Triton 3.4 to 3.7.0, which it refuses.

    The error it guards against did not occur on an H100 with Triton 3.6: gradients match the recurrence in float32 to
    9e-3. The comparison of losses would reveal it in any contender.
    """
    _installed("fla")
    importlib.import_module("fla.ops.common.chunk_o").TRITON_ABOVE_3_7_1 = True


@contextmanager
def _built_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Modules created inside have their parameters on this device and in this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def fill(model: nn.Module, *, zipf: bool = False, seed: int = 0) -> None:
    """Set every parameter to values that depend on its name only, equal in every contender, generated on its device.

    No parameter keeps a trivial initial value (norms are not the identity, decays are slow enough for the state to
    matter), so that every convention affects the loss. LoRA's B is zero: training starts at the base.

    Args:
        zipf: make routers prefer some experts, so that their load falls approximately as 1 / rank.
    """
    for name, parameter in model.named_parameters():
        name = name.removeprefix("base_model.model.").replace(".base_layer", "")
        generator = torch.Generator(parameter.device).manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
        last = name.split(".")[-2] if name.endswith(".weight") else name.rpartition(".")[2]
        if ".lora_B." in name:
            parameter.zero_()
        elif ".lora_A." in name:  # drawn in bfloat16, which all contenders can represent
            drawn = torch.empty(parameter.shape, dtype=torch.bfloat16, device=parameter.device)
            bound = parameter.shape[1] ** -0.5
            parameter.copy_(drawn.uniform_(-bound, bound, generator=generator))
        elif last == "A_log":
            parameter.uniform_(0.01, 1, generator=generator).log_()
        elif last == "dt_bias":
            parameter.normal_(-2, 1, generator=generator)
        elif parameter.ndim == 1:  # norms: DeltaNet's multiplies by its weight, the others by 1 + weight
            parameter.normal_(1.0 if name.endswith("linear_attn.norm.weight") else 0.0, 0.1, generator=generator)
        elif last in ("embed_tokens", "conv1d"):
            parameter.normal_(0, 1.0 if last == "embed_tokens" else 0.4, generator=generator)
        else:
            parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
        if zipf and last == "embed_tokens":
            parameter.add_(_direction(parameter))
        if zipf and name.endswith("mlp.gate.weight"):
            order = torch.randperm(len(parameter), generator=generator, device=parameter.device) + 1
            preference = -order.to(parameter.dtype).log() * 3 / parameter.shape[1]
            parameter.add_(preference.unsqueeze(1) * _direction(parameter))


def _direction(parameter: Tensor) -> Tensor:
    """A vector of signs added to every embedding and, scaled, to every router, for uneven load."""
    generator = torch.Generator(parameter.device).manual_seed(1)
    signs = torch.randint(0, 2, (parameter.shape[1],), generator=generator, device=parameter.device)
    return (2 * signs - 1).to(parameter.dtype)


def flops_per_token(values: dict[str, Any], layers: int, time: int) -> float:
    """Floating-point operations of a LoRA step for one token, without recompute.

    Counted are forward and input gradient of frozen matrices (4 for each parameter used), forward and backward of
    attention (half of time x time; backward costs 2.5 times forward), of the delta rule, and of the adapters.
    """
    config = ModelConfig.from_dict({**values, "num_hidden_layers": layers})
    hidden = config.hidden_size
    full = sum(kind == "full_attention" for kind in config.layer_types)
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    attention = ((hidden, 2 * queries), (hidden, keys), (hidden, keys), (queries, hidden))
    inner, heads = config.value_dim, config.linear_num_value_heads
    deltanet = ((hidden, 2 * config.key_dim + 2 * inner), (hidden, 2 * heads), (inner, hidden))
    experts = hidden * config.num_experts + 3 * hidden * (
        config.num_experts_per_tok * config.moe_intermediate_size + config.shared_expert_intermediate_size
    )
    used = layers * experts + hidden * config.vocab_size
    adapters = 0
    for shapes, count in ((attention, full), (deltanet, layers - full)):
        used += count * sum(inputs * outputs for inputs, outputs in shapes)
        adapters += count * RANK * sum(inputs + outputs for inputs, outputs in shapes)
    scores = 2 * time * queries  # forward, for the causal half
    # Forward of the delta rule in chunks of 64: three products with the state, four within a chunk.
    key, value = config.linear_key_head_dim, config.linear_value_head_dim
    rule = 2 * heads * (3 * key * value + 2 * 64 * (key + value))
    return 4 * used + full * 3.5 * scores + (layers - full) * 3 * rule + 6 * adapters
