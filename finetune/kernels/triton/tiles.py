"""Tiles of a grouped product: how the rows of every expert are split, and how a kernel reads a tile of rows or weights.

A program computes one tile: rows of one expert and a block of columns. The tile has half the height if the expert has
no more rows left than that. Weights, and rows that are not gathered, are read by tensor descriptor (TMA on Hopper) if
their strides allow it, otherwise by pointers. Loads beyond the last column give zeros or wrap around; loads beyond the
expert's last row give another row. Neither is stored.
"""

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Int
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


class Sizes(NamedTuple):
    """Tile sizes and launch parameters of a grouped product."""

    rows: int
    columns: int  # of gate and of up each, if they are computed together
    depth: int
    warps: int
    stages: int


class Rows(NamedTuple):
    """Assignment of rows to experts, and their tiles."""

    slot: Int[Tensor, " rows"] | None  # (token, choice) of each sorted row; None: already sorted
    top_k: int
    starts: Int[Tensor, " experts_and_one"]  # first row of each expert, then the number of rows
    tiles: Int[Tensor, "tiles 3"]  # int32: expert, first row, end of the expert's rows; 0, 0, 0 if unused
    rows: int


def cut(slot: Tensor | None, top_k: int, rows_per_expert: Tensor, rows: int, dtype: torch.dtype) -> Rows:
    """Split every expert's rows into tiles. Allocates the largest possible number, to avoid a host synchronisation."""
    experts, side = len(rows_per_expert), row_side(dtype)
    most = rows // side + min(experts, rows)
    starts = rows_per_expert.new_empty(experts + 1)
    tiles = rows_per_expert.new_empty(most, 3, dtype=torch.int32)
    _cut_kernel[(experts + 1,)](
        rows_per_expert, starts, tiles, experts, most,
        SIDE=side, EXPERTS=triton.next_power_of_2(experts + 1), BLOCK=128, num_warps=4,
    )  # fmt: skip
    return Rows(slot, top_k, starts, tiles, rows)


def row_side(dtype: torch.dtype) -> int:
    """Rows of a whole tile. The last tile of an expert has half the height if its rows fit."""
    return 32 if dtype == torch.float32 else 128


def sizes_of(kind: str, dtype: torch.dtype, *, columns: int) -> Sizes:
    """Tile sizes of one product, measured on a Hopper GPU (benchmarks/moe_layer.py)."""
    if dtype == torch.float32:
        sizes = Sizes(row_side(dtype), 32, 32, 4, 2)
    else:
        # Four stages of 128 x 64 and 256 x 64 elements fill the shared memory of a multiprocessor.
        sizes = Sizes(row_side(dtype), 128 if kind == "up" else 256, 64, 8, 4)
    return sizes._replace(columns=min(sizes.columns, max(16, triton.next_power_of_2(columns))))


