"""Triton kernels compiled on all cores before anything is timed, into the cache that every contender reads.

A process compiles one kernel after the other, and flash-linear-attention tries many forms of each: minutes on a machine
that has compiled nothing yet. Here every process tries a share of the forms.
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
    """Compile what these contenders use."""
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
    """A step of this project's model, two layers deep."""
    bench = Bench("nextune", Setting({**FULL, "full_attention_interval": 2}, 2, "cuda", torch.bfloat16))
    for batch, length in ((4, 4096), (1, 16384)):
        bench.start(batch, length, 2, zipf=False)
        bench.turn(1)


def _share(number: int) -> None:
    """Forward and backward of transformers' DeltaNet layer, with one share of the forms of every kernel."""
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
    """Every tuner in every module that is loaded, however wrapped."""
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
