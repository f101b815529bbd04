"""The objective of erasure: p = exp(-NLL) is minimised in place of the NLL."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightedit.methods.closed_form.joint import Joint, written
from lightedit.methods.closed_form.rows import Rows


class Erased:
    """One evaluation of p = exp(-NLL) of several facts, whose rows run in several passes.

    dp/dδ = -p dNLL/dδ, and p is known after the last pass only. The rows of the targets therefore run with a copy of
    δ, which collects dNLL/dδ; those of the KL terms run with δ itself.

    Args:
        delta: the parameter δ, [facts, d].
        joint: groups of facts that are searched knowing of each other.

    Attributes:
        nll: each fact's NLL, averaged over contexts and tokens, [facts]; the caller adds that of each pass.
    """

    def __init__(self, delta: Tensor, joint: Sequence[Joint]) -> None:
        self._delta, self._joint = delta, joint
        self._received = written(delta.detach(), joint).clone().requires_grad_()
        self.nll = delta.new_zeros(len(delta)).detach()

    def of_rows(self, rows: Rows, delta: Tensor) -> Tensor:
        """What each row receives, [rows, d]; `delta` is what each fact receives."""
        return torch.where(rows.reads_target[:, None], self._received[rows.fact], delta[rows.fact])

    def finish(self) -> Tensor:
        """Add the gradient of p to that of δ, and return p - NLL, which makes a loss with the NLL one with p."""
        p = (-self.nll).exp()
        assert self._received.grad is not None
        written(self._delta, self._joint).backward(-p[:, None] * self._received.grad)
        return p - self.nll
