"""The gated delta rule at the sizes of Qwen3-Next (16 key heads, 32 value heads, 128 wide), bfloat16, on one GPU.

Every gradient is first checked against the definition in float32, for weak and strong decays, one document and several.
Then forward, and forward with backward, are timed for 4 x 4,096 and 1 x 16,384 tokens. flash-linear-attention has a row
if it is installed and its backward pass runs on this GPU.

    python -m benchmarks.delta_rule --out benchmarks/results/delta_rule.json
"""

import argparse
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import milliseconds, write_results
from finetune.kernels.triton.delta_rule import gated_delta_rule
from finetune.model.delta_rule import chunked_gated_delta_rule
from finetune.model.deltanet import l2_normalize

KEY_HEADS, VALUE_HEADS, DIM = 16, 32, 128
SHAPES = ((4, 4096), (1, 16384))
LIMITS = {"log_decay": 1e-2}  # relative error in bfloat16; 6e-3 for all others
Implementation = Callable[..., Tensor]


def inputs(
    batch: int, time: int, *, decay: float, documents: int, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Any]:
    """Random inputs of the rule; log decays are uniform in [-decay, 0]."""
    tensors = {
        "query": l2_normalize(torch.randn(batch, time, KEY_HEADS, DIM, device="cuda")).to(dtype),
        "key": l2_normalize(torch.randn(batch, time, KEY_HEADS, DIM, device="cuda")).to(dtype),
        "value": torch.randn(batch, time, VALUE_HEADS, DIM, device="cuda").to(dtype),
        "log_decay": -decay * torch.rand(batch, time, VALUE_HEADS, device="cuda"),
        "write": torch.rand(batch, time, VALUE_HEADS, device="cuda"),
    }
    tensors = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    borders = torch.randint(0, time, (batch, documents - 1), device="cuda")
    counts = torch.zeros(batch, time, dtype=torch.long, device="cuda").scatter_add_(
        1, borders, torch.ones_like(borders)
    )
    return tensors | {"segment_ids": counts.cumsum(1)}


def flash_linear_attention() -> Implementation:
    rule = importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule

    def run(
        *, query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, write: Tensor, segment_ids: Tensor
    ) -> Tensor:
        return rule(query, key, value, log_decay, write)[0]

    return run


def gradients(run: Implementation, given: dict[str, Any], gradient: Tensor) -> dict[str, Tensor]:
    leaves = {name: tensor for name, tensor in given.items() if name != "segment_ids"}
    out = run(**given)
    return {"out": out.detach()} | dict(
        zip(leaves, torch.autograd.grad(out, list(leaves.values()), gradient.to(out.dtype)), strict=True)
    )


def check(run: Implementation, *, documents: int) -> dict[str, float]:
    """Largest relative error of the output and of each gradient; two runs must agree bit for bit."""
    worst: dict[str, float] = {}
    for batch, time in ((2, 257), (1, 1024), (3, 64), (1, 1000)):
        for decay in (0.02, 1.0, 5.0):
            given = inputs(batch, time, decay=decay, documents=documents)
            gradient = torch.randn_like(given["value"])
            found, again = (gradients(run, given, gradient) for _ in range(2))
            exact = {
                name: tensor.detach().float().requires_grad_() if tensor.is_floating_point() else tensor
                for name, tensor in given.items()
            }
            for name, expected in gradients(chunked_gated_delta_rule, exact, gradient.float()).items():
                if not torch.equal(found[name], again[name]):
                    raise AssertionError(f"{name}: two runs differ at {batch} x {time}, decay {decay}")
                error = float((found[name].float() - expected).norm() / expected.norm())
                worst[name] = max(worst.get(name, 0.0), error)
    return worst


def time_one(run: Implementation, batch: int, time: int) -> dict[str, float]:
    given = inputs(batch, time, decay=1.0, documents=1)
    leaves, gradient = [given[name] for name in given if name != "segment_ids"], torch.randn_like(given["value"])

    def forward() -> None:
        with torch.no_grad():
            run(**given)

    def both() -> None:
        torch.autograd.grad(run(**given), leaves, gradient)

    forward_ms, _ = milliseconds(forward)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both_ms, spread = milliseconds(both)
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    return {"forward_ms": forward_ms, "both_ms": both_ms, "spread_ms": spread, "peak_gib": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows = []
    for name in ("nextune", "flash-linear-attention"):
        try:
            run = gated_delta_rule if name == "nextune" else flash_linear_attention()
            errors = check(run, documents=5 if name == "nextune" else 1)
            print(f"{name}: relative error " + ", ".join(f"{key} {value:.1e}" for key, value in errors.items()))
            times = {shape: time_one(run, *shape) for shape in SHAPES}
        except Exception as error:  # a peer that does not run here is reported, and our rows are still written
            if name == "nextune":
                raise
            print(f"{name}: no row, {type(error).__name__}: {str(error).splitlines()[0]}")
            continue
        for (batch, time), row in times.items():
            rows.append({"name": name, "batch": batch, "time": time, "error": errors} | row)
            print(
                f"{name:24} {batch} x {time:6} forward {row['forward_ms']:5.2f} ms, with backward "
                f"{row['both_ms']:5.2f} ± {row['spread_ms']:.2f} ms, {row['peak_gib']:.2f} GiB",
                flush=True,
            )
    late = [row["name"] for row in rows if any(row["error"][key] > LIMITS.get(key, 6e-3) for key in row["error"])]
    write_results(options.out, {"rows": rows, "too_inaccurate": late})
    if "nextune" in late:
        raise SystemExit("nextune: relative errors above the limits")


if __name__ == "__main__":
    main()
