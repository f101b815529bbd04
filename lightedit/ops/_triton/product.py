"""A batch of matrix products of any floating-point dtypes and memory layouts, summed in float32 and rounded once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_DEPTH = 32


@triton.jit
def _product(
    a,
    b,
    out,
    height,
    width,
    depth,
    a_matrix,
    a_row,
    a_column,
    b_matrix,
    b_row,
    b_column,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """out[z] = a[z] b[z], a tile of it; out is contiguous."""
    down, across = tl.cdiv(height, ROWS), tl.cdiv(width, COLUMNS)
    z = (tl.program_id(0) // (down * across)).to(tl.int64)
    tile = tl.program_id(0) % (down * across)
    i = (tile // across * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    j = (tile % across * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for start in range(0, depth, DEPTH):
        k = (start + tl.arange(0, DEPTH)).to(tl.int64)
        at_a = a + z * a_matrix + i[:, None] * a_row + k[None, :] * a_column
        at_b = b + z * b_matrix + k[:, None] * b_row + j[None, :] * b_column
        x = tl.load(at_a, mask=(i < height)[:, None] & (k < depth)[None, :], other=0.0).to(tl.float32)
        y = tl.load(at_b, mask=(k < depth)[:, None] & (j < width)[None, :], other=0.0).to(tl.float32)
        total = tl.dot(x, y, total, input_precision="tf32x3")
    into = out + (z * height + i[:, None]) * width + j[None, :]
    tl.store(into, total.to(out.dtype.element_ty), mask=(i < height)[:, None] & (j < width)[None, :])


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b for a [batch, height, depth] and b [batch, depth, width]: [batch, height, width] in `dtype`.

    Each product of two float32 numbers is the sum of three of tensor cores, right to some 2^-21. They are summed there,
    which cuts off where a processor rounds.
    """
    batch, height, depth = a.shape
    width = b.shape[2]
    out = torch.empty(batch, height, width, dtype=dtype, device=a.device)
    if out.numel() == 0:
        return out
    rows, columns = (min(64, max(16, triton.next_power_of_2(size))) for size in (height, width))
    grid = (batch * triton.cdiv(height, rows) * triton.cdiv(width, columns),)
    _product[grid](
        a,
        b,
        out,
        height,
        width,
        depth,
        *a.stride(),
        *b.stride(),
        ROWS=rows,
        COLUMNS=columns,
        DEPTH=_DEPTH,
        num_warps=4,
        num_stages=3,
    )
    return out
