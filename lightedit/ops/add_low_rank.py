"""A low-rank change written into a matrix of any floating-point dtype with one rounding."""

import torch
from torch import Tensor

from lightedit.ops._precision import whole_float32


def add_low_rank_(weight: Tensor, left: Tensor, right: Tensor, total: Tensor | None = None) -> None:
    """weight = cast(weight + left rightᵀ), summed in float32, or in float64 for a float64 weight, and rounded once.

    With `total`, which holds the weight unrounded, the sum goes on there: total += left rightᵀ, weight = cast(total).
    Many small updates of a bfloat16 weight then add up, where each alone would be lost.

        >>> weight = torch.zeros(2, 3, dtype=torch.bfloat16)
        >>> add_low_rank_(weight, torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [0.0], [3.0]]))
        >>> weight
        tensor([[1., 0., 3.],
                [2., 0., 6.]], dtype=torch.bfloat16)

    The same values give the same bits in whatever memory layout the factors are. NaN and infinity spread as in a
    product.

    Args:
        weight: [d_out, d_in] of any floating-point dtype.
        left: [d_out, B], floating-point; taken in the precision of the sum.
        right: [d_in, B], likewise.
        total: [d_out, d_in] in the precision of the sum, float32 for a float16 or bfloat16 weight.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    _check(weight, left, right, total)
    with whole_float32(weight.device):
        _op(weight, left, right, total)


def _check(weight: Tensor, left: Tensor, right: Tensor, total: Tensor | None) -> None:
    given = [weight, left, right] if total is None else [weight, left, right, total]
    shapes = [list(tensor.shape) for tensor in given]
    fits = all(len(shape) == 2 for shape in shapes) and shapes[0] == [len(left), len(right)]
    if not fits or left.shape[1] != right.shape[1] or (total is not None and total.shape != weight.shape):
        raise ValueError(
            "expected weight [d_out, d_in], left [d_out, B], right [d_in, B] and total [d_out, d_in] or None, got "
            + ", ".join(map(str, shapes))
        )
    if not all(tensor.is_floating_point() for tensor in given):
        raise ValueError(f"all are of floating-point dtypes, got {', '.join(str(tensor.dtype) for tensor in given)}")
    if total is not None and (total.dtype == weight.dtype or total.dtype != sum_dtype(weight)):
        raise ValueError(
            f"total is float32 for a float16 or bfloat16 weight, and None for others; got {total.dtype} for a weight "
            f"of {weight.dtype}"
        )
    devices = {tensor.device for tensor in given}
    if len(devices) > 1:
        raise ValueError(f"weight and factors must be on one device, got {', '.join(sorted(map(str, devices)))}")


def sum_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which a weight's updates are summed: float32, or float64 for a float64 weight."""
    return torch.promote_types(weight.dtype, torch.float32)


def reference(weight: Tensor, left: Tensor, right: Tensor, total: Tensor | None) -> None:
    """The op in torch's own operations."""
    dtype = sum_dtype(weight)
    if total is None:
        total = weight.to(dtype)  # the weight itself where it is of that dtype
    # contiguous, because a BLAS may sum in another order for factors of another memory layout
    total.addmm_(left.to(dtype).contiguous(), right.to(dtype).contiguous().T)
    if total is not weight:
        weight.copy_(total)


_op = torch.library.custom_op("lightedit::add_low_rank_", reference, mutates_args=("weight", "total"))


@_op.register_fake
def _(weight: Tensor, left: Tensor, right: Tensor, total: Tensor | None) -> None:
    _check(weight, left, right, total)
