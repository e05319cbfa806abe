"""The job as users run it, on 1, 2, 4 or 8 cards: plan, train, kill, resume, another layout, export.

    python -m benchmarks.real_job --cards 2 --expert 2 --layers 12 --out benchmarks/results/real_job.json

A random checkpoint of the released layout is written first (`benchmarks/random_checkpoint.py`). Then the real commands
run: `python -m finetune plan`, `deepspeed finetune/train.py --recipe recipes/code.yaml --set ...` and `python -m
finetune export`. `--resume` kills one rank after a checkpoint and repeats the command; `--then-expert` continues the
run at another expert parallel size. Every training adds a row to the file given by `--out`:

    tokens_per_second        over all GPUs: median of the steps from the third on
    mfu                      operations of a step without recompute, relative to the GPUs' peak
    peak_gib, planned_gib    peak of tensors on rank 0, measured and planned
    recompute                what the plan for these GPUs recomputes in the backward pass
    kernels                  fused or plain, from the recipe's section of that name
    load_seconds             from the console's line about data to that about weights; includes trials of kernels
    checkpoint_blocked_seconds, export_seconds, kill_and_resume
"""

import argparse
import datetime
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.measure import PEAK, machine, write_results
from benchmarks.random_checkpoint import CHECKOUT, REFERENCE, write_random_checkpoint
from finetune.model.config import ModelConfig
from finetune.plan.planner import plan
from finetune.plan.recompute import described
from finetune.plan.throughput import form_of
from finetune.plan.working_memory import RUNTIME_DEVICE_BYTES
from finetune.plan.workload import GIB, Machine
from finetune.recipe.load import load_recipe
from monitoring.metrics import read_metrics

WARM_STEPS = 2  # during which kernels are compiled
LIMIT_SECONDS = 500


@dataclass(frozen=True)
class Job:
    """One training command and its run folder."""

    base: Path
    folder: Path
    cards: int
    expert: int
    steps: int
    overrides: tuple[str, ...] = ()
    name: str = "real-job"

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.folder / "runs" / self.name

    @property
    def settings(self) -> list[str]:
        """`KEY=VALUE` of every `--set` option."""
        return [
            f"name={self.name}",
            f"model.path={self.base}",
            f"output.dir={self.folder / 'runs'}",
            f"parallel.ranks={self.cards}",
            f"parallel.expert={self.expert}",
            f"train.steps={self.steps}",
            "train.log_every_steps=1",
            "optim.warmup_steps=2",
            "monitor.wandb=off",
            *self.overrides,
        ]

    @property
    def words(self) -> list[str]:
        """The command-line options for the recipe and its `--set` overrides."""
        return ["--recipe", "recipes/code.yaml", *(word for s in self.settings for word in ("--set", s))]

    def train(self) -> list[str]:
        """The command that starts or resumes the run."""
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "-q", "--num_gpus", str(self.cards)]
        return [*launcher, "finetune/train.py", *self.words]


@dataclass
class Console:
    """Output lines of a command, with seconds since its start."""

    lines: list[tuple[float, str]] = field(default_factory=list)
    code: int = 0
    seconds: float = 0.0

    def at(self, words: str) -> float | None:
        """Seconds until the first line that contains `words`; None if there is none."""
        return next((seconds for seconds, line in self.lines if words in line), None)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cards", type=int, default=1)
    parser.add_argument("--expert", type=int, help="expert parallel size; by default the number of cards")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the recipe, after our own")
    parser.add_argument(
        "--config", type=Path, default=REFERENCE, help="sizes of the model; those of the 80B by default"
    )
    parser.add_argument("--work", type=Path, help="folder for checkpoint and runs, on a fast disk; kept if it is given")
    parser.add_argument("--resume", action="store_true", help="also kill one rank and repeat the command")
    parser.add_argument("--then-expert", type=int, help="also go on at this expert parallel size")
    parser.add_argument("--export", action="append", default=[], choices=("adapter", "merged"))
    parser.add_argument("--out", type=Path, required=True, help="JSON file to which rows are added")
    options = parser.parse_args()
    os.chdir(CHECKOUT)
    work = options.work or Path(tempfile.mkdtemp(prefix="real-job-"))
    work.mkdir(parents=True, exist_ok=True)
    try:
        return measure(options, work)
    finally:
        if options.work is None:
            shutil.rmtree(work)


