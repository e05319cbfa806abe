"""The LoRA step on one GPU: this project and its peers, on the same model, the same tokens, in one run.

Real widths (512 experts, hidden 2048, vocabulary 151,936), random bfloat16 weights, adapters of rank 16 on the
projections of attention and DeltaNet, 16,384 tokens a step; 8 layers, and 4 to extrapolate to 48. Peers recompute every
layer in the backward pass unless their name says otherwise. `nextune` follows its plan for the memory of the leanest
peer; `nextune_full_recompute` recomputes every layer as well. A contender has a row only if it is correct: the losses
of single tokens before the first step, and the decrease of the loss over the steps, must match the base peer's.

    python -m benchmarks.lora_step --out benchmarks/results/lora_step_h100.json
    python -m benchmarks.lora_step --profile nextune

With `--only`, contenders can be measured by separate commands; rows from the same machine since its start are kept.
"""

import argparse
import datetime
import json
import multiprocessing
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.lora_models import FULL, FULL_RECOMPUTE, NO_RECOMPUTE, flops_per_token
from benchmarks.lora_warm import warm_up
from benchmarks.lora_worker import Setting, quartiles, serve
from benchmarks.measure import PEAK, machine, write_results

BASE = "transformers_peft_fla"
OURS = "nextune"
DEFAULT = (
    BASE, f"{BASE}_liger", f"{BASE}_liger_unsloth", f"{BASE}_liger_axolotl", OURS,
    OURS + FULL_RECOMPUTE, OURS + NO_RECOMPUTE,
)  # fmt: skip
WARM_UP_STEPS = 4
PATIENCE_SECONDS = 240  # timeout of one answer of a contender, including compilation
# Relative to the spread of losses over tokens. Correct implementations differed by 2% to 10% on an H100, since bfloat16
# changes the experts of some tokens. A wrong one (other head layout, other norm, no decay) differs by 140%.
LOSS_TOLERANCE = 0.2
MEAN_TOLERANCE = 0.01  # of the first loss, about 12.4; differences average out over 16,384 tokens; 0.001 was observed
# Relative to the decrease of the loss; 0.03% was observed on an H100. A wrong gradient of one adapter exceeds it.
# Adam's first steps use the sign of a gradient, which amplifies rounding, the more the fewer tokens there are.
FALL_TOLERANCE = 0.05


class RefusedError(RuntimeError):
    """A contender without a row: it does not run here, or is not correct."""


