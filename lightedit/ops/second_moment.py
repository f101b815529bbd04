"""The sum of k kᵀ over keys, at half the arithmetic of a matrix product: only its lower triangle is computed."""

import torch
from torch import Tensor

from lightedit.ops._precision import whole_float32

_LEAF = 256  # size of the diagonal blocks that are computed whole
_MIRROR = 1024  # size of the blocks in which a triangle is mirrored, so that no second matrix is made
_KEYS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_GRAMS = (torch.float32, torch.float64)


def second_moment_(gram: Tensor, keys: Tensor, mask: Tensor | None = None) -> None:
    """gram += keysᵀ diag(mask) keys, on and below the diagonal; what stands above it is left as it is.

    The products of one call are summed in float32, never in less, or in float64 where both are float64, and then added
    to `gram`, so a float64 `gram` collects the sums of many calls without loss. A key that is masked out is never read
    as a number; NaN or infinity in another one spreads to its row and column. `mirror_` completes the matrix once, at
    the end:

        >>> gram = torch.zeros(2, 2)
        >>> second_moment_(gram, torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([True, False]))
        >>> mirror_(gram)
        tensor([[1., 2.],
                [2., 4.]])

    Args:
        gram: [d, d], float32 or float64.
        keys: [n, d] of any floating-point dtype.
        mask: which keys count, [n] bool; None is all.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    _check(gram, keys, mask)
    with whole_float32(gram.device):
        _op(gram, keys, mask)


def mirror_(gram: Tensor) -> Tensor:
    """Copy the lower triangle of `gram` [d, d] onto its upper one, and return it.

    Raises:
        ValueError: it is not a square matrix.
    """
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise ValueError(f"only a square matrix can be mirrored, got {list(gram.shape)}")
    for start in range(0, len(gram), _MIRROR):
        rows = slice(start, start + _MIRROR)
        gram[:start, rows] = gram[rows, :start].T
        block = gram[rows, rows]
        block.copy_(block.tril() + block.tril(-1).T)
    return gram


def _check(gram: Tensor, keys: Tensor, mask: Tensor | None) -> None:
    if gram.ndim != 2 or keys.ndim != 2 or gram.shape != (keys.shape[1], keys.shape[1]):
        raise ValueError(f"expected gram [d, d] and keys [n, d], got {list(gram.shape)} and {list(keys.shape)}")
    if gram.dtype not in _GRAMS or keys.dtype not in _KEYS:
        raise ValueError(
            f"gram is float32 or float64 and keys are of a floating-point dtype, got {gram.dtype} and {keys.dtype}"
        )
    if mask is not None and (mask.shape != keys.shape[:1] or mask.dtype != torch.bool):
        raise ValueError(f"mask is [{len(keys)}] bool for these keys, got {list(mask.shape)} {mask.dtype}")
    devices = {tensor.device for tensor in (gram, keys, mask) if tensor is not None}
    if len(devices) > 1:
        raise ValueError(f"gram, keys and mask must be on one device, got {', '.join(sorted(map(str, devices)))}")


def reference(gram: Tensor, keys: Tensor, mask: Tensor | None) -> None:
    """The op in torch's own operations."""
    both = keys.dtype == gram.dtype == torch.float64
    _add(gram, (keys if mask is None else keys[mask]).to(torch.float64 if both else torch.float32))


def _add(gram: Tensor, keys: Tensor) -> None:
    """A square block on the diagonal: two half as large, and the rectangle below one and left of the other."""
    d = len(gram)
    if d <= _LEAF:
        gram += (keys.T @ keys).tril()
        return
    half = (d // 2 + 63) // 64 * 64  # whole cache lines
    _add(gram[:half, :half], keys[:, :half])
    if gram.dtype == keys.dtype:
        gram[half:, :half].addmm_(keys[:, half:].T, keys[:, :half])
    else:
        gram[half:, :half] += keys[:, half:].T @ keys[:, :half]
    _add(gram[half:, half:], keys[:, half:])


_op = torch.library.custom_op("lightedit::second_moment_", reference, mutates_args=("gram",))


@_op.register_fake
def _(gram: Tensor, keys: Tensor, mask: Tensor | None) -> None:
    _check(gram, keys, mask)
