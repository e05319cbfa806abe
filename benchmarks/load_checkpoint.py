"""Loading a checkpoint of the released layout: bytes, memory and seconds, beside transformers and beside the disk.

    python -m benchmarks.load_checkpoint

Writes synthetic checkpoints with all tensor names of the released layout and 512 experts, then loads them in new
processes: by this project at expert parallel 1, 2 and 4 (all ranks simultaneously, and one alone), by transformers'
`from_pretrained` in 1 and 2 processes, and by plain sequential reads. Each with the files removed from the page cache
before the load (cold) and with them in it (warm). Prints a table and writes `benchmarks/results/load_checkpoint.json`.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from finetune.checkpoint.folder import write_json
from finetune.checkpoint.layout import stored_tensors
from finetune.checkpoint.released import released_config
from finetune.checkpoint.shards import Entry, open_checkpoint, write_shards
from finetune.checkpoint.weights import from_pretrained, match
from finetune.model.config import ModelConfig

RESULTS = Path(__file__).resolve().parent / "results" / "load_checkpoint.json"
SHARDS = 40
EXPERTS = 512
SAMPLE_SECONDS = 0.01
ONE_COPY = "1 process"
BLOCK_BYTES = 16 << 20
ALLOWANCE_BYTES = 1_000_000_000  # bound on a rank's peak memory: its shard, one tensor and this

Loader = Callable[[Path, range], nn.Module]


class Case(NamedTuple):
    """One way of loading: the loader, and the experts held by each of its simultaneous processes."""

    loader: str
    label: str
    shares: tuple[range, ...]


def scaled_config(*, layers: int, hidden: int, width: int, experts: int = EXPERTS, vocabulary: int = 16384) -> Any:
    """A model with the released proportions, except `hidden` and the experts' `width`."""
    return ModelConfig.from_dict(
        {
            "model_type": "qwen3_next",
            "vocab_size": vocabulary,
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "head_dim": hidden // 4,
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 8,
            "linear_key_head_dim": hidden // 8,
            "linear_value_head_dim": hidden // 8,
            "num_experts": experts,
            "num_experts_per_tok": min(10, experts),
            "moe_intermediate_size": width,
            "shared_expert_intermediate_size": width,
        }
    )


# The 80B has 48 layers, hidden 2048, width 512: 74,391 tensors, 163 GB, 2 MB for most of them.
SHAPES = {
    "every tensor, 1/65 of the bytes": scaled_config(layers=48, hidden=256, width=64),
    "1/12 of the tensors, 1/49 of the bytes": scaled_config(layers=4, hidden=1024, width=256),
}


def write_synthetic(folder: Path, config: ModelConfig, shards: int = SHARDS) -> None:
    """Write a checkpoint of `config` in bfloat16 with reproducible values that differ between tensors."""
    entries = {name: Entry(torch.bfloat16, slot.shape) for name, slot in stored_tensors(config).items()}
    largest = max(entry.numbers for entry in entries.values())
    pool = 0.02 * torch.randn(largest + 1_000_003, generator=torch.Generator().manual_seed(0))
    pool = pool.bfloat16()
    starts = {name: number * 7919 % 1_000_003 for number, name in enumerate(entries)}

    def read(name: str) -> Tensor:
        entry = entries[name]
        return pool[starts[name] :][: entry.numbers].view(entry.shape).clone()

    folder.mkdir(parents=True)
    write_json(folder / "config.json", released_config(config, torch.bfloat16))
    write_shards(folder, entries, read, sum(entry.size_bytes for entry in entries.values()) / shards)


def shard_bytes(folder: Path, experts: range) -> tuple[int, int]:
    """Bytes of the tensors that a rank holds, and of the largest one."""
    config = ModelConfig.from_folder(folder)
    stored = open_checkpoint(folder).tensors
    sizes = [
        stored[name].end - stored[name].start
        for name, slot in stored_tensors(config).items()
        if slot.expert is None or slot.expert in experts
    ]
    return sum(sizes), max(sizes)