def measure(options: argparse.Namespace, work: Path) -> int:
    base = work / f"base-{options.layers}"
    if not base.exists():
        began = time.perf_counter()
        values = {**json.loads(options.config.read_text(encoding="utf-8")), "num_hidden_layers": options.layers}
        values.pop("layer_types", None)
        size = write_random_checkpoint(base, values)
        print(f"checkpoint of {size / 1e9:.1f} GB made in {time.perf_counter() - began:.1f} s", flush=True)
    expert = options.expert or options.cards
    settings = zlib.crc32(" ".join(options.set).encode())  # other settings get another run
    name = f"real-{options.cards}-{expert}-{options.layers}-{settings:08x}"
    job = Job(base, work, options.cards, expert, options.steps, tuple(options.set), name)
    show("plan", run([sys.executable, "-m", "finetune", "plan", *job.words]))
    row = trained(job, show("train", run(job.train())))
    if options.resume:
        row["kill_and_resume"] = killed_and_resumed(job)
    if options.then_expert:
        row["other_layout"] = other_layout(job, options.then_expert, options.steps)
    for kind in options.export:
        command = [sys.executable, "-m", "finetune", "export", str(job.run), "--to", str(work / f"{name}-{kind}")]
        exported = show(f"export {kind}", run([*command, "--format", kind]))
        row[f"export_{kind}_seconds"] = round(exported.seconds, 1)
    add_row(options.out, row)
    print(json.dumps(row, indent=1), flush=True)
    return 0


def run(command: list[str], kill_when: Path | None = None) -> Console:
    """Run a command in the checkout and wait for its end.

    Args:
        kill_when: once this file exists and one more step is printed, one rank is killed by SIGKILL, like an OOM kill.
    """
    environment = {**os.environ, "PYTHONPATH": f"{CHECKOUT}:{os.environ.get('PYTHONPATH', '')}"}
    console, began = Console(), time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=CHECKOUT
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            console.lines.append((time.perf_counter() - began, line.rstrip()))
            if kill_when is not None and kill_when.exists() and line.startswith("step "):
                victim = [p for p in psutil.Process(process.pid).children(recursive=True) if _is_rank(p)][-1]
                victim.send_signal(signal.SIGKILL)
                kill_when = None
            if time.perf_counter() - began > LIMIT_SECONDS:
                process.terminate()
    console.code, console.seconds = process.returncode, time.perf_counter() - began
    return console


def _is_rank(process: psutil.Process) -> bool:
    return any(word.startswith("--local_rank=") for word in process.cmdline())


def show(what: str, console: Console) -> Console:
    print(f"--- {what}: exit code {console.code} after {console.seconds:.1f} s", flush=True)
    for seconds, line in console.lines:
        print(f"{seconds:7.1f}  {line}")
    sys.stdout.flush()
    if console.code:
        raise SystemExit(f"{what} failed")
    return console


