"""The loss of step 1 from hidden states, without keeping a [positions, vocabulary] matrix for the backward pass."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_ROWS = 128  # positions whose logits exist at one time


@dataclass(frozen=True)
class Head:
    """How logits come from the last hidden states: z = W h + b, then softcap * tanh(z / softcap) if that is set.

    Attributes:
        weight: W, [vocabulary, d].
        bias: b, [vocabulary].
        softcap: bound of the logits, as in Gemma 2.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """Logits of hidden states [n, d] in float32 or better, [n, vocabulary]; `out` may hold the product."""
        product = torch.mm(hidden, self.weight.T, out=out)
        if self.bias is not None:
            product += self.bias
        logits = product.to(torch.promote_types(product.dtype, torch.float32))
        return logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)

    def log_probs(self, hidden: Tensor) -> Tensor:
        """Log-probabilities of the next token after hidden states [n, d], [n, vocabulary]."""
        return self.logits(hidden.to(self.weight.device)).log_softmax(dim=-1)


class _TargetNLLKL(torch.autograd.Function):
    """The gradient with respect to the hidden states is computed along with the loss, part by part."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Head, targets: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        states = hidden.to(head.weight.device)
        logits = states.new_empty(min(_ROWS, len(states)), len(head.weight))
        loss = torch.empty(len(states), dtype=reference.dtype, device=states.device)
        gradient = torch.empty_like(states)
        leads = torch.empty(len(targets), dtype=torch.bool, device=states.device)
        for start in range(0, len(states), _ROWS):
            part = slice(start, min(start + _ROWS, len(states)))
            z = head.logits(states[part], out=logits[: part.stop - start])
            slope = 1 if head.softcap is None else 1 - (z / head.softcap).square_()  # of the softcap
            wanted, unedited = targets[part], reference[max(0, start - len(targets)) : max(0, part.stop - len(targets))]
            count, rows = len(wanted), torch.arange(len(wanted), device=z.device)
            z -= z.amax(dim=-1, keepdim=True)
            chosen, excess = z[rows, wanted], z[count:] - unedited
            leads[part] = chosen == 0
            z.exp_()
            total = z.sum(dim=-1, keepdim=True)
            z /= total  # probabilities, and then the derivatives by the logits
            log_total = total.log()
            loss[part][:count] = log_total[:count, 0] - chosen
            excess -= log_total[count:]
            loss[part][count:] = kl = (z[count:] * excess).sum(dim=-1)
            z[rows, wanted] -= 1
            z[count:] *= excess.sub_(kl[:, None])
            torch.mm((z * slope if head.softcap else z).to(states.dtype), head.weight, out=gradient[part])
        ctx.save_for_backward(gradient)
        ctx.device = hidden.device
        ctx.mark_non_differentiable(leads)
        return loss, leads

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad[:, None].to(gradient.dtype)).to(ctx.device), None, None, None


def target_nll_kl(hidden: Tensor, head: Head, targets: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """-log p(target) at the first positions, KL(p || reference) at the others.

    Differentiable with respect to `hidden` alone. At most 128 rows of logits exist at one time.

    Args:
        hidden: states that the head reads, [m + k, d].
        head: the head.
        targets: token ids at the first m positions, [m], on the head's device.
        reference: log-probabilities at the other k, [k, vocabulary], float32 or better, on the head's device.

    Returns:
        The m negative log-likelihoods, then the k divergences, in nats, in the dtype of `reference`; and which of the m
        targets no token is more probable than, [m].
    """
    loss, leads = _TargetNLLKL.apply(hidden, head, targets, reference)
    return loss, leads
