"""The loss over 100 LoRA steps on one GPU: with the kernels that a run chooses there, and with their definitions.

Tests whether many steps in bfloat16 with all fast kernels learn as the definitions do. Rounding alone makes two correct
runs diverge (a router's choice flips, Adam uses the sign of a small gradient), so the noise is measured too: by the
definitions in float32, and by the definitions in bfloat16 with sums in another order. All four start from the same
weights and read the same text. Real layer widths (hidden 2048, heads and experts as released), the four layers of one
period, 64 experts, bytes as vocabulary; a random frozen base with trained adapters.

It detects what changes learning, such as a missing part of a gradient. An output with a relative error of 1% is below
the noise of a training run; the tests of each kernel detect that.

    python -m benchmarks.loss_curve --out benchmarks/results/loss_curve_h100.json
    python -m benchmarks.loss_curve --check    # a quick test: tiny, on the CPU, without the fused kernels
"""

import argparse
import datetime
import gzip
import json
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn

from benchmarks.lora_models import FULL, NO_RECOMPUTE, Contender, build, fill
from benchmarks.lora_worker import Updater
from benchmarks.measure import write_results
from finetune.kernels.choose import Kernels, install
from finetune.model.delta_rule import chunked_gated_delta_rule
from finetune.model.deltanet import DECAY_RATES, GatedDeltaNet
from finetune.training.lora import AdaptedLinear

CORPUS = Path("data/corpus/code-train.jsonl.gz")
SIZES = {**FULL, "num_hidden_layers": 4, "num_experts": 64, "vocab_size": 256}
STEPS, SEQUENCES, TOKENS = 100, 4, 1024
TINY = SIZES | {
    "hidden_size": 64, "num_experts": 8, "num_experts_per_tok": 2, "head_dim": 32, "num_attention_heads": 2,
    "num_key_value_heads": 1, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
}  # fmt: skip
SHOWN = ("hidden_size", "num_hidden_layers", "num_experts", "num_experts_per_tok", "vocab_size")
OURS, DEFINITION, EXACT, AGAIN = "nextune", "definition", "definition_float32", "definition_reordered"
# Accepted distance in units of the noise, since both are a single sample. Among eight correct runs in bfloat16 (on a
# CPU, 16 experts, hidden 64, 256 tokens a step, sums in other orders), with each taken as ours against every other, 45%
# of distances exceeded the noise, by up to 1.5 times. With half of one adapter's gradient missing: 12 times.
MARGIN = 2.0
FALL = 0.1  # minimum decrease relative to the first loss; a constant loss compares nothing
Curves = dict[str, list[float]]


class RefusedError(RuntimeError):
    """Curves without a valid conclusion: incomplete, nothing learned, or the kernels did not run."""


def batches(steps: int, sequences: int, tokens: int, path: Path = CORPUS) -> Tensor:
    """Source text as bytes, (steps, sequences, tokens) int64, without repeated passages."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        text = "".join(json.loads(line)["text"] for line in file).encode()
    passages = torch.frombuffer(bytearray(text), dtype=torch.uint8)[: len(text) // tokens * tokens].view(-1, tokens)
    chosen = torch.randperm(len(passages), generator=torch.Generator().manual_seed(0))[: steps * sequences]
    return passages[chosen].long().view(steps, sequences, tokens)


def use_definitions(model: nn.Module) -> None:
    """Use the loop over experts, plain torch everywhere, and peft's forward pass of adapters."""
    install(model, Kernels())
    for module in model.modules():
        if isinstance(module, AdaptedLinear):
            module.forward = MethodType(Linear.forward, module)


def reorder(model: nn.Module) -> None:
    """Use shorter chunks in the delta rule: the same result except for rounding."""
    for module in model.modules():
        if isinstance(module, GatedDeltaNet):
            module.rule = partial(chunked_gated_delta_rule, chunk_tokens=32)


