"""The loss of step 1 from hidden states, without keeping a [positions, vocabulary] matrix for the backward pass."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_ROWS = 128  # positions whose logits exist at one time


@dataclass(frozen=True)
class Head:
    """How logits come from the last hidden states: z = s (W h + b), then softcap * tanh(z / softcap) if that is set.

    Attributes:
        weight: W, [vocabulary, d].
        bias: b, [vocabulary].
        softcap: bound of the logits, as in Gemma 2.
        scale: s, as in Granite and Cohere.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """Logits of hidden states [n, d] in float32 or better, [n, vocabulary]; `out` may hold the product."""
        product = self.product(hidden, out)
        logits = product.to(torch.promote_types(product.dtype, torch.float32))
        if self.scale != 1:
            logits = logits.mul_(self.scale)
        return logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)

    def product(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """W h + b for hidden states [n, d] in their dtype, [n, vocabulary], with one rounding as the model has it."""
        if self.bias is None:
            return torch.mm(hidden, self.weight.T, out=out)
        return torch.addmm(self.bias, hidden, self.weight.T, out=out)

    def log_probs(self, hidden: Tensor) -> Tensor:
        """Log-probabilities of the next token after hidden states [n, d], [n, vocabulary]."""
        return self.logits(hidden.to(self.weight.device)).log_softmax(dim=-1)


def target_nll_kl(hidden: Tensor, head: Head, targets: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """-log p(target) at the first positions, KL(p || reference) at the others.

    Differentiable, once, with respect to `hidden` alone: its gradient is computed along with the loss, part by part. At
    most 128 rows of logits exist at one time. NaN in a state gives NaN at its position only.

    Args:
        hidden: states that the head reads, [m + k, d], in the head's dtype.
        head: the head.
        targets: token ids at the first m positions, [m], on the head's device.
        reference: log-probabilities at the other k, [k, vocabulary], float32 or better, on the head's device.

    Returns:
        The m negative log-likelihoods, then the k divergences, in nats, in the dtype of `reference`; and which of the m
        targets no token is more probable than, [m].

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    states = hidden.to(head.weight.device)
    _check(states, head.weight, head.bias, targets, reference)
    bias = head.bias
    if head.scale != 1:  # s (W h + b) = W (s h) + s b
        states, bias = head.scale * states, None if bias is None else head.scale * bias
    loss, is_argmax, _ = _op(states, head.weight, bias, head.softcap, targets, reference)
    return loss, is_argmax


def _check(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, unedited: Tensor) -> None:
    shapes = [list(tensor.shape) for tensor in (hidden, weight, targets, unedited)]
    if (
        [len(shape) for shape in shapes] != [2, 2, 1, 2]
        or hidden.shape[1] != weight.shape[1]
        or len(hidden) != len(targets) + len(unedited)
        or unedited.shape[1] != len(weight)
        or (bias is not None and bias.shape != weight.shape[:1])
    ):
        raise ValueError(
            "expected hidden [m + k, d], the head's weight [vocabulary, d] and bias [vocabulary], targets [m] and "
            f"reference [k, vocabulary], got {', '.join(map(str, shapes))}"
            + ("" if bias is None else f" and a bias of {list(bias.shape)}")
        )
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise ValueError(f"hidden and the head are of one floating-point dtype, got {hidden.dtype} and {weight.dtype}")
    if targets.dtype != torch.long or unedited.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"targets are int64 and reference is float32 or float64, got {targets.dtype} and {unedited.dtype}"
        )


def reference(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, targets: Tensor, unedited: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The op in torch's own operations: loss, is_argmax, and the summed loss's gradient by `hidden`, [m + k, d]."""
    head = Head(weight, bias, softcap)
    logits = hidden.new_empty(min(_ROWS, len(hidden)), len(weight))
    loss = torch.empty(len(hidden), dtype=unedited.dtype, device=hidden.device)
    gradient = hidden.new_empty(hidden.shape)
    is_argmax = torch.empty(len(targets), dtype=torch.bool, device=hidden.device)
    for start in range(0, len(hidden), _ROWS):
        part = slice(start, min(start + _ROWS, len(hidden)))
        z = head.logits(hidden[part], out=logits[: part.stop - start])
        slope = 1 if softcap is None else 1 - (z / softcap).square_()  # of the softcap
        wanted, known = targets[part], unedited[max(0, start - len(targets)) : max(0, part.stop - len(targets))]
        count, rows = len(wanted), torch.arange(len(wanted), device=z.device)
        z -= z.amax(dim=-1, keepdim=True)
        chosen, excess = z[rows, wanted], z[count:] - known
        is_argmax[part] = chosen == 0
        z.exp_()
        total = z.sum(dim=-1, keepdim=True)
        z /= total  # probabilities, and then the derivatives by the logits
        log_total = total.log()
        loss[part][:count] = log_total[:count, 0] - chosen
        excess -= log_total[count:]
        loss[part][count:] = kl = (z[count:] * excess).sum(dim=-1)
        z[rows, wanted] -= 1
        z[count:] *= excess.sub_(kl[:, None])
        torch.mm((z * slope if softcap else z).to(hidden.dtype), weight, out=gradient[part])
    return loss, is_argmax, gradient


_op = torch.library.custom_op("lightedit::target_nll_kl", reference, mutates_args=())


@_op.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, targets: Tensor, unedited: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    _check(hidden, weight, bias, targets, unedited)
    is_argmax = targets.new_empty(targets.shape, dtype=torch.bool)
    return unedited.new_empty(len(hidden)), is_argmax, hidden.new_empty(hidden.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, is_argmax, gradient = output
    ctx.save_for_backward(gradient)
    ctx.mark_non_differentiable(is_argmax, gradient)


@once_differentiable
def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, None, None, None, None, None]:
    (gradient,) = ctx.saved_tensors
    return gradient * grad[:, None].to(gradient.dtype), None, None, None, None, None


_op.register_autograd(_backward, setup_context=_save)