def left_operand(
    x: Tensor, rows: Rows, sizes: Sizes, *, gathered: bool
) -> tuple[Tensor | TensorDescriptor, Tensor | TensorDescriptor, str]:
    """The row operand of a whole tile, that of half a tile, and the access mode.

    Modes: "tokens" (gathered by token), "descriptor" (consecutive, aligned rows), "rows" (pointers).
    """
    if gathered and rows.slot is not None:
        return x, x, "tokens"
    if _is_aligned(x):
        whole, half = (TensorDescriptor.from_tensor(x, [side, sizes.depth]) for side in (sizes.rows, sizes.rows // 2))
        return whole, half, "descriptor"
    return x, x, "rows"


def right_operand(weight: Tensor, sizes: Sizes) -> tuple[Tensor | TensorDescriptor, str]:
    """The operand for tiles of W_e, (experts, columns, depth), and the access mode BY of `weight_tile`."""
    if _is_aligned(weight):
        return TensorDescriptor.from_tensor(weight, [1, sizes.columns, sizes.depth]), "columns"
    if _is_aligned(weight.transpose(1, 2)):
        return TensorDescriptor.from_tensor(weight.transpose(1, 2), [1, sizes.depth, sizes.columns]), "rows"
    return weight, "pointers"


def pair_operand(weight: Tensor, sizes: Sizes) -> tuple[Tensor | TensorDescriptor, str]:
    """As `right_operand`, for W_e = gate | up, (experts, 2 x width, depth): a tile has the same columns of both."""
    pairs = weight.unflatten(1, (2, -1))
    if _is_aligned(pairs):
        return TensorDescriptor.from_tensor(pairs, [1, 2, sizes.columns, sizes.depth]), "columns"
    pairs = pairs.permute(0, 3, 1, 2)
    if _is_aligned(pairs):
        return TensorDescriptor.from_tensor(pairs, [1, sizes.depth, 2, sizes.columns]), "rows"
    return weight, "pointers"


def _is_aligned(x: Tensor) -> bool:
    bytes_apart = [stride * x.element_size() for stride in x.stride()[:-1]]
    return x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(apart % 16 == 0 for apart in bytes_apart)


def strides(factor: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if factor is None else factor.stride()  # type: ignore[return-value]


def constants(sizes: Sizes, depth: int, thin: Tensor | None) -> dict[str, int | bool]:
    rank = 0 if thin is None else thin.shape[1]
    return {
        "BM": sizes.rows, "BN": sizes.columns, "BK": sizes.depth, "EVEN": depth % sizes.depth == 0,
        "RANK": rank, "RANKS": max(16, triton.next_power_of_2(rank)) if rank else 0,
        "num_warps": sizes.warps, "num_stages": sizes.stages,
    }  # fmt: skip


@triton.jit
@no_type_check
def _cut_kernel(rows_per_expert, starts, tiles, experts, most, SIDE: tl.constexpr, EXPERTS: tl.constexpr,
                BLOCK: tl.constexpr):  # fmt: skip
    """Start and tiles of one expert; the program after the last expert marks the remaining tiles as unused."""
    expert, at = tl.program_id(0), tl.arange(0, EXPERTS)
    count = tl.load(rows_per_expert + at, mask=at < experts, other=0)
    before = at < expert
    start = tl.sum(tl.where(before, count, 0))
    place = tl.sum(tl.where(before, (count + SIDE - 1) // SIDE, 0))
    end = start + tl.sum(tl.where(at == expert, count, 0))
    tl.store(starts + expert, start)
    number = tl.where(expert < experts, (end - start + SIDE - 1) // SIDE, most - place)
    for offset in range(0, number, BLOCK):
        tile = offset + tl.arange(0, BLOCK)
        mask, used = tile < number, (tile >= 0) & (expert < experts)
        to = tiles + (place + tile) * 3
        tl.store(to, tl.where(used, expert, 0), mask=mask)
        tl.store(to + 1, tl.where(used, start + tile * SIDE, 0).to(tl.int32), mask=mask)
        tl.store(to + 2, tl.where(used, end, 0).to(tl.int32), mask=mask)


@triton.jit
@no_type_check
def tile_place(tiles, columns, BN: tl.constexpr):
    """Expert, first column, first row and end of the expert's rows of this program's tile; rows 0 to 0 if unused."""
    blocks = tl.cdiv(columns, BN)
    tile, block = tiles + tl.program_id(0) // blocks * 3, tl.program_id(0) % blocks
    expert = tl.load(tile).to(tl.int64)
    return expert, block * BN, tl.load(tile + 1).to(tl.int64), tl.load(tile + 2).to(tl.int64)


@triton.jit
@no_type_check
def weight_tile(weight, expert, column, k, columns, depth, e_stride, n_stride, k_stride,
                 BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, BY: tl.constexpr):  # fmt: skip
    """Tile (BK, BN) of W_e^T at (k, column). BY: descriptor over W ("columns") or W^T ("rows"), or "pointers"."""
    if BY == "columns":
        tile = weight.load([expert.to(tl.int32), column, k]).reshape(BN, BK).T
    elif BY == "rows":
        tile = weight.load([expert.to(tl.int32), k, column]).reshape(BK, BN)
    else:
        at = k + tl.arange(0, BK)
        inside = (column + tl.arange(0, BN)) % columns
        place = weight + expert * e_stride + inside[None, :] * n_stride + at[:, None] * k_stride
        if EVEN:
            tile = tl.load(place)
        else:
            tile = tl.load(place, mask=(at < depth)[:, None], other=0.0)
    return tile


@triton.jit
@no_type_check
def pair_tile(weight, expert, column, k, width, depth, e_stride, n_stride, k_stride,
              BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, BY: tl.constexpr):  # fmt: skip
    """BN columns of gate and the same of up, concatenated, (BK, 2 BN), read as by `weight_tile`."""
    if BY == "columns":
        tile = weight.load([expert.to(tl.int32), 0, column, k]).reshape(2 * BN, BK).T
    elif BY == "rows":
        tile = weight.load([expert.to(tl.int32), k, 0, column]).reshape(BK, 2 * BN)
    else:
        at, side = k + tl.arange(0, BK), tl.arange(0, 2 * BN)
        inside = (side // BN) * width + (column + side % BN) % width
        place = weight + expert * e_stride + inside[None, :] * n_stride + at[:, None] * k_stride
        if EVEN:
            tile = tl.load(place)
        else:
            tile = tl.load(place, mask=(at < depth)[:, None], other=0.0)
    return tile


@triton.jit
@no_type_check
def row_tile(x, source, row, k, depth, BK: tl.constexpr, EVEN: tl.constexpr, OF: tl.constexpr):
    """Tile (BM, BK) of x: rows `source` by pointers, or rows from `row` on by descriptor."""
    if OF != "descriptor":
        at = k + tl.arange(0, BK)
        place = x + source[:, None] * depth + at[None, :]
        if EVEN:
            tile = tl.load(place)
        else:
            tile = tl.load(place, mask=(at < depth)[None, :], other=0.0)
    else:
        tile = x.load([row.to(tl.int32), k])
    return tile


@triton.jit
@no_type_check
def add_thin(acc, thin, factor, row, expert, column, e_stride, n_stride, r_stride, RANK: tl.constexpr,
              RANKS: tl.constexpr):  # fmt: skip
    """acc + thin factor_e^T."""
    at = tl.arange(0, RANKS)
    left = tl.load(thin + row[:, None] * RANK + at[None, :], mask=at[None, :] < RANK, other=0.0)
    right = factor + expert * e_stride + column[None, :] * n_stride + at[:, None] * r_stride
    return tl.dot(left, tl.load(right, mask=at[:, None] < RANK, other=0.0), acc, input_precision="ieee")
