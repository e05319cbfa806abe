"""The LoRA step on a CPU: this project beside transformers and peft, on the tiny recipe's model and sizes, in one run.

Each model runs in a process of its own with one thread, as the recipe's ranks do. The processes alternate every few
steps, so that load from other programs affects both. Float32 without recompute, as in the recipe; one document in each
sequence, since transformers' own code trains packed documents incorrectly.

    python -m benchmarks.cpu_step
"""

import argparse
import datetime
import json
import platform
import statistics
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from benchmarks.lora_models import NO_RECOMPUTE
from benchmarks.lora_step import FALL_TOLERANCE, MEAN_TOLERANCE, ask, contender
from benchmarks.lora_worker import Setting, quartiles
from benchmarks.measure import write_results

RESULTS = Path("benchmarks/results/cpu_step.json")
BASE = Path("recipes/base/config.json")
NAMES = ("transformers_peft", "nextune")
SEQUENCES, TOKENS = 2, 512  # train.micro_batch_tokens and train.sequence_tokens of recipes/tiny.yaml
# Both sides use float32, so only the order of sums differs. That can change a router's choice of experts, and with it
# the losses of the rest of a sequence; so the tolerance applies to every token of the sequence that agrees best.
TOLERANCE = 1e-4


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--steps", type=int, default=3, help="in a turn")
    parser.add_argument("--profile", metavar="NAME", help="only print the most expensive operations of its step")
    options = parser.parse_args()
    values = json.loads(BASE.read_text(encoding="utf-8"))
    layers = values["num_hidden_layers"]
    setting = Setting(values, layers, "cpu", torch.float32, options.threads)
    if options.profile:
        with contender(options.profile + NO_RECOMPUTE, setting) as pipe:
            ask(pipe, "start", batch=SEQUENCES, time=TOKENS, layers=layers, zipf=False)
            print(ask(pipe, "profile", rows=40))
        return 0
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in NAMES}
    with ExitStack() as stack:
        pipes = {name: stack.enter_context(contender(name + NO_RECOMPUTE, setting)) for name in NAMES}
        probes = {
            name: torch.tensor(ask(pipe, "start", batch=SEQUENCES, time=TOKENS, layers=layers, zipf=False))
            for name, pipe in pipes.items()
        }
        for turn in range(options.turns + 1):  # the first turn is a warm-up
            for name, pipe in pipes.items():
                turns[name].append(ask(pipe, "turn", steps=options.steps))
            print(
                f"turn {turn}: "
                + ", ".join(f"{name} {statistics.median(turns[name][-1]['milliseconds']):.0f} ms" for name in NAMES),
                flush=True,
            )
    expected, found = (torch.tensor([loss for turn in turns[name] for loss in turn["losses"]]) for name in NAMES)
    apart = (probes[NAMES[0]] - probes[NAMES[1]]).abs().view(SEQUENCES, -1)
    off, mean_off = float(apart.amax(1).min()), float((expected - found)[0].abs())
    falls = [float(losses[0] - losses[-1]) for losses in (expected, found)]
    alike = off <= TOLERANCE and mean_off <= MEAN_TOLERANCE
    if not alike or not abs(falls[1] - falls[0]) <= FALL_TOLERANCE * falls[0]:
        print(
            f"NO ROWS: losses of single tokens differ by {off:.1e}, the loss of the first step by {mean_off:.1e}; then"
            f" the loss falls by {falls[0]:.4f} and {falls[1]:.4f}"
        )
        return 1
    rows = []
    for name in NAMES:
        times = [ms for turn in turns[name][1:] for ms in turn["milliseconds"]]
        milliseconds, spread = quartiles(times)
        work = statistics.median(ms for turn in turns[name][1:] for ms in turn["processor_milliseconds"])
        losses = [loss for turn in turns[name] for loss in turn["losses"]]
        rows.append(
            {
                "name": name,
                "milliseconds": round(milliseconds, 1),
                "spread": round(spread, 1),
                "fastest": round(min(times), 1),
                "processor_milliseconds": round(work, 1),
                "tokens_per_second": round(1000 * SEQUENCES * TOKENS / milliseconds, 1),
                "loss_first": losses[0],
                "loss_last": losses[-1],
                "steps": len(losses),
            }
        )
    # Turn by turn, so that both were measured within the same few seconds.
    ratios = [
        statistics.median(theirs["milliseconds"]) / statistics.median(ours["milliseconds"])
        for theirs, ours in zip(turns[NAMES[0]][1:], turns[NAMES[1]][1:], strict=True)
    ]
    ratio, spread = quartiles(ratios)
    about = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "processor": processor(),
        "threads": options.threads,
        "shape": f"{SEQUENCES}x{TOKENS}",
        "ratio": round(ratio, 3),
        "ratio_spread": round(spread, 3),
        "loss_difference": off,
    }
    write_results(options.out, {**about, "rows": rows})
    for row in rows:
        print(
            f"{row['name']:20} {row['milliseconds']:7.1f} ± {row['spread']:.1f} ms, fastest {row['fastest']:.1f}, "
            f"processor {row['processor_milliseconds']:.0f}; {row['tokens_per_second']:.0f} tokens/s"
        )
    print(f"nextune / transformers_peft: {ratio:.2f} ± {spread:.2f} times the tokens a second; losses within {off:.1e}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
