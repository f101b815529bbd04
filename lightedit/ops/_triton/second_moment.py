"""The second moment in Triton: tiles of the lower triangle, each summed by one program in a fixed order."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightedit.ops.second_moment import reference


@dataclass(frozen=True)
class Tiles:
    """How the work is cut.

    Attributes:
        rows: of a tile of gram, per program.
        columns: likewise.
        depth: keys of one product.
        segment: keys that are summed before they are added to gram. Tensor cores cut off what a sum cannot hold where a
            processor rounds it, so long sums would come out too small: by some 1e-5 of their value at 8192 keys.
        warps: per program.
        stages: of the loop over the keys, in flight at one time.
    """

    rows: int = 128
    columns: int = 256
    depth: int = 64
    segment: int = 4096
    warps: int = 8
    stages: int = 3


_HALF = Tiles()  # float16 and bfloat16
_SMALL = Tiles(columns=128, warps=4)  # the same for a gram of fewer tiles than there are multiprocessors
_SINGLE = Tiles(columns=64, depth=32, segment=512, stages=2)
_SIDE = 2048  # of the squares in which tiles are visited, so that tiles at work together read the same keys


@triton.jit
def _second_moment(
    gram,
    keys,
    mask,
    d,
    n,
    gram_row,
    gram_column,
    key_row,
    key_column,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    SEGMENT: tl.constexpr,
    SIDE: tl.constexpr,
):
    """gram[i, j] += Σ_t keys[t, i] keys[t, j] for a tile of i >= j, t where mask[t]."""
    DOWN: tl.constexpr = SIDE // ROWS
    SQUARE: tl.constexpr = DOWN * (SIDE // COLUMNS)
    square = tl.program_id(0) // SQUARE
    tile = tl.program_id(0) % SQUARE
    # Squares of the triangle are counted row by row; the root is off by one at most
    band = ((tl.sqrt(8.0 * square + 1.0) - 1.0) / 2.0).to(tl.int32)
    band -= (band * (band + 1) // 2 > square).to(tl.int32)
    band += ((band + 1) * (band + 2) // 2 <= square).to(tl.int32)
    top = band * SIDE + tile % DOWN * ROWS
    left = (square - band * (band + 1) // 2) * SIDE + tile // DOWN * COLUMNS
    if (top >= d) | (left >= d) | (left >= top + ROWS):
        return
    i = (top + tl.arange(0, ROWS)).to(tl.int64)
    j = (left + tl.arange(0, COLUMNS)).to(tl.int64)
    out = gram + i[:, None] * gram_row + j[None, :] * gram_column
    below = (i[:, None] >= j[None, :]) & (i < d)[:, None]
    for start in range(0, n, SEGMENT):
        total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
        for first in range(start, tl.minimum(start + SEGMENT, n), DEPTH):
            t = (first + tl.arange(0, DEPTH)).to(tl.int64)
            counts = t < tl.minimum(start + SEGMENT, n)
            if mask is not None:
                counts = tl.load(mask + t, mask=counts, other=0) != 0
            at = keys + t[:, None] * key_row
            a = tl.load(at + i[None, :] * key_column, mask=counts[:, None] & (i < d)[None, :], other=0.0)
            b = tl.load(at + j[None, :] * key_column, mask=counts[:, None] & (j < d)[None, :], other=0.0)
            total = tl.dot(tl.trans(a), b, total, input_precision="tf32x3")
        before = tl.load(out, mask=below, other=0.0)
        tl.store(out, before + total.to(before.dtype), mask=below)


def run(gram: Tensor, keys: Tensor, mask: Tensor | None, tiles: Tiles | None = None, side: int = _SIDE) -> None:
    """`second_moment_` for keys of float16, bfloat16 and float32; float64 keys go to the reference.

    Products of float16 and bfloat16 keys are exact. Those of float32 keys are sums of three products of tensor cores,
    right to some 2^-21. The same call gives the same bits: no sum is split between programs.
    """
    d, n = len(gram), len(keys)
    if keys.dtype == torch.float64:
        reference(gram, keys, mask)
        return
    if d == 0 or n == 0:
        return
    if tiles is None:
        tiles = _SINGLE if keys.dtype == torch.float32 else _SMALL if d <= _SIDE else _HALF
    squares = -(-d // side)
    grid = (squares * (squares + 1) // 2 * (side // tiles.rows) * (side // tiles.columns),)
    _second_moment[grid](
        gram,
        keys,
        None if mask is None else mask.contiguous().view(torch.uint8),
        d,
        n,
        *gram.stride(),
        *keys.stride(),
        ROWS=tiles.rows,
        COLUMNS=tiles.columns,
        DEPTH=tiles.depth,
        SEGMENT=tiles.segment,
        SIDE=side,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
