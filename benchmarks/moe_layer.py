"""Routed experts of one frozen layer on one GPU: forward, and with the gradients of input and routing weights.

Every implementation is first checked against float64 on a smaller layer. Then all are timed on the same inputs, at the
sizes of Qwen3-Next-80B-A3B (512 experts, 10 for each token, hidden 2048, width 512), with experts chosen uniformly and
with Zipf-distributed load. A peer that is not installed has no row.

    python -m benchmarks.moe_layer --out benchmarks/results/moe_layer.json
"""

import argparse
import importlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.lora_models import MissingError, bare_package
from benchmarks.measure import milliseconds, write_results
from finetune.kernels.torch.experts import experts_grouped
from finetune.kernels.triton import fused_experts
from finetune.model.moe import Routing, exchange_locally, experts_in_a_loop

EXPERTS, TOP_K, HIDDEN, WIDTH = 512, 10, 2048, 512
Implementation = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]  # x, experts, weights, gate_up, down


def routing_of(experts: Tensor, weights: Tensor, count: int) -> Routing:
    rows = experts.new_zeros(count).scatter_add_(0, experts.flatten(), torch.ones_like(experts.flatten()))
    unused = weights.new_empty(count)
    return Routing(experts, weights, rows, unused, unused[0], None)


def ours(x: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    return fused_experts.moe_fused(x, routing_of(experts, weights, len(gate_up)), gate_up, down, None, None)


def torch_grouped(x: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Sort, two grouped matrix products of torch, weighted sum: this project without its own kernels."""
    rows, rows_per_expert, restore = exchange_locally(x, routing_of(experts, weights, len(gate_up)))()
    return restore(experts_grouped(rows, rows_per_expert, gate_up, down))


def transformers_grouped() -> Implementation:
    """transformers' default experts on a GPU."""
    module = importlib.import_module("transformers.integrations.moe")

    def run(x: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        layer = SimpleNamespace(
            num_experts=len(gate_up), gate_up_proj=gate_up, down_proj=down, act_fn=F.silu, has_bias=False,
            is_transposed=False, has_gate=True, is_concatenated=True,
            _apply_gate=lambda h: F.silu(h.chunk(2, dim=-1)[0]) * h.chunk(2, dim=-1)[1],
        )  # fmt: skip
        return module.grouped_mm_experts_forward(layer, x, experts, weights)

    return run


def liger() -> Implementation:
    """Liger's fused experts, which also compute the gradient of the expert weights."""
    function = importlib.import_module("liger_kernel.ops.fused_moe").LigerFusedMoEFunction

    def run(x: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return function.apply(x, gate_up, down, experts.int(), weights)

    return run


def axolotl() -> Implementation:
    """axolotl's scattermoe kernels, which also compute the gradient of the expert weights."""
    bare_package("axolotl.integrations.kernels")  # without importing the rest of axolotl
    module = importlib.import_module("axolotl.integrations.kernels.libs.scattermoe_lora.parallel_experts")

    def run(x: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        ordered, slots, ends = module.flatten_sort_count(experts, len(gate_up))
        k = experts.shape[1]
        both = module.parallel_linear(
            x, gate_up.transpose(1, 2), k, ordered, slots, ends, grouped_in=False, grouped_out=True
        )
        gate, up = both.chunk(2, dim=-1)
        return module.parallel_linear(
            F.silu(gate) * up, down.transpose(1, 2), 1, ordered, slots, ends,
            grouped_in=True, grouped_out=False, gates=weights,
        )  # fmt: skip

    return run


def implementations() -> dict[str, Implementation]:
    found: dict[str, Implementation] = {"nextune": ours, "torch_grouped_mm": torch_grouped}
    for name, make in (("transformers_grouped_mm", transformers_grouped), ("liger", liger), ("axolotl", axolotl)):
        try:
            found[name] = make()
        except (ImportError, MissingError) as error:
            print(f"{name}: no row, {error}")
    return found


def inputs(
    tokens: int, experts: int, top_k: int, hidden: int, width: int, *, zipf: bool, seed: int = 0
) -> tuple[Tensor, ...]:
    """A random layer and tokens in bfloat16; expert load is uniform, or proportional to 1 / rank."""
    torch.manual_seed(seed)
    shares = 1 / torch.arange(1, experts + 1) if zipf else torch.ones(experts)
    chosen = torch.multinomial(shares[torch.randperm(experts)].expand(tokens, -1), top_k).cuda()
    weights = torch.rand(tokens, top_k, device="cuda")
    weights = (weights / weights.sum(1, keepdim=True)).bfloat16()
    x = torch.randn(tokens, hidden, device="cuda").bfloat16()
    gate_up = (torch.randn(experts, 2 * width, hidden, device="cuda") / hidden**0.5).bfloat16()
    down = (torch.randn(experts, hidden, width, device="cuda") / width**0.5).bfloat16()
    return x.requires_grad_(), chosen, weights.requires_grad_(), gate_up, down


def check(name: str, run: Implementation) -> dict[str, float]:
    """Relative errors of output and both gradients against float64, the larger of the two routings."""
    worst = {"y": 0.0, "dx": 0.0, "dw": 0.0}
    for zipf in (False, True):
        x, chosen, weights, gate_up, down = inputs(1024, 64, TOP_K, HIDDEN, WIDTH, zipf=zipf, seed=1)
        gradient = torch.randn_like(x)
        found = run(x, chosen, weights, gate_up, down)
        found = (found, *torch.autograd.grad(found, (x, weights), gradient))
        exact = [t.detach().double().requires_grad_(t.requires_grad) for t in (x, weights, gate_up, down)]
        rows, counts, restore = exchange_locally(exact[0], routing_of(chosen, exact[1], 64))()
        y = restore(experts_in_a_loop(rows, counts, exact[2], exact[3]))
        expected = (y, *torch.autograd.grad(y, exact[:2], gradient.double()))
        for key, it, exactly in zip(worst, found, expected, strict=True):
            it, exactly = it.detach().double(), exactly.detach()
            worst[key] = max(worst[key], float((it - exactly).norm() / exactly.norm()))
    print(f"{name}: relative error " + ", ".join(f"{key} {value:.1e}" for key, value in worst.items()), flush=True)
    return worst


def time_one(run: Implementation, tokens: int, *, zipf: bool) -> dict[str, float]:
    x, chosen, weights, gate_up, down = inputs(tokens, EXPERTS, TOP_K, HIDDEN, WIDTH, zipf=zipf)
    gradient = torch.randn_like(x)

    def forward() -> None:
        with torch.no_grad():
            run(x, chosen, weights, gate_up, down)

    def both() -> None:
        torch.autograd.grad(run(x, chosen, weights, gate_up, down), (x, weights), gradient)

    forward_ms, _ = milliseconds(forward)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both_ms, spread = milliseconds(both)
    return {
        "forward_ms": forward_ms,
        "both_ms": both_ms,
        "spread_ms": spread,
        "peak_gib": (torch.cuda.max_memory_allocated() - before) / 2**30,
        "tflops": 12 * tokens * TOP_K * HIDDEN * WIDTH / both_ms / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384, 32768])
    parser.add_argument("--only", nargs="+")
    options = parser.parse_args()
    rows = []
    for name, run in implementations().items():
        if options.only and name not in options.only:
            continue
        try:
            errors = check(name, run)
        except Exception as error:  # a peer that does not run here is reported, and the others continue
            if name == "nextune":
                raise
            print(f"{name}: no row, {type(error).__name__}: {error}")
            continue
        for tokens in options.tokens:
            for zipf in (False, True):
                torch.cuda.empty_cache()
                row = {"name": name, "tokens": tokens, "routing": "zipf" if zipf else "uniform", "error": errors}
                row |= time_one(run, tokens, zipf=zipf)
                rows.append(row)
                write_results(options.out, {"rows": rows})  # written after every row, in case the run is interrupted
                print(
                    f"{name:24} {tokens:6} {row['routing']:8} forward {row['forward_ms']:6.2f} ms, with backward "
                    f"{row['both_ms']:6.2f} ± {row['spread_ms']:.2f} ms, {row['tflops']:4.0f} TFLOP/s, "
                    f"{row['peak_gib']:.1f} GiB",
                    flush=True,
                )


if __name__ == "__main__":
    main()
