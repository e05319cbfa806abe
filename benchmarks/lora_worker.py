"""One contender in its own process, controlled by the parent through a pipe: built, filled, compared, and timed.

A separate process frees all memory at its end, and isolates one contender's patches from the others.
"""

import statistics
import time
import traceback
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.lora_models import Contender, build, fill

LEARNING_RATE = 5e-4
CLIP_NORM = 1.0
PROBED = 64  # positions of every sequence at which losses are compared


@dataclass(frozen=True)
class Setting:
    """Settings common to all contenders of a comparison."""

    values: dict[str, Any]  # config.json
    layers: int
    device: str
    dtype: torch.dtype
    threads: int = 0  # CPU threads; 0: torch's default


@dataclass
class Turn:
    """Measurements of consecutive steps."""

    milliseconds: list[float] = field(default_factory=list)
    processor_milliseconds: list[float] = field(default_factory=list)  # over all threads; only on a CPU
    losses: list[float] = field(default_factory=list)
    peak_gib: float = 0.0


class Updater:
    """Clipped AdamW over the adapters; bfloat16 adapters have float32 masters, as in DeepSpeed."""

    def __init__(self, model: nn.Module):
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.masters = [p if p.dtype == torch.float32 else p.detach().float() for p in self.trained]
        self.adamw = torch.optim.AdamW(
            [m.requires_grad_() for m in self.masters], lr=LEARNING_RATE, fused=self.masters[0].is_cuda
        )

    def step(self) -> None:
        copies = [(p, m) for p, m in zip(self.trained, self.masters, strict=True) if p is not m]
        for parameter, master in copies:
            assert parameter.grad is not None
            master.grad = parameter.grad.float()
        nn.utils.clip_grad_norm_(self.masters, CLIP_NORM, foreach=True)
        self.adamw.step()
        if copies:
            torch._foreach_copy_([p.detach() for p, _ in copies], [m.detach() for _, m in copies])
        for parameter in (*self.trained, *self.masters):
            parameter.grad = None


class Bench:
    """A contender with its optimizer, on one batch of token ids."""

    def __init__(self, name: str, setting: Setting):
        if setting.threads:
            torch.set_num_threads(setting.threads)
        self.setting = setting
        self.device = torch.device(setting.device)
        values = {**setting.values, "num_hidden_layers": setting.layers}
        torch.manual_seed(0)
        self.contender: Contender = build(name, values, self.device, setting.dtype)

    def start(self, batch: int, time: int, layers: int, *, zipf: bool) -> list[float]:
        """Restart with the first `layers` layers on a new batch; returns the losses at `PROBED` positions."""
        del self.contender.layers[layers:]
        model = self.contender.model
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError("nothing trains")
        config = getattr(model, "config", None)
        if config is not None:
            config.num_hidden_layers = layers
        self.settled = self.contender.settle(batch, time)
        fill(model, zipf=zipf)
        self.updater = Updater(model)
        self.ids = tokens(batch, time, self.setting.values["vocab_size"]).to(self.device)
        positions = torch.arange(PROBED, device=self.device) * (time - 1) // PROBED
        with torch.no_grad(), self.contender.autocast():
            logits = self.contender.logits(self.ids, positions).float()
        return F.cross_entropy(logits.flatten(0, 1), self.ids[:, positions + 1].flatten(), reduction="none").tolist()

    def step(self) -> Tensor:
        with self.contender.autocast():
            loss = self.contender.loss(self.ids)
        loss.backward()
        self.updater.step()
        return loss.detach()

    def turn(self, steps: int) -> Turn:
        """Train for `steps` steps; on a GPU without synchronisation between them."""
        result, losses = Turn(), []
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
            events[0].record()
            for event in events[1:]:
                losses.append(self.step())
                event.record()
            torch.cuda.synchronize()
            result.milliseconds = [a.elapsed_time(b) for a, b in pairwise(events)]
            result.peak_gib = torch.cuda.max_memory_allocated() / 2**30
        else:
            for _ in range(steps):
                began, worked = time.perf_counter(), time.process_time()
                losses.append(self.step())
                result.milliseconds.append(1000 * (time.perf_counter() - began))
                result.processor_milliseconds.append(1000 * (time.process_time() - worked))
        result.losses = torch.stack(losses).tolist()
        return result

    def recompute(self) -> str:
        """A description of what is recomputed; empty if the contender has no choice."""
        return self.settled

    def load(self) -> float | None:
        """Rows of the busiest expert relative to the mean, averaged over layers; only for this project's model."""
        with torch.no_grad():
            output = self.contender.model(self.ids, torch.zeros_like(self.ids), labels=self.ids)
        rows = torch.stack([routing.rows for routing in output.routings.values()]).float()
        return float((rows.amax(1) / rows.mean(1)).mean())

    def profile(self, rows: int) -> str:
        """The most expensive kernels of one step."""
        from torch.profiler import ProfilerActivity, profile

        gpu = self.device.type == "cuda"
        self.turn(4)
        with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as profiler:
            self.turn(1)
        found = [
            (event.self_device_time_total if gpu else event.self_cpu_time_total, event.count, event.key)
            for event in profiler.key_averages()
        ]
        total = sum(each[0] for each in found)
        lines = [f"{total / 1000:.1f} ms in {sum(each[1] for each in found)} calls"]
        for microseconds, count, name in sorted(found, reverse=True)[:rows]:
            lines.append(f"{microseconds / 1000:8.2f} ms {microseconds / total:6.1%} {count:5} x {name[:110]}")
        return "\n".join(lines)


def tokens(batch: int, time: int, vocabulary: int) -> Tensor:
    """Token ids with frequencies proportional to 1 / rank, as of words; ranks are permuted over the vocabulary."""
    generator = torch.Generator().manual_seed(7)
    shares = 1 / torch.arange(1, vocabulary + 1, dtype=torch.float64)
    ranks = torch.multinomial(shares, batch * time, replacement=True, generator=generator)
    return torch.randperm(vocabulary, generator=generator)[ranks].view(batch, time)


def serve(name: str, setting: Setting, pipe: Connection) -> None:
    """Build the contender and execute the pipe's commands until None; an error is sent and ends the process."""
    try:
        bench = Bench(name, setting)
        pipe.send(bench.contender.about)
        while (command := pipe.recv()) is not None:
            method, arguments = command
            answer = getattr(bench, method)(**arguments)
            pipe.send(asdict(answer) if isinstance(answer, Turn) else answer)
    except Exception as error:
        traceback.print_exc()
        pipe.send(error if isinstance(error, ArithmeticError) else RuntimeError(f"{type(error).__name__}: {error}"))


def quartiles(values: list[float]) -> tuple[float, float]:
    """Median and half of the interquartile range."""
    low, _, high = statistics.quantiles(values, n=4)
    return statistics.median(values), (high - low) / 2
