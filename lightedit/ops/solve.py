"""The closed form of step 2 for facts whose keys went through the preservation term."""

import math

import torch
from torch import Tensor

from lightedit.ops._precision import whole_float32


def preservation_memorization_solve(keys: Tensor, solved: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """right = X (γ I + Kᵀ X)⁻¹, with X = A⁻¹ K.

    With residuals R, ΔW = R rightᵀ is the update. Past keys are part of A. Leading dimensions are
    systems of their own, such as a sweep of λ, or single edits that share one A and so one solve for all their X. On a
    GPU, kernels of our own solve systems of at most 128 facts, those in Triton in float32 only; others are left to the
    vendor's libraries.

        >>> keys = solved = torch.tensor([[2.0], [0.0]])  # A = I
        >>> preservation_memorization_solve(keys, solved, gamma=0.0)
        (tensor([[0.5000],
                [0.0000]]), tensor([1.]))

    Args:
        keys: K, [..., d, B], float32 or float64.
        solved: X, of the same shape and dtype.
        gamma: γ >= 0.

    Returns:
        right, [..., d, B]; and pivots [..., B]: of what each key is in the metric of the system, the share that is not
        in the span of the keys before it, from 0 to 1. Where a system is not positive definite, or holds NaN or
        infinity, its pivots are 0 and its right is NaN.

    Raises:
        ValueError: a shape, dtype or device does not fit, or γ is negative or not finite.
    """
    _check(keys, solved, gamma)
    with whole_float32(keys.device):
        result: tuple[Tensor, Tensor] = _op(keys, solved, gamma)
    return result


def _check(keys: Tensor, solved: Tensor, gamma: float) -> None:
    if keys.ndim < 2 or keys.shape != solved.shape:
        raise ValueError(f"keys and solved are both [..., d, B], got {list(keys.shape)} and {list(solved.shape)}")
    if keys.dtype not in (torch.float32, torch.float64) or keys.dtype != solved.dtype:
        raise ValueError(f"keys and solved are both float32 or both float64, got {keys.dtype} and {solved.dtype}")
    if keys.device != solved.device:
        raise ValueError(f"keys and solved must be on one device, got {keys.device} and {solved.device}")
    if not (math.isfinite(gamma) and gamma >= 0):
        raise ValueError(f"gamma is finite and at least 0, got {gamma}")


def reference(keys: Tensor, solved: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """The op in torch's own operations."""
    system = keys.mT @ solved
    system.diagonal(dim1=-2, dim2=-1).add_(gamma)
    factor, info = torch.linalg.cholesky_ex(system)
    pivots = factor.diagonal(dim1=-2, dim2=-1).square() / system.diagonal(dim1=-2, dim2=-1)
    half = torch.linalg.solve_triangular(factor.mT, solved, upper=True, left=False)
    right = torch.linalg.solve_triangular(factor, half, upper=False, left=False)
    bad = (info != 0) | ~pivots.isfinite().all(-1) | ~right.isfinite().all(-1).all(-1)
    right = right.masked_fill(bad[..., None, None], torch.nan)
    return right.contiguous(), pivots.masked_fill(bad[..., None], 0.0)


_op = torch.library.custom_op("lightedit::preservation_memorization_solve", reference, mutates_args=())


@_op.register_fake
def _(keys: Tensor, solved: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    _check(keys, solved, gamma)
    return keys.new_empty(keys.shape), keys.new_empty((*keys.shape[:-2], keys.shape[-1]))