def _ours(folder: Path, experts: range) -> nn.Module:
    return from_pretrained(folder, dtype=torch.bfloat16, experts=experts)


def _transformers(folder: Path, experts: range) -> nn.Module:
    from transformers import Qwen3NextForCausalLM  # imported here, to keep it out of our own ranks' memory
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    assert len(experts) == EXPERTS
    return Qwen3NextForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


LOADERS: dict[str, Loader] = {"this project": _ours, "transformers": _transformers}


def fingerprint(model: nn.Module, experts: range) -> tuple[int, int]:
    """Sums of checksums of the dense tensors and of the experts' matrices; the latter add up over ranks."""
    dense = routed = 0
    for name, parameter in model.named_parameters():
        values = parameter.detach()
        if ".mlp.experts." in name:
            routed += sum(_checksum(f"{name} {expert}", part) for expert, part in zip(experts, values, strict=True))
        else:
            dense += _checksum(name, values)
    return dense, routed


def _checksum(name: str, values: Tensor) -> int:
    return zlib.crc32(values.view(torch.uint8).numpy().data, zlib.crc32(name.encode()))


def _process(case: Case, number: int, warm_up: Path, folder: Path, pipe: Connection) -> None:
    """A loading process: reports ready, loads on request, reports, and holds the model until the next message."""
    loader, experts = LOADERS[case.loader], case.shares[number]
    loader(warm_up, range(EXPERTS))  # imports and first-use initialisation of torch
    pipe.send("ready")
    pipe.recv()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak
    before, resident, worked, began = _io(), _memory("self")["VmRSS"], time.process_time(), time.perf_counter()
    model = loader(folder, experts)
    seconds, worked, after = time.perf_counter() - began, time.process_time() - worked, _io()
    result = {
        "seconds": seconds,
        "processor_seconds": worked,
        "asked_bytes": after["rchar"] - before["rchar"],
        "disk_bytes": after["read_bytes"] - before["read_bytes"],
        "peak_bytes": _memory("self")["VmHWM"],
        "before_bytes": resident,
    }
    pipe.send(result)
    if pipe.recv() == "fingerprint":
        pipe.send(fingerprint(model, experts))


def _io() -> dict[str, int]:
    lines = Path("/proc/self/io").read_text().splitlines()
    return {name: int(value) for name, value in (line.split(": ") for line in lines)}


def _memory(process: str) -> dict[str, int]:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return {
        name: int(value.split()[0]) * 1024
        for name, value in (line.split(":", 1) for line in lines)
        if name in ("VmRSS", "VmHWM", "RssAnon")
    }