def train(contender: Contender, data: Tensor, change: Callable[[nn.Module], object] | None = None) -> list[float]:
    """Losses of all steps from the same initial weights, each before its update.

    Args:
        change: applied to the model after filling, such as conversion to float32.
    """
    model = contender.model
    fill(model)
    if change is not None:
        change(model)
    updater = Updater(model)
    losses = []
    for ids in data:
        loss = contender.loss(ids)
        loss.backward()
        updater.step()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def measure(values: dict[str, Any], data: Tensor) -> tuple[Curves, str]:
    """All four curves, and the kernels that ours used.

    Raises:
        RefusedError: a fast kernel is not usable here, so there is nothing to measure.
    """
    torch.set_float32_matmul_precision("highest")  # no TF32
    contender = build("nextune" + NO_RECOMPUTE, values, data.device, torch.bfloat16)
    if "SLOW" in contender.about:
        raise RefusedError(f"not the kernels that this is about: {contender.about}")
    model = contender.model
    for name, parameter in model.named_parameters():
        if name.endswith(DECAY_RATES):  # float32 in every run
            parameter.data = parameter.data.float()
    curves: Curves = {}

    def run(name: str, data: Tensor, change: Callable[[nn.Module], object] | None = None) -> None:
        began = time.monotonic()
        curves[name] = train(contender, data, change)
        print(f"{name:20} {time.monotonic() - began:5.1f} s, {_told(curves[name])}", flush=True)

    run(OURS, data)
    use_definitions(model)
    run(DEFINITION, data)
    reorder(model)
    run(AGAIN, data.flip(1))
    use_definitions(model)
    run(EXACT, data, nn.Module.float)  # last, since it remains float32
    return curves, contender.about


def _told(losses: list[float]) -> str:
    return "loss " + ", ".join(f"{losses[i * (len(losses) - 1) // 4]:.4f}" for i in range(5))


def distances(curves: Curves) -> dict[str, dict[str, float]]:
    """Distances |difference| of the curves: of each to the definition in bfloat16, and of ours to that in float32.

    Returns:
        Mean and maximum over all steps, and over the second half.
    """
    found = {}
    for name, other in ((OURS, DEFINITION), (EXACT, DEFINITION), (AGAIN, DEFINITION), (OURS, EXACT)):
        apart = [abs(a - b) for a, b in zip(curves[name], curves[other], strict=True)]
        late = apart[len(apart) // 2 :]
        found[f"{name} - {other}"] = {
            "mean": statistics.fmean(apart),
            "max": max(apart),
            "mean_late": statistics.fmean(late),
            "max_late": max(late),
        }
    return found


def verdict(curves: Curves) -> tuple[bool, str]:
    """Whether ours is as close to the definition as rounding allows, and a sentence with the figures.

    Raises:
        RefusedError: the curves differ in their steps, a loss is not finite, or the definition learns nothing.
    """
    broken = [name for name, losses in curves.items() if not all(map(math.isfinite, losses))]
    if broken:
        raise RefusedError(f"losses that are not finite: {', '.join(broken)}")
    if len({len(losses) for losses in curves.values()}) != 1:
        raise RefusedError(f"steps of the curves: { ({name: len(losses) for name, losses in curves.items()}) }")
    first, last = curves[EXACT][0], curves[EXACT][-1]
    if not first - last >= FALL * first:
        raise RefusedError(f"nothing to compare: the definition's loss goes from {first:.4f} to {last:.4f}")
    found = distances(curves)
    ours = found[f"{OURS} - {DEFINITION}"]["mean"]
    exact, again = (found[f"{name} - {DEFINITION}"]["mean"] for name in (EXACT, AGAIN))
    noise = max(exact, again)
    within = ours <= MARGIN * noise
    return within, (
        f"{'within' if within else 'OUTSIDE'} the noise: on the mean step ours and the definition differ by {ours:.1e},"
        f" {ours / max(noise, 1e-9):.2f} times the noise (at most {MARGIN:g}): the definition differs from float32 by"
        f" {exact:.1e}, from itself in another order by {again:.1e}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path)
    where.add_argument("--check", action="store_true", help="tiny sizes on the CPU; nothing is written")
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    try:
        if options.check:
            curves, kernels = measure(TINY, batches(options.steps, 2, 64))
        else:
            curves, kernels = measure(SIZES, batches(options.steps, SEQUENCES, TOKENS).cuda())
        within, sentence = verdict(curves)
    except RefusedError as refused:
        print(f"NO RESULT: {refused}")
        return 1
    apart = distances(curves)
    for name, values in apart.items():
        print(f"{name:40} " + ", ".join(f"{key} {value:.1e}" for key, value in values.items()))
    print(f"{kernels}\n{sentence}")
    if options.out:
        about = {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "model": {key: SIZES[key] for key in SHOWN},
            "shape": f"{SEQUENCES}x{TOKENS}",
            "text": str(CORPUS),
            "kernels": kernels,
            "within_noise": within,
            "verdict": sentence,
            "distances": {name: {key: round(value, 6) for key, value in each.items()} for name, each in apart.items()},
        }
        losses = {name: " ".join(f"{loss:.5f}" for loss in found) for name, found in curves.items()}
        write_results(options.out, {**about, "losses": losses})
    return 0 if within else 1


if __name__ == "__main__":
    raise SystemExit(main())
