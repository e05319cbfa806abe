"""Compilation of Triton kernels on all cores before the measurement, into the cache that every contender uses.

A process compiles kernels sequentially, and flash-linear-attention's autotuning tries many configurations of each: this
takes minutes on a new machine. Here every process compiles a share of the configurations.
"""

import importlib
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from benchmarks.lora_models import FULL, MissingError, lift_refusal
from benchmarks.lora_worker import Bench, Setting

PROCESSES = os.cpu_count() or 1


def warm_up(names: Sequence[str]) -> None:
    """Compile the kernels of these contenders."""
    context = multiprocessing.get_context("spawn")
    began = time.monotonic()
    processes = []
    if any("_fla" in name for name in names):
        processes += [context.Process(target=_share, args=(number,), daemon=True) for number in range(PROCESSES)]
    if any(name.startswith("nextune") for name in names):
        processes.append(context.Process(target=_own, daemon=True))
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    failed = sum(process.exitcode != 0 for process in processes)
    print(
        f"kernels compiled in {time.monotonic() - began:.0f} s, {failed} of {len(processes)} processes failed",
        flush=True,
    )


def _own() -> None:
    """Run a step of this project's model with two layers."""
    bench = Bench("nextune", Setting({**FULL, "full_attention_interval": 2}, 2, "cuda", torch.bfloat16))
    for batch, length in ((4, 4096), (1, 16384)):
        bench.start(batch, length, 2, zipf=False)
        bench.turn(1)


def _share(number: int) -> None:
    """Run forward and backward of transformers' DeltaNet layer with one share of each kernel's configurations."""
    try:
        lift_refusal()
    except MissingError:
        return
    modeling = importlib.import_module("transformers.models.qwen3_next.modeling_qwen3_next")
    for tuner in _autotuners():
        tuner.configs = tuner.configs[number::PROCESSES] or tuner.configs[:1]
    config = modeling.Qwen3NextConfig(**FULL, num_hidden_layers=4)
    layer = modeling.Qwen3NextGatedDeltaNet(config, 0).cuda().bfloat16().requires_grad_(False)
    for batch, length in ((4, 512), (1, 2048)):
        x = torch.randn(batch, length, config.hidden_size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        with torch.autocast("cuda", torch.bfloat16):
            layer(x).sum().backward()


def _autotuners() -> Iterator[Any]:
    """Every autotuner in the loaded modules, also inside other wrappers."""
    tuner = importlib.import_module("triton.runtime.autotuner").Autotuner
    kernel = importlib.import_module("triton.runtime.jit").KernelInterface
    seen = set()
    for module in list(sys.modules.values()):
        for value in list(getattr(module, "__dict__", {}).values()):
            while isinstance(value, kernel):
                if isinstance(value, tuner) and id(value) not in seen:
                    seen.add(id(value))
                    yield value
                value = getattr(value, "fn", None)