def run(case: Case, warm_up: Path, folder: Path, *, cold: bool, check: bool) -> dict[str, Any]:
    """Load once, in one new process for each share of the case, all started simultaneously."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for number in range(len(case.shares)):
        ours, theirs = context.Pipe()
        process = context.Process(target=_process, args=(case, number, warm_up, folder, theirs))
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    for pipe in pipes:
        assert pipe.recv() == "ready"
    _drop(folder) if cold else _read_all(folder, 1)
    for pipe in pipes:
        pipe.send("go")
    private = [0] * len(pipes)
    while not all(pipe.poll() for pipe in pipes):
        for number, process in enumerate(processes):
            private[number] = max(private[number], _memory(str(process.pid))["RssAnon"])
        time.sleep(SAMPLE_SECONDS)
    results = [pipe.recv() for pipe in pipes]
    for pipe in pipes:
        pipe.send("fingerprint" if check else "end")
    prints = [pipe.recv() for pipe in pipes] if check else []
    for process in processes:
        process.join()
        assert process.exitcode == 0
    return {
        "seconds": max(result["seconds"] for result in results),
        **{
            field: max(result[field] for result in results)
            for field in ("asked_bytes", "peak_bytes", "before_bytes", "disk_bytes")
        },
        "processor_seconds": sum(result["processor_seconds"] for result in results),
        "all_disk_bytes": sum(result["disk_bytes"] for result in results),
        "private_bytes": max(private),
        "fingerprints": prints,
    }


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _drop(folder: Path) -> None:
    """Remove the weights from the page cache."""
    for path in _files(folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _read_all(folder: Path, streams: int) -> float:
    """Seconds to read every byte once, sequentially, into a reused buffer."""

    def read(path: Path) -> None:
        block = memoryview(bytearray(BLOCK_BYTES))
        descriptor, at = os.open(path, os.O_RDONLY), 0
        while count := os.preadv(descriptor, [block], at):
            at += count
        os.close(descriptor)

    began = time.perf_counter()
    with ThreadPoolExecutor(streams) as pool:
        list(pool.map(read, _files(folder)))
    return time.perf_counter() - began


def cases() -> Iterator[Case]:
    """The measured cases, in the order of the table."""
    for size in (1, 2, 4):
        held = EXPERTS // size
        shares = tuple(range(first, first + held) for first in range(0, EXPERTS, held))
        yield Case("this project", f"EP {size}, {'one process' if size == 1 else 'all ranks at once'}", shares)
        if size > 1:
            yield Case("this project", f"EP {size}, one rank alone", shares[1:2])
    yield Case("transformers", ONE_COPY, (range(EXPERTS),))
    yield Case("transformers", "2 processes at once", (range(EXPERTS),) * 2)


def measure(folder: Path, warm_up: Path, repeats: int) -> dict[str, Any]:
    """Measure every case cold and warm, `repeats` times in turn, so that other load affects all of them."""
    samples: dict[tuple[str, Case], list[dict[str, Any]]] = {}
    raw: dict[str, dict[int, list[float]]] = {state: {1: [], 4: []} for state in ("cold", "warm")}
    opening = []
    for repeat in range(repeats):
        for state in ("cold", "warm"):
            for streams, seconds in raw[state].items():
                _drop(folder) if state == "cold" else _read_all(folder, 1)
                seconds.append(_read_all(folder, streams))
            for case in cases():
                print(f"  {repeat + 1}/{repeats} {state}: {case.loader}, {case.label}", file=sys.stderr, flush=True)
                check = repeat == 0 and state == "warm"
                found = run(case, warm_up, folder, cold=state == "cold", check=check)
                samples.setdefault((state, case), []).append(found)
        began = time.perf_counter()
        match(open_checkpoint(folder), ModelConfig.from_folder(folder))
        opening.append(time.perf_counter() - began)
    _compare({case: found[0]["fingerprints"] for (state, case), found in samples.items() if state == "warm"})
    total = sum(path.stat().st_size for path in _files(folder))
    disk = {
        state: total / min(statistics.median(seconds) for seconds in by_streams.values())
        for state, by_streams in raw.items()
    }
    return {
        "tensors": len(open_checkpoint(folder).tensors),
        "files": len(_files(folder)),
        "bytes": total,
        "open_and_match_seconds": statistics.median(opening),
        "sequential_bytes_per_second": disk,
        "sequential_seconds": raw,
        "rows": [_row(folder, state, case, found, disk[state]) for (state, case), found in samples.items()],
    }


def _compare(prints: dict[Case, list[tuple[int, int]]]) -> None:
    """Check that every complete set of ranks holds the values that transformers read."""
    truth = next(found[0] for case, found in prints.items() if case.loader == "transformers")
    for case, found in prints.items():
        assert {dense for dense, _ in found} == {truth[0]}, f"{case}: other dense values than transformers'"
        if case.loader == "this project" and sum(len(share) for share in case.shares) == EXPERTS:
            assert sum(routed for _, routed in found) == truth[1], f"{case}: other experts than transformers'"


def _row(folder: Path, state: str, case: Case, found: list[dict[str, Any]], disk: float) -> dict[str, Any]:
    """One row of the table: medians of times, maxima of memory and bytes."""
    shard, tensor = shard_bytes(folder, case.shares[0])
    held = sum(shard_bytes(folder, share)[0] for share in case.shares)
    seconds = statistics.median(sample["seconds"] for sample in found)
    peak = max(sample["peak_bytes"] for sample in found)
    return {
        "state": state,
        "loader": case.loader,
        "case": case.label,
        "seconds": seconds,
        "all_seconds": [round(sample["seconds"], 3) for sample in found],
        "processor_seconds": statistics.median(sample["processor_seconds"] for sample in found),
        "held_bytes_per_second": held / seconds,
        "of_sequential": held / seconds / disk,
        "shard_bytes": shard,
        "largest_tensor_bytes": tensor,
        "read_call_bytes": max(sample["asked_bytes"] for sample in found),
        "disk_bytes": max(sample["disk_bytes"] for sample in found),
        "all_disk_bytes": max(sample["all_disk_bytes"] for sample in found),
        "peak_rss_bytes": peak,
        "peak_private_bytes": max(sample["private_bytes"] for sample in found),
        "before_bytes": max(sample["before_bytes"] for sample in found),
        "within_bound": peak <= shard + tensor + ALLOWANCE_BYTES,
    }


def table(shape: str, measured: dict[str, Any]) -> str:
    """The results as a Markdown table."""
    disk = ", ".join(
        f"{state} {rate / 1e9:.2f} GB/s" for state, rate in measured["sequential_bytes_per_second"].items()
    )
    titles = [
        *("cache", "loader", "case", "s", "of transformers", "of sequential", "processor s", "shard GB", "asked GB"),
        *("from disk GB", "all ranks GB", "peak RSS GB", "peak private GB", "beside the shard GB"),
    ]
    lines = [
        f"{shape}: {measured['tensors']:,} tensors in {measured['files']} files, {measured['bytes'] / 1e9:.2f} GB; "
        f"index and headers {measured['open_and_match_seconds']:.2f} s; sequential reads: {disk}",
        "",
        f"| {' | '.join(titles)} |",
        "|---|---|---|" + "--:|" * (len(titles) - 3),
    ]
    reference = {row["state"]: row["seconds"] for row in measured["rows"] if row["case"] == ONE_COPY}
    for row in measured["rows"]:
        gigabytes = [
            row[field] / 1e9
            for field in (
                *("shard_bytes", "read_call_bytes", "disk_bytes", "all_disk_bytes"),
                *("peak_rss_bytes", "peak_private_bytes"),
            )
        ]
        figures = [
            *(row["seconds"], row["seconds"] / reference[row["state"]], row["of_sequential"]),
            *(row["processor_seconds"], *gigabytes, (row["peak_rss_bytes"] - row["shard_bytes"]) / 1e9),
        ]
        cells = [row["state"], row["loader"], row["case"], *(f"{figure:.2f}" for figure in figures)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """The machine and the versions of the measurement."""
    processor = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average_at_start": os.getloadavg()[0],
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "safetensors", "transformers")},
    }


def main() -> None:
    """Write the checkpoints, measure, print and record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--folder", type=Path, help="where 6 GB of checkpoints go, on the disk to measure")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    recorded: dict[str, Any] = {
        "command": f"python -m benchmarks.load_checkpoint --repeats {arguments.repeats}",
        "date": date.today().isoformat(),
        "machine": machine(),
        "shapes": {},
    }
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        warm_up = Path(scratch) / "warm-up"
        write_synthetic(warm_up, scaled_config(layers=4, hidden=64, width=1), shards=2)
        for number, (shape, config) in enumerate(SHAPES.items()):
            folder = Path(scratch) / str(number)
            print(f"writing {shape}", file=sys.stderr, flush=True)
            write_synthetic(folder, config)
            recorded["shapes"][shape] = measure(folder, warm_up, arguments.repeats)
    tables = [table(shape, measured) for shape, measured in recorded["shapes"].items()]
    print("\n\n".join(tables))
    print(f"\n{recorded['command']}; {recorded['date']}; {json.dumps(recorded['machine'])}")
    RESULTS.parent.mkdir(exist_ok=True)
    write_json(RESULTS, recorded)


if __name__ == "__main__":
    main()
