"""One Gated DeltaNet layer on one GPU, its input norm left out: forward, and forward with the gradient of its input.

Sizes of Qwen3-Next-80B-A3B (hidden 2048, 16 key heads and 32 value heads of 128), frozen weights in bfloat16. Every
implementation is first checked against the definition in float32 on a shorter sequence; then all are timed on the same
inputs. The peer is transformers' module, with flash-linear-attention and causal-conv1d where they are installed.

flash-linear-attention refuses its backward pass on Hopper with Triton 3.4 to 3.7.0. This benchmark overrides the flag
that this guard reads, reports that, and relies on the check against the definition.

    python -m benchmarks.deltanet_layer --out benchmarks/results/deltanet_layer.json
"""

import argparse
import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import milliseconds, write_results
from finetune.kernels.triton.delta_rule import gated_delta_rule
from finetune.kernels.triton.deltanet import prepare_fused
from finetune.kernels.triton.gated_norm import gated_norm_fused
from finetune.model.config import ModelConfig
from finetune.model.deltanet import GatedDeltaNet

CONFIG: dict[str, Any] = {
    "model_type": "qwen3_next",
    "vocab_size": 1024,
    "hidden_size": 2048,
    "num_hidden_layers": 1,
    "layer_types": ["linear_attention"],
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "partial_rotary_factor": 0.25,
    "rope_theta": 1e7,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "intermediate_size": 5120,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "max_position_embeddings": 262144,
    "initializer_range": 0.02,
}
SIZES = [(4, 4096), (1, 16384)]
CHECKED = (2, 320)  # batch and tokens of the check
BOUND = 3e-2  # bound on the relative error of output and gradient in bfloat16; a wrong kernel exceeds 1e-1
Layer = Callable[[Tensor], Tensor]


def definition() -> GatedDeltaNet:
    """A layer with random frozen weights of realistic size; some heads decay slowly and some quickly."""
    torch.manual_seed(0)
    layer = GatedDeltaNet(ModelConfig.from_dict(CONFIG))
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(False)
        if name == "A_log":
            parameter.uniform_(0.01, 1).log_()
        elif name == "dt_bias":
            parameter.normal_().sub_(2)
        elif name == "norm.weight":
            parameter.normal_(1, 0.1)
        else:
            parameter.normal_(std=0.4 if name == "conv1d.weight" else parameter.shape[-1] ** -0.5)
    return layer.cuda()


def ours(weights: dict[str, Tensor]) -> Layer:
    """The layer of this project with its fused kernels and the Triton delta rule."""
    layer = GatedDeltaNet(ModelConfig.from_dict(CONFIG)).cuda().bfloat16()
    layer.load_state_dict(weights)
    layer.requires_grad_(False)
    layer.prepare, layer.rule, layer.norm.compute = prepare_fused, gated_delta_rule, gated_norm_fused

    def run(x: Tensor) -> Tensor:
        return layer(x, torch.zeros(x.shape[:2], dtype=torch.long, device=x.device))

    return run


def in_plain_torch(weights: dict[str, Tensor]) -> Layer:
    """The definition in bfloat16."""
    layer = GatedDeltaNet(ModelConfig.from_dict(CONFIG)).cuda().bfloat16()
    layer.load_state_dict(weights)
    layer.requires_grad_(False)
    return lambda x: layer(x, torch.zeros(x.shape[:2], dtype=torch.long, device=x.device))


def transformers_layer(weights: dict[str, Tensor]) -> Layer:
    """transformers' module, which uses flash-linear-attention where it is installed."""
    lift_guard()
    peer = importlib.import_module("transformers.models.qwen3_next.modeling_qwen3_next")
    config = importlib.import_module("transformers").Qwen3NextConfig(**CONFIG, dtype=torch.bfloat16)
    layer: nn.Module = peer.Qwen3NextGatedDeltaNet(config, 0).cuda().bfloat16()
    layer.load_state_dict(weights)
    layer.requires_grad_(False)
    return layer


def lift_guard() -> None:
    module = importlib.import_module("fla.ops.common.chunk_o")
    if module.IS_NVIDIA_HOPPER and module.TRITON_ABOVE_3_4_0 and not module.TRITON_ABOVE_3_7_1:
        print("flash-linear-attention's guard against this Triton on Hopper is lifted; the check below decides")
        module.TRITON_ABOVE_3_7_1 = True  # type: ignore[attr-defined]


def peer_name() -> str:
    parts = [name for name in ("fla", "causal_conv1d") if importlib.util.find_spec(name)]
    return "_".join(["transformers", *parts])


def run_both(layer: Layer, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = layer(x)
    return y, torch.autograd.grad(y, x, gradient)[0]


def check(name: str, layer: Layer, exact: GatedDeltaNet) -> dict[str, float]:
    """Relative error of output and input gradient against the definition in float32.

    Raises:
        ArithmeticError: an error above `BOUND`.
    """
    x = torch.randn(*CHECKED, CONFIG["hidden_size"], device="cuda").bfloat16()
    gradient = torch.randn_like(x)
    segment_ids = torch.zeros(CHECKED, dtype=torch.long, device="cuda")
    expected = run_both(lambda x: exact(x, segment_ids), x.float(), gradient.float())
    errors = {
        key: float((found.float() - exactly).norm() / exactly.norm())
        for key, found, exactly in zip(("y", "dx"), run_both(layer, x, gradient), expected, strict=True)
    }
    print(f"{name}: relative error " + ", ".join(f"{key} {value:.1e}" for key, value in errors.items()), flush=True)
    if not max(errors.values()) <= BOUND:
        raise ArithmeticError(f"{name} is wrong: {errors}; bfloat16 explains {BOUND}")
    return errors


def time_one(layer: Layer, batch: int, time: int) -> dict[str, float]:
    torch.manual_seed(1)
    x = torch.randn(batch, time, CONFIG["hidden_size"], device="cuda").bfloat16()
    gradient = torch.randn_like(x)

    def forward() -> None:
        with torch.no_grad():
            layer(x)

    forward_ms, _ = milliseconds(forward)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both_ms, spread = milliseconds(lambda: run_both(layer, x, gradient))
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    return {"forward_ms": forward_ms, "both_ms": both_ms, "spread_ms": spread, "peak_gib": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", help="names of rows, such as nextune")
    options = parser.parse_args()
    exact = definition()
    weights = {name: tensor.bfloat16() for name, tensor in exact.state_dict().items()}
    exact.load_state_dict(weights)  # so that all implementations have the same weights
    rows = []
    for name, make in (("nextune", ours), (peer_name(), transformers_layer), ("nextune_plain_torch", in_plain_torch)):
        if options.only and name not in options.only:
            continue
        try:
            layer = make(weights)
            errors = check(name, layer, exact)
            for batch, time in SIZES:
                torch.cuda.empty_cache()
                row = {"name": name, "batch": batch, "time": time, "error": errors} | time_one(layer, batch, time)
                rows.append(row)
                write_results(options.out, {"rows": rows})  # written after every row, in case the run is interrupted
                print(
                    f"{name:32} {batch} x {time:5} forward {row['forward_ms']:6.2f} ms, with backward "
                    f"{row['both_ms']:6.2f} ± {row['spread_ms']:.2f} ms, {row['peak_gib']:.1f} GiB",
                    flush=True,
                )
        except Exception as error:  # a peer that does not run here is reported, and the others continue
            if name == "nextune":
                raise
            print(f"{name}: no further row, {type(error).__name__}: {error}", flush=True)


if __name__ == "__main__":
    main()
