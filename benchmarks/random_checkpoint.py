"""A checkpoint of the released layout with random weights, written as fast as the disk takes it.

    python -m benchmarks.random_checkpoint FOLDER --layers 12

Names, shapes, dtypes, sharding and `config.json` are those of Qwen3-Coder-Next. The tokenizer is that of
`recipes/base`, whose ids are a subset of the vocabulary. Every matrix is a different section of one pool of normally
distributed numbers.
"""

import argparse
import json
import math
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from finetune.checkpoint.folder import write_json
from finetune.checkpoint.layout import Shape, stored_tensors
from finetune.checkpoint.shards import INDEX
from finetune.model.config import ModelConfig

CHECKOUT = Path(__file__).resolve().parent.parent
REFERENCE = CHECKOUT / "recipes" / "reference" / "qwen3-coder-next.json"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
SHARD_BYTES = 4e9
POOL_NUMBERS = 50_000_017  # a prime, so that multiples of a step modulo it, the offsets, repeat late
STANDARD_DEVIATION = 0.02  # of matrices, as in the released models' initialisation
BFLOAT16_BYTES = 2

Bytes = NDArray[np.uint8]


def write_random_checkpoint(folder: Path, values: dict[str, object], *, threads: int | None = None) -> int:
    """Write the checkpoint; returns its size in bytes.

    Args:
        values: contents of `config.json`.
        threads: number of files written in parallel; by default the number of cores.

    Raises:
        OSError: not enough space on the disk.
    """
    config = ModelConfig.from_dict(values)
    shapes = {name: slot.shape for name, slot in stored_tensors(config).items()}
    size = BFLOAT16_BYTES * sum(map(math.prod, shapes.values()))
    folder.mkdir(parents=True)
    free = shutil.disk_usage(folder).free
    if free < 1.02 * size:
        raise OSError(f"{folder}: the checkpoint takes {size / 1e9:.0f} GB, the disk has {free / 1e9:.0f} GB free")
    for name in TOKENIZER:
        shutil.copyfile(CHECKOUT / "recipes" / "base" / name, folder / name)
    write_json(folder / "config.json", values)
    shards = _shards(shapes)
    pool = _pool(torch.randn(POOL_NUMBERS, generator=torch.Generator().manual_seed(0)) * STANDARD_DEVIATION)
    numbers = {name: number for number, name in enumerate(shapes)}
    files = [f"model-{place:05d}-of-{len(shards):05d}.safetensors" for place in range(1, len(shards) + 1)]

    def write(file: str, names: list[str]) -> None:
        _write_shard(folder / file, {name: shapes[name] for name in names}, numbers, pool)

    with ThreadPoolExecutor(threads or os.cpu_count()) as workers:
        list(workers.map(write, files, shards))
    places = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))})
    return size


def _shards(shapes: dict[str, Shape]) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        size = BFLOAT16_BYTES * math.prod(shape)
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _write_shard(path: Path, shapes: dict[str, Shape], numbers: dict[str, int], pool: Bytes) -> None:
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + BFLOAT16_BYTES * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb", buffering=0) as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, shape in shapes.items():
            _write_values(file.fileno(), _values(name, shape, numbers[name], pool), BFLOAT16_BYTES * math.prod(shape))


def _values(name: str, shape: Shape, number: int, pool: Bytes) -> Bytes:
    """Bytes of a tensor's values; the caller repeats them if they are fewer than the tensor's."""
    last = name.rpartition(".weight")[0].rpartition(".")[2] or name.rpartition(".")[2]
    generator = torch.Generator().manual_seed(number)
    count = math.prod(shape)
    if last == "A_log":  # decay rates between 1 and 16
        return _pool(torch.empty(count).uniform_(1, 16, generator=generator).log_())
    if last == "dt_bias":
        return _pool(torch.empty(count).normal_(-2, 1, generator=generator))
    if last == "conv1d":
        return _pool(torch.empty(count).uniform_(-0.5, 0.5, generator=generator))
    if len(shape) == 1:  # norms: DeltaNet's multiplies by its weight, the others by 1 + weight
        return _pool(torch.empty(count).normal_(float(".linear_attn." in name), 0.05, generator=generator))
    start = BFLOAT16_BYTES * (number * 7_368_787 % POOL_NUMBERS)
    return np.concatenate((pool[start:], pool[:start])) if BFLOAT16_BYTES * count > len(pool) - start else pool[start:]


def _pool(values: torch.Tensor) -> Bytes:
    return values.bfloat16().view(torch.uint8).numpy()


def _write_values(descriptor: int, values: Bytes, size: int) -> None:
    while size:
        size -= os.write(descriptor, values[: min(size, len(values))].data)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=48)
    options = parser.parse_args()
    began = time.perf_counter()
    values = {**json.loads(REFERENCE.read_text(encoding="utf-8")), "num_hidden_layers": options.layers}
    size = write_random_checkpoint(options.folder, values)
    seconds = time.perf_counter() - began
    print(f"{options.folder}: {size / 1e9:.1f} GB in {seconds:.1f} s ({size / seconds / 1e9:.1f} GB/s)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
