"""The low-rank addition in Triton: one read and one write of the weight, a tile at a time."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightedit.ops.add_low_rank import reference

_ROWS, _COLUMNS = 64, 128  # of a tile of the weight


@triton.jit
def _add_low_rank(
    weight,
    left,
    right,
    total,
    d_out,
    d_in,
    rank,
    weight_row,
    weight_column,
    left_row,
    left_column,
    right_row,
    right_column,
    total_row,
    total_column,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """sum = (total or weight) + left rightᵀ for a tile; total = sum, weight = cast(sum)."""
    across = tl.cdiv(d_in, COLUMNS)
    i = (tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    j = (tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    inside = (i < d_out)[:, None] & (j < d_in)[None, :]
    into = weight + i[:, None] * weight_row + j[None, :] * weight_column
    kept = into
    if total is not None:
        kept = total + i[:, None] * total_row + j[None, :] * total_column
    before = tl.load(kept, mask=inside, other=0.0).to(tl.float32)  # on its way while the product is made
    product = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for start in range(0, rank, DEPTH):
        k = (start + tl.arange(0, DEPTH)).to(tl.int64)
        at_left = left + i[:, None] * left_row + k[None, :] * left_column
        at_right = right + j[None, :] * right_row + k[:, None] * right_column
        a = tl.load(at_left, mask=(i < d_out)[:, None] & (k < rank)[None, :], other=0.0).to(tl.float32)
        b = tl.load(at_right, mask=(j < d_in)[None, :] & (k < rank)[:, None], other=0.0).to(tl.float32)
        product = tl.dot(a, b, product, input_precision="tf32x3")
    after = before + product
    if total is not None:
        tl.store(kept, after, mask=inside)
    tl.store(into, after.to(weight.dtype.element_ty), mask=inside)


def run(weight: Tensor, left: Tensor, right: Tensor, total: Tensor | None) -> None:
    """`add_low_rank_` for weights of float16, bfloat16 and float32; a float64 weight goes to the reference.

    Each product of two float32 numbers is the sum of three of tensor cores, right to some 2^-21. They are summed
    there, which cuts off where a processor rounds.
    """
    if weight.dtype == torch.float64:
        reference(weight, left, right, total)
        return
    d_out, d_in = weight.shape
    rank = left.shape[1]
    if weight.numel() == 0:
        return
    grid = (triton.cdiv(d_out, _ROWS) * triton.cdiv(d_in, _COLUMNS),)
    _add_low_rank[grid](
        weight,
        left,
        right,
        total,
        d_out,
        d_in,
        rank,
        *weight.stride(),
        *left.stride(),
        *right.stride(),
        *((0, 0) if total is None else total.stride()),
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
        DEPTH=16 if rank <= 16 else 32,
        num_warps=8,  # with 4 the sums of a tile do not fit into the registers
        num_stages=2,
    )