def trained(job: Job, console: Console) -> dict[str, Any]:
    """The row of a completed run."""
    records = read_metrics(job.run / "metrics.jsonl")
    steps = [r for r in records if r["kind"] == "train" and WARM_STEPS < r["step"] < job.steps]
    saved = [r for r in records if r["kind"] == "checkpoint"]
    rate = statistics.median(r["tokens_per_second"] for r in steps)
    config = ModelConfig.from_folder(job.base)
    recipe = load_recipe(CHECKOUT / "recipes" / "code.yaml", job.settings)
    here = machine()
    gpu = here["device"] != "cpu"
    made = plan(config, recipe, this_machine(here["device"], job.cards))
    beside = RUNTIME_DEVICE_BYTES if gpu else 0
    data = max(filter(None, (console.at("training data:"), console.at("held-out data:"))), default=0.0)
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        **here,
        "cards": job.cards,
        "expert": job.expert,
        "layers": config.num_hidden_layers,
        "sequence_tokens": recipe.train.sequence_tokens,
        "micro_batch_tokens": recipe.train.micro_batch_tokens,
        "accumulation": recipe.accumulation(job.cards),
        "recompute": described(config, made.recompute),
        "kernels": form_of(recipe),
        "tokens_per_second": round(rate),
        "step_seconds": round(statistics.median(r["seconds"] for r in steps), 4),
        "mfu": round(rate * made.work.operations / (PEAK * job.cards), 4) if gpu else None,
        "peak_gib": round(max(r["peak_bytes"] for r in records if r["kind"] == "train") / GIB, 2),
        "planned_gib": round((made.rank_bytes - beside) / GIB, 2),
        "load_seconds": round((console.at("weights from") or 0.0) - data, 1),
        "checkpoint_blocked_seconds": round(max(r["blocked_seconds"] for r in saved), 3),
        "first_losses": [round(r["loss"], 4) for r in records if r["kind"] == "train"][:8],
        "held_out": [round(r["loss"], 4) for r in records if r["kind"] == "eval"],
        "measured": True,
    }


def this_machine(device: str, cards: int) -> Machine:
    """The machine for which a run here is planned."""
    if device == "cpu":
        return Machine(
            ranks=cards,
            ranks_per_node=cards,
            device_name="CPU",
            device_bytes=None,
            host_bytes=psutil.virtual_memory().total,
        )
    import torch

    total = torch.cuda.get_device_properties(0).total_memory
    return Machine(ranks=cards, ranks_per_node=cards, device_name=device, device_bytes=total)


def killed_and_resumed(job: Job) -> dict[str, Any]:
    """Repeat the job, kill one rank after a checkpoint, and resume; compares the losses with the first run's."""
    half = job.steps // 2
    extra = (*job.overrides, f"checkpoint.every_steps={half}")
    broken = Job(job.base, job.folder, job.cards, job.expert, job.steps, extra, f"{job.name}-killed")
    first = run(broken.train(), kill_when=broken.run / "checkpoints" / f"step-{half}" / "manifest.json")
    if first.code == 0:
        raise SystemExit("the rank was not killed: the job ended well")
    print(f"--- a rank was killed: exit code {first.code} after {first.seconds:.1f} s", *_last(first), sep="\n")
    second = show("resume", run(broken.train()))
    losses = [
        [r["loss"] for r in read_metrics(one.run / "metrics.jsonl") if r["kind"] == "train"] for one in (job, broken)
    ]
    return {
        "resumed_after_step": half,
        "seconds": round(second.seconds, 1),
        "largest_difference_of_a_loss": max(abs(a - b) for a, b in zip(*losses, strict=True)),
    }


def other_layout(job: Job, expert: int, steps: int) -> dict[str, Any]:
    """Continue the run for `steps` more steps at another expert parallel size."""
    longer = Job(job.base, job.folder, job.cards, expert, job.steps + steps, job.overrides, job.name)
    console = show(f"expert parallel {expert}", run(longer.train()))
    records = [r for r in read_metrics(job.run / "metrics.jsonl") if r["kind"] == "train" and r["step"] > job.steps + 2]
    rate = statistics.median(r["tokens_per_second"] for r in records)
    return {"expert": expert, "tokens_per_second": round(rate), "seconds": round(console.seconds, 1)}


def _last(console: Console) -> list[str]:
    return [line for _, line in console.lines[-12:]]


def add_row(path: Path, row: dict[str, Any]) -> None:
    """Add a row, replacing one of the same device, cards, layout, layers and batch."""
    keys = ("device", "cards", "expert", "layers", "sequence_tokens", "micro_batch_tokens", "accumulation", "recompute")
    keys += ("kernels",)
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    rows = [old for old in rows if any(old.get(key) != row[key] for key in keys)]
    write_results(path, {"rows": [*rows, row]})


if __name__ == "__main__":
    raise SystemExit(main())
