"""One contender in a process of its own: built, filled, compared, stepped and timed as the parent says, through a pipe.

A process of its own frees all memory at its end, and keeps what one contender patches away from the others.
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
PROBED = 64  # positions of every sequence whose losses are compared between contenders


@dataclass(frozen=True)
class Setting:
    """What every contender of one comparison shares."""

    values: dict[str, Any]  # config.json
    layers: int
    device: str
    dtype: torch.dtype
    threads: int = 0  # of the CPU; 0 leaves torch's choice


@dataclass
class Turn:
    """Some steps in a row."""

    milliseconds: list[float] = field(default_factory=list)
    processor_milliseconds: list[float] = field(default_factory=list)  # of all threads; on a CPU only
    losses: list[float] = field(default_factory=list)
    peak_gib: float = 0.0


class Updater:
    """Clipped AdamW over the adapters; of adapters in bfloat16 it updates float32 copies, as DeepSpeed does."""

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
        """Begin anew with the first `layers` layers on a batch; the losses of some of its tokens."""
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
        """Train for some steps; on a GPU nothing waits between them."""
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
        """What is computed again, in words; empty where the contender has no choice."""
        return self.settled

    def load(self) -> float | None:
        """How much more than the mean the busiest expert has to do, over all layers; known of this project's model."""
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
    """Token ids drawn with shares that fall off as 1 / rank, as those of words do, ranks spread over the vocabulary."""
    generator = torch.Generator().manual_seed(7)
    shares = 1 / torch.arange(1, vocabulary + 1, dtype=torch.float64)
    ranks = torch.multinomial(shares, batch * time, replacement=True, generator=generator)
    return torch.randperm(vocabulary, generator=generator)[ranks].view(batch, time)


def serve(name: str, setting: Setting, pipe: Connection) -> None:
    """Build the contender, then do what the pipe says until it says nothing more; an error is sent and ends this."""
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
    """Median, and half of the distance between the quartiles."""
    low, _, high = statistics.quantiles(values, n=4)
    return statistics.median(values), (high - low) / 2
