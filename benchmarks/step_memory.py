"""What `train.recompute: auto` chooses for memory of several sizes, what the plan says that takes, and what it takes.

One GPU simulates smaller ones: the allocator is limited to a part of its memory, and a step that needs more fails. Real
widths, fewer layers; packed documents of random lengths; adapters of rank 16; two optimizer steps, the second measured.

    python -m benchmarks.step_memory --out benchmarks/results/step_memory_h100.json
"""

import argparse
import datetime
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.lora_models import ALPHA, FULL, RANK, TARGETS, fill, first_layers, planned
from benchmarks.lora_worker import Updater, tokens
from benchmarks.measure import write_results
from finetune.kernels.choose import choose, install
from finetune.kernels.trial import Place
from finetune.model.config import ModelConfig
from finetune.model.model import HybridMoEForCausalLM
from finetune.plan.recompute import described
from finetune.plan.working_memory import RUNTIME_DEVICE_BYTES
from finetune.plan.workload import FREE_FRACTION, GIB
from finetune.training.lora import inject


@dataclass(frozen=True)
class Case:
    """A number of layers, a micro-batch, and the available memory in GiB."""

    layers: int
    batch: int
    time: int
    gib: float


CASES = (
    Case(16, 1, 8192, 64),
    Case(16, 4, 4096, 72),
    Case(8, 4, 4096, 79),
    Case(8, 4, 4096, 40),
    Case(8, 1, 16384, 36),
    Case(8, 8, 4096, 48),
    Case(8, 1, 32768, 56),
    Case(8, 2, 2048, 34),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    config = ModelConfig.from_dict({**FULL, "num_hidden_layers": max(case.layers for case in CASES)})
    device = torch.device("cuda")
    with device:
        torch.set_default_dtype(torch.bfloat16)
        model = HybridMoEForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    install(model, choose(experts="auto", layers="auto", mixers="auto", place=Place(config, device, torch.bfloat16)))
    model.keep_router_logits = False
    inject(model, rank=RANK, alpha=ALPHA, dropout=0.0, targets=TARGETS, seed=0)
    model.train()
    rows = []
    for case in CASES:
        try:
            row = measure(model, case, device)
        except torch.OutOfMemoryError as error:
            row = {**asdict(case), "out_of_memory": str(error).splitlines()[0]}
        rows.append(row)
        date = datetime.datetime.now(datetime.UTC).date().isoformat()
        write_results(options.out, {"date": date, "rows": rows})  # after every row, in case of an interruption
        if "out_of_memory" in row:
            print(f"{case}: {row['out_of_memory']}", flush=True)
            continue
        print(
            f"{case.layers:3} layers {case.batch}x{case.time:<6} in {case.gib:.0f} GiB: again {row['recompute']};"
            f" plan {row['planned_gib']:.1f}, took {row['took_gib']:.1f} GiB, {row['milliseconds']:.0f} ms",
            flush=True,
        )
    # The allocator's fragmentation may exceed the planned room, which leaves a reserve for it, but not the limit.
    wrong = [
        row
        for row in rows
        if "out_of_memory" in row or row["allocated_gib"] > row["room_gib"] or row["took_gib"] > row["gib"]
    ]
    for row in wrong:
        print(f"MORE THAN THERE IS ROOM FOR: {row}")
    return 1 if wrong else 0


def measure(model: HybridMoEForCausalLM, case: Case, device: torch.device) -> dict[str, Any]:
    """Run two steps with the recompute that auto chooses; memory includes that of CUDA and kernels."""
    del model.model.layers[case.layers :]
    config = first_layers(model.settings, case.layers)
    limit = int(case.gib * GIB)
    made = planned(config, case.batch, case.time, limit)
    assert made.fits, case
    model.recompute = made.recompute
    fill(model)
    torch.cuda.empty_cache()
    # The allocator gets all of the memory except that of CUDA and kernels.
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (limit - RUNTIME_DEVICE_BYTES) / total))
    updater = Updater(model)
    ids = tokens(case.batch, case.time, config.vocab_size).to(device)
    generator = torch.Generator().manual_seed(0)
    segments = (torch.rand(ids.shape, generator=generator) < 1 / 512).long().cumsum(1).to(device)
    labels = torch.cat((ids[:, 1:], ids.new_full((len(ids), 1), -100)), dim=1)
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        output = model(ids, segments, labels=labels)
        assert output.loss_sum is not None
        (output.loss_sum / output.token_count).backward()
        del output
        updater.step()
        torch.cuda.synchronize()
        milliseconds = 1000 * (time.perf_counter() - began)
    free, all_bytes = torch.cuda.mem_get_info()
    beside = all_bytes - free - torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction(1.0)
    return {
        "layers": case.layers,
        "shape": f"{case.batch}x{case.time}",
        "gib": case.gib,
        "room_gib": round(case.gib * (1 - FREE_FRACTION), 2),
        "recompute": described(config, made.recompute),
        "planned_gib": round(made.rank_bytes / GIB, 2),
        "took_gib": round((torch.cuda.max_memory_reserved() + beside) / GIB, 2),
        "allocated_gib": round((torch.cuda.max_memory_allocated() + beside) / GIB, 2),
        "milliseconds": round(milliseconds, 1),
    }


if __name__ == "__main__":
    raise SystemExit(main())