@contextmanager
def contender(name: str, setting: Setting) -> Iterator[Connection]:
    """Start the contender in its own process and wait until it is ready; the process ends with the `with` block."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=serve, args=(name, setting, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        print(f"{name}: {answer(pipe)}", flush=True)
        yield pipe
    finally:
        if process.is_alive() and not pipe.closed:
            with suppress(BrokenPipeError):
                pipe.send(None)
        process.join(20)
        if process.is_alive():
            process.terminate()
            process.join()


def answer(pipe: Connection) -> Any:
    """The contender's next message.

    Raises:
        RefusedError: it failed, died or did not answer in time.
    """
    if not pipe.poll(PATIENCE_SECONDS):
        raise RefusedError(f"no answer in {PATIENCE_SECONDS} s")
    try:
        found = pipe.recv()
    except EOFError:
        raise RefusedError("its process died") from None
    if isinstance(found, Exception):
        raise RefusedError(str(found).splitlines()[0])
    return found


def ask(pipe: Connection, method: str, **arguments: object) -> Any:
    pipe.send((method, arguments))
    return answer(pipe)


def measure(pipe: Connection, name: str, case: dict[str, Any], repeats: int) -> dict[str, Any]:
    """One row: a contender at one size, from its first step."""
    batch, length = (int(part) for part in case["shape"].split("x"))
    probe = ask(pipe, "start", batch=batch, time=length, layers=case["layers"], zipf=case["routing"] == "zipf")
    first = ask(pipe, "turn", steps=WARM_UP_STEPS)
    timed = ask(pipe, "turn", steps=repeats)
    milliseconds, spread = quartiles(timed["milliseconds"])
    tokens = batch * length
    flops = tokens * flops_per_token(FULL, case["layers"], length)
    row = {
        "name": name,
        **case,
        "milliseconds": round(milliseconds, 2),
        "spread": round(spread, 2),
        "tokens_per_second": round(1000 * tokens / milliseconds, 1),
        "peak_gib": round(timed["peak_gib"], 2),
        "mfu": round(1000 * flops / milliseconds / PEAK, 4),
        "loss_first": first["losses"][0],
        "loss_last": timed["losses"][-1],
        "steps": WARM_UP_STEPS + repeats,
        "slowest_step": round(max(timed["milliseconds"]), 2),
        "measured": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "token_losses": " ".join(f"{loss:.3f}" for loss in probe),
    }
    if name.startswith("nextune"):
        row["busiest_expert"] = round(ask(pipe, "load"), 2)
        row["recompute"] = ask(pipe, "recompute")
    return row


def check(row: dict[str, Any], base: dict[str, Any] | None) -> str:
    """Compare a row with the base peer's; returns a sentence about the differences.

    Raises:
        RefusedError: no base row, another model, or a different decrease of the loss.
    """
    if base is None:
        raise RefusedError(f"no row of {BASE} to compare with: measure it first")
    if row["steps"] != base["steps"]:
        raise RefusedError(f"{row['steps']} steps, the base peer {base['steps']}: measure both with the same --repeats")
    found, expected = (torch.tensor([float(loss) for loss in r["token_losses"].split()]) for r in (row, base))
    off = float((found - expected).square().mean().sqrt() / expected.std())
    if not off <= LOSS_TOLERANCE:
        raise RefusedError(f"losses of single tokens differ from the base peer's by {off:.0%} of their spread")
    mean_off = row["loss_first"] - base["loss_first"]
    if not abs(mean_off) <= MEAN_TOLERANCE:
        raise RefusedError(
            f"the loss of the first step is {row['loss_first']:.4f}, the base peer's {base['loss_first']:.4f}"
        )
    fall, base_fall = (r["loss_first"] - r["loss_last"] for r in (row, base))
    if not base_fall > 0:
        raise RefusedError(f"the base peer's loss does not fall: {base['loss_first']:.4f} to {base['loss_last']:.4f}")
    if not abs(fall - base_fall) <= FALL_TOLERANCE * base_fall:
        raise RefusedError(f"the loss falls by {fall:.4f}, the base peer's by {base_fall:.4f}")
    return f"token losses within {off:.1%}, first loss {mean_off:+.4f}, fall {fall:.4f} of {base_fall:.4f}"


def cases(layers: Sequence[int], shapes: Sequence[str], routings: Sequence[str]) -> list[dict[str, Any]]:
    """The cases of every contender, deepest model first, since layers can only be removed; uneven load once."""
    even = [{"layers": n, "shape": s, "routing": "uniform"} for n in sorted(layers, reverse=True) for s in shapes]
    uneven = [{"layers": max(layers), "shape": shapes[0], "routing": "zipf"}]
    return uneven * ("zipf" in routings) + even * ("uniform" in routings)


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["name"], row["layers"], row["shape"], row["routing"]


def run(
    name: str, wanted: list[dict[str, Any]], repeats: int, rows: dict[tuple[Any, ...], dict[str, Any]]
) -> list[str]:
    """Measure one contender and add its accepted rows to `rows`; returns the refusals."""
    refused = []
    began = time.monotonic()
    deepest = max(case["layers"] for case in wanted)
    if name == OURS:  # only its rows of the deepest model are used
        wanted = [case for case in wanted if case["layers"] == deepest]
    setting = Setting(FULL, deepest, "cuda", torch.bfloat16)
    try:
        with contender(name, setting) as pipe:
            for case in wanted:
                row = measure(pipe, name, case, repeats)
                base = row if name == BASE else rows.get(key({**row, "name": BASE}))
                try:
                    closeness = check(row, base)
                except RefusedError as error:
                    refused.append(f"{name}, {case}: {error}")
                    continue
                rows[key(row)] = row
                print(
                    f"  {case['layers']} layers {case['shape']:8} {case['routing']:7} {row['milliseconds']:7.1f} ± "
                    f"{row['spread']:.1f} ms, {row['peak_gib']:.1f} GiB; {closeness}",
                    flush=True,
                )
    except RefusedError as error:
        refused.append(f"{name}: {error}")
    print(f"  {time.monotonic() - began:.0f} s in all", flush=True)
    return refused


def extrapolate(rows: dict[tuple[Any, ...], dict[str, Any]]) -> None:
    """Add to every 8-layer row the prediction for 48 layers: the 44 beyond 4 cost 11 times the difference of 8 and 4.

    Only for contenders whose layers all cost the same; what `nextune` recomputes depends on the memory left by the
    depth.
    """
    for row in rows.values():
        four = rows.get(key({**row, "layers": 4}))
        if row["layers"] != 8 or four is None or row["name"] == OURS:
            continue
        batch, length = (int(part) for part in row["shape"].split("x"))
        milliseconds = four["milliseconds"] + 11 * (row["milliseconds"] - four["milliseconds"])
        row["extrapolated_48_layers"] = {
            "milliseconds": round(milliseconds, 1),
            "tokens_per_second": round(1000 * batch * length / milliseconds, 1),
            "mfu": round(1000 * batch * length * flops_per_token(FULL, 48, length) / milliseconds / PEAK, 4),
        }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text, each with its speed relative to the base peer."""
    by_key = {key(row): row for row in rows}
    lines = [
        f"{'name':36} {'layers':>6} {'shape':>8} {'routing':>8} {'ms':>7} {'+-':>5} {'tok/s':>7} {'MFU':>6} {'GiB':>5} "
        f"{'x base':>6} {'48 layers tok/s':>15} {'MFU':>6} {'x base':>6}"
    ]
    for row in sorted(rows, key=lambda row: (-row["layers"], row["shape"], row["routing"], -row["milliseconds"])):
        base = by_key.get(key({**row, "name": BASE}))
        line = (
            f"{row['name']:36} {row['layers']:6} {row['shape']:>8} {row['routing']:>8} {row['milliseconds']:7.1f} "
            f"{row['spread']:5.1f} {row['tokens_per_second']:7.0f} {row['mfu']:6.1%} {row['peak_gib']:5.1f} "
            + (f"{base['milliseconds'] / row['milliseconds']:6.2f}" if base else " " * 6)
        )
        if whole := row.get("extrapolated_48_layers"):
            line += f" {whole['tokens_per_second']:15.0f} {whole['mfu']:6.1%}"
            if base and (other := base.get("extrapolated_48_layers")):
                line += f" {whole['tokens_per_second'] / other['tokens_per_second']:6.2f}"
        lines.append(line)
    return "\n".join(lines)


