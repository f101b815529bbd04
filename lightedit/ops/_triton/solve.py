"""The closed form of step 2 in Triton: each small system is formed, factored and inverted by one program."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightedit.ops._triton.product import product
from lightedit.ops.solve import reference

_LARGEST = 128  # facts of a system that a program holds


@triton.jit
def _factor(
    keys,
    solved,
    gamma,
    inverse,
    pivots,
    d,
    size,
    keys_system,
    keys_row,
    keys_column,
    solved_system,
    solved_row,
    solved_column,
    SIZE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """S = γ I + Kᵀ X = L Lᵀ, from its lower triangle: L⁻¹, and L[j, j]² / S[j, j], which are 0 where there is no L."""
    s = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, SIZE)
    within = i < size
    system = tl.zeros([SIZE, SIZE], dtype=tl.float32)
    for start in range(0, d, DEPTH):
        k = (start + tl.arange(0, DEPTH)).to(tl.int64)
        inside = (k < d)[:, None] & within[None, :]
        a = tl.load(keys + s * keys_system + k[:, None] * keys_row + i[None, :] * keys_column, mask=inside, other=0.0)
        b = tl.load(
            solved + s * solved_system + k[:, None] * solved_row + i[None, :] * solved_column, mask=inside, other=0.0
        )
        system = tl.dot(tl.trans(a), b, system, input_precision="tf32x3")
    row, column = i[:, None], i[None, :]
    system = tl.where(row >= column, system, tl.trans(system))
    system += tl.where(row == column, gamma, 0.0)
    whole = tl.sum(tl.where(row == column, system, 0.0), axis=1)
    lower = tl.where(row == column, 1.0, 0.0)
    shares = tl.zeros([SIZE], dtype=tl.float32)
    bad = 0
    for j in range(0, size):
        # Row and column j, equal because the system stays symmetric to the bit
        across = tl.sum(tl.where(row == j, system, 0.0), axis=0)
        down = tl.sum(tl.where(column == j, system, 0.0), axis=1)
        pivot = tl.sum(tl.where(i == j, across, 0.0), axis=0)
        share = pivot / tl.sum(tl.where(i == j, whole, 0.0), axis=0)
        bad = tl.where((pivot > 0.0) & (share < float("inf")), bad, 1)
        shares = tl.where(i == j, share, shares)
        root = tl.sqrt_rn(pivot)
        across, down = across / root, down / root
        line = tl.sum(tl.where(row == j, lower, 0.0), axis=0) / root
        system = tl.where((row > j) & (column > j), system - down[:, None] * across[None, :], system)
        lower = tl.where(row > j, lower - down[:, None] * line[None, :], tl.where(row == j, line[None, :], lower))
    both = within[:, None] & within[None, :]
    tl.store(inverse + (s * size + row) * size + column, lower, mask=both)
    tl.store(pivots + s * size + i, tl.where(bad == 0, shares, 0.0), mask=within)


def run(keys: Tensor, solved: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """`preservation_memorization_solve` for float32 systems of at most 128 facts; others go to the reference.

    right = X L⁻ᵀ L⁻¹ with L⁻¹ [B, B] of each system from one kernel, and the products from another. Larger systems are
    left to the vendor's libraries, and float64 too, for which tensor cores have no three-part product.
    """
    d, size = keys.shape[-2:]
    if keys.dtype == torch.float64 or size > _LARGEST:
        return reference(keys, solved, gamma)
    k, x = (tensor.reshape(math.prod(keys.shape[:-2]), d, size) for tensor in (keys, solved))
    inverse, pivots = keys.new_empty(len(k), size, size), keys.new_empty(len(k), size)
    if pivots.numel():
        padded = max(16, triton.next_power_of_2(size))
        _factor[(len(k),)](
            k,
            x,
            gamma,
            inverse,
            pivots,
            d,
            size,
            *k.stride(),
            *x.stride(),
            SIZE=padded,
            DEPTH=32,
            num_warps=4 if padded <= 32 else 8 if padded == 64 else 16,
            num_stages=2,
        )
    right = product(product(x, inverse.mT, torch.float32), inverse, torch.float32)
    bad = (pivots == 0).any(-1) | ~right.isfinite().flatten(1).all(-1)
    right.masked_fill_(bad[:, None, None], torch.nan)
    pivots.masked_fill_(bad[:, None], 0.0)
    return right.view(keys.shape), pivots.view(*keys.shape[:-2], size)
