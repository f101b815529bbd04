"""The loss of step 1 in Triton: logits of a few positions at a time, made into their derivatives where they lie."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightedit.ops.target_nll_kl import Head, reference

_ROWS = 128  # positions whose logits exist at one time
_BLOCK = 4096  # logits of a position that a program holds


@triton.jit
def _logits(products, j, inside, softcap):
    """Logits as the model's own head would give them, and the softcap's derivative there."""
    z = tl.load(products + j, mask=inside, other=float("-inf")).to(tl.float32)
    slope = tl.where(inside, 1.0, 0.0)
    if softcap is not None:
        # tanh, in a form that cannot overflow
        e = tl.exp(-2.0 * tl.abs(z) / softcap)
        bent = tl.where(z < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e)
        slope = 1.0 - bent * bent
        z = tl.where(inside, softcap * bent, float("-inf"))
    return z, slope


@triton.jit
def _loss(
    products,
    softcap,
    targets,
    known,
    loss,
    is_argmax,
    start,
    m,
    vocabulary,
    product_row,
    known_row,
    known_column,
    BLOCK: tl.constexpr,
):
    """One position: the loss from W h + b, and in its place the derivative of the loss by it.

    With p = softmax(z), at a target v: loss = -log p[v], dz = p - [v]. Elsewhere, with q the reference:
    loss = Σ p (log p - log q), dz = p (log p - log q - loss).
    """
    position = start + tl.program_id(0).to(tl.int64)
    row = products + tl.program_id(0).to(tl.int64) * product_row
    most = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    for first in range(0, vocabulary, BLOCK):
        j = first + tl.arange(0, BLOCK)
        z, _ = _logits(row, j, j < vocabulary, softcap)
        most = tl.maximum(most, z)
    highest = tl.max(most, axis=0)
    target = tl.load(targets + position, mask=position < m, other=-1)
    sums, hits = tl.zeros([BLOCK], dtype=tl.float32), tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, vocabulary, BLOCK):
        j = first + tl.arange(0, BLOCK)
        z, _ = _logits(row, j, j < vocabulary, softcap)
        sums += tl.where(j < vocabulary, tl.exp(z - highest), 0.0)
        hits += tl.where((j < vocabulary) & (j == target), z - highest, 0.0)
    total = tl.sum(sums, axis=0)
    if position < m:
        chosen = tl.where((target >= 0) & (target < vocabulary), tl.sum(hits, axis=0), float("nan"))
        tl.store(loss + position, tl.log(total) - chosen)
        tl.store(is_argmax + position, ((chosen == 0.0) & (total == total)).to(tl.uint8))
        for first in range(0, vocabulary, BLOCK):
            j = first + tl.arange(0, BLOCK)
            z, slope = _logits(row, j, j < vocabulary, softcap)
            slope *= tl.exp(z - highest) / total - (j == target).to(tl.float32)
            tl.store(row + j, slope.to(products.dtype.element_ty), mask=j < vocabulary)
    else:
        at = known + (position - m) * known_row
        parts = tl.zeros([BLOCK], dtype=tl.float32)
        for first in range(0, vocabulary, BLOCK):
            j = first + tl.arange(0, BLOCK)
            z, _ = _logits(row, j, j < vocabulary, softcap)
            excess = z - highest - tl.load(at + j.to(tl.int64) * known_column, mask=j < vocabulary, other=0.0)
            part = tl.exp(z - highest) / total * (excess - tl.log(total))
            parts += tl.where(j < vocabulary, part, 0.0)
        kl = tl.sum(parts, axis=0)
        tl.store(loss + position, kl)
        for first in range(0, vocabulary, BLOCK):
            j = first + tl.arange(0, BLOCK)
            z, slope = _logits(row, j, j < vocabulary, softcap)
            excess = z - highest - tl.load(at + j.to(tl.int64) * known_column, mask=j < vocabulary, other=0.0)
            slope *= tl.exp(z - highest) / total * (excess - tl.log(total) - kl)
            tl.store(row + j, slope.to(products.dtype.element_ty), mask=j < vocabulary)


def run(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, targets: Tensor, unedited: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`target_nll_kl` for float16, bfloat16 and float32; a float64 head or reference goes to the reference op.

    Both products with the head are the vendor's, and all between them is one kernel over the logits of 128 positions,
    which exist once, in the head's dtype. A target outside the vocabulary gives a loss of NaN.
    """
    if torch.float64 in (hidden.dtype, unedited.dtype):
        return reference(hidden, weight, bias, softcap, targets, unedited)
    vocabulary = len(weight)
    logits = hidden.new_empty(min(_ROWS, len(hidden)), vocabulary)
    loss = torch.empty(len(hidden), dtype=unedited.dtype, device=hidden.device)
    is_argmax = torch.empty(len(targets), dtype=torch.uint8, device=hidden.device)
    gradient = hidden.new_empty(hidden.shape)
    targets, head = targets.contiguous(), Head(weight, bias)
    for start in range(0, len(hidden), _ROWS):
        part = hidden[start : start + _ROWS]
        z = head.product(part, out=logits[: len(part)])
        _loss[(len(part),)](
            z,
            softcap,
            targets,
            unedited,
            loss,
            is_argmax,
            start,
            len(targets),
            vocabulary,
            z.stride(0),
            *unedited.stride(),
            BLOCK=min(_BLOCK, triton.next_power_of_2(vocabulary)),
            num_warps=8,
        )
        torch.mm(z, weight, out=gradient[start : start + _ROWS])
    return loss, is_argmax.view(torch.bool), gradient