def session() -> str:
    """An identifier of the machine and its boot that reveals nothing else about it."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    return f"{zlib.crc32((boot + str(torch.cuda.get_device_properties(0).uuid)).encode()):08x}"


def earlier(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows in the file from this machine since its boot, and the commands that measured them."""
    if not path.exists():
        return [], []
    found = json.loads(path.read_text(encoding="utf-8"))
    if found.get("session") != session():
        print(f"{path} is from another machine or session: starting anew", flush=True)
        return [], []
    return found["rows"], found["commands"]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--only", nargs="+", default=list(DEFAULT), metavar="NAME", help=f"of {', '.join(DEFAULT)}, ..."
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 4])
    parser.add_argument("--shapes", nargs="+", default=["4x4096", "1x16384"], metavar="SEQUENCESxTOKENS")
    parser.add_argument("--routings", nargs="+", default=["uniform", "zipf"], choices=("uniform", "zipf"))
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--warm", action="store_true", help="compile the peers' kernels first, on all cores")
    parser.add_argument(
        "--profile", metavar="NAME", help="only print the most expensive kernels of this contender's step"
    )
    options = parser.parse_args()
    if options.warm:
        warm_up(options.only)
    if options.profile:
        case = cases(options.layers, options.shapes, ["uniform"])[0]
        with contender(options.profile, Setting(FULL, case["layers"], "cuda", torch.bfloat16)) as pipe:
            batch, length = (int(part) for part in case["shape"].split("x"))
            ask(pipe, "start", batch=batch, time=length, layers=case["layers"], zipf=False)
            print(ask(pipe, "profile", rows=25))
        return 0
    if options.out is None:
        parser.error("--out is missing")
    before, commands = earlier(options.out)
    commands.append(machine()["command"])
    rows = {key(row): row for row in before}
    refused = []
    for name in options.only:
        refused += run(name, cases(options.layers, options.shapes, options.routings), options.repeats, rows)
        extrapolate(rows)
        if rows:  # written after every contender, in case the run is interrupted
            date = min(row["measured"] for row in rows.values())[:10]
            about = {"date": date, "session": session(), "tokens": "random, shares as 1 / rank", "refused": refused}
            about["commands"] = commands
            write_results(options.out, {**about, "rows": list(rows.values())})
    print(table(list(rows.values())))
    print(json.dumps(machine()))
    for sentence in refused:
        print(f"NO ROW: {sentence}")
    return 1 if refused else 0


if __name__ == "__main__":
    raise SystemExit(main())
