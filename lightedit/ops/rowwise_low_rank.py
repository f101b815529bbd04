"""What low-rank changes add to a layer's outputs when every row of a batch sees a change of its own."""

from typing import Any

import torch
from torch import Tensor

from lightedit.ops._precision import whole_float32

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def rowwise_low_rank(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """y[b] = (x[b] right[b]) left[b]ᵀ: the outputs of ΔW[b] = left[b] right[b]ᵀ, without that matrix.

    So one forward pass runs many differently edited models. Sums are in float32, or in float64 for a float64 x, and y
    is rounded once. Differentiable; nothing is kept for the gradients of factors that require none. NaN and infinity
    spread as in the products.

        >>> x = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])
        >>> left, right = torch.ones(2, 3, 1), torch.tensor([[[1.0], [0.0]], [[0.0], [1.0]]])
        >>> rowwise_low_rank(x, left, right)[:, 0]
        tensor([[1., 1., 1.],
                [4., 4., 4.]])

    Args:
        x: inputs of the layer, [b, t, d_in] of any floating-point dtype.
        left: [b, d_out, r], floating-point; taken in the precision of the sums.
        right: [b, d_in, r], likewise.

    Returns:
        [b, t, d_out] in the dtype of x.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    _check(x, left, right)
    return _product(x, left, right)


def _product(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    with whole_float32(x.device):
        product: Tensor = _op(x, left, right)
    return product


def _check(x: Tensor, left: Tensor, right: Tensor) -> None:
    shapes = [list(tensor.shape) for tensor in (x, left, right)]
    if any(len(shape) != 3 for shape in shapes) or not (
        len(x) == len(left) == len(right) and x.shape[2] == right.shape[1] and left.shape[2] == right.shape[2]
    ):
        raise ValueError(
            f"expected x [b, t, d_in], left [b, d_out, r] and right [b, d_in, r], got {', '.join(map(str, shapes))}"
        )
    if any(tensor.dtype not in _DTYPES for tensor in (x, left, right)):
        raise ValueError(f"all are of floating-point dtypes, got {x.dtype}, {left.dtype} and {right.dtype}")
    if not x.device == left.device == right.device:
        raise ValueError(f"all must be on one device, got {x.device}, {left.device} and {right.device}")


def reference(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The op in torch's own operations."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return ((x.to(dtype) @ right.to(dtype)) @ left.to(dtype).mT).to(x.dtype).contiguous()


_op = torch.library.custom_op("lightedit::rowwise_low_rank", reference, mutates_args=())


@_op.register_fake
def _(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    _check(x, left, right)
    return x.new_empty((*x.shape[:2], left.shape[1]))


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    x, left, right = inputs
    of_factors = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    ctx.save_for_backward(x if of_factors else None, left, right)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x, left, right = ctx.saved_tensors
    for_x, for_left, for_right = ctx.needs_input_grad[:3]
    return (
        _product(gradient, right, left) if for_x else None,  # xᵀ's map is the factors' swapped
        _factor(gradient, x, right, left.dtype) if for_left else None,
        _factor(x, gradient, left, right.dtype) if for_right else None,
    )


def _factor(outer: Tensor, inner: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """outerᵀ (inner factor), [b, d, r]: the gradient of the other factor, summed as the op sums."""
    wide = torch.promote_types(outer.dtype, torch.float32)
    with whole_float32(outer.device):
        return (outer.to(wide).mT @ (inner.to(wide) @ factor.to(wide))).to(dtype)


_op.register_autograd(_backward, setup_context=_save)
