"""ΔW of one training, or of several that do not influence one another, and the steps of Adam on it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightedit.lm import LanguageModel, Place
from lightedit.lm.changes import DenseUpdate


@dataclass(frozen=True)
class StepRule:
    """How a step changes ΔW.

    Attributes:
        lr: Adam's learning rate.
        decay: weight decay, as a multiple of lr.
        coupled: whether decay is added to the gradient and pulls W to 0, as published; else it pulls ΔW to 0.
        norm: bound of each entry of ΔW; None for none.
        penalty: place -> weights F [d_out, d_in] of the term sum(F ΔW²) of the loss.
    """

    lr: float
    decay: float = 0.0
    coupled: bool = False
    norm: float | None = None
    penalty: Mapping[Place, Tensor] = field(default_factory=dict)


class Deltas:
    """ΔW, and Δb where biases are trained, of n separate trainings at some places, and their Adam.

    Adam and the bound are elementwise, so n trainings equal n loops.

    Args:
        lm: the model, whose weights are those from which training starts.
        weights: place -> ΔW, [n, d_out, d_in].
        biases: place -> Δb, [n, d_out]; places without a bias are left out.
        rule: how a step changes them.

    Attributes:
        weights: place -> ΔW, parameters.
        biases: place -> Δb, parameters.
    """

    def __init__(
        self, lm: LanguageModel, weights: Mapping[Place, Tensor], biases: Mapping[Place, Tensor], rule: StepRule
    ) -> None:
        self._lm, self._rule = lm, rule
        self.weights = {place: nn.Parameter(tensor) for place, tensor in weights.items()}
        self.biases = {place: nn.Parameter(tensor) for place, tensor in biases.items()}
        self.restart()

    @classmethod
    def zeros(cls, lm: LanguageModel, places: Sequence[Place], count: int, biases: bool, rule: StepRule) -> "Deltas":
        """ΔW = 0 of `count` trainings, float32 or wider."""

        def zero(live: Tensor) -> Tensor:
            dtype = torch.promote_types(live.dtype, torch.float32)
            return torch.zeros((count, *live.shape), dtype=dtype, device=live.device)

        own = {place: bias for place in places if biases and (bias := lm.bias(place)) is not None}
        return cls(
            lm,
            {place: zero(lm.weight(place)) for place in places},
            {place: zero(bias) for place, bias in own.items()},
            rule,
        )

    def restart(self) -> None:
        """Forget Adam's moments."""
        self._adam = torch.optim.Adam([*self.weights.values(), *self.biases.values()], lr=self._rule.lr)

    def added(self, place: Place, inputs: Tensor) -> Tensor:
        """What ΔW and Δb add to the output of `place`, [rows, tokens, d_out] in the dtype of ΔW.

        Args:
            place: the place.
            inputs: its inputs, [rows, tokens, d_in]; with n trainings, those of each are as many rows in a row.
        """
        weight, bias = self.weights[place], self.biases.get(place)
        wide = inputs.to(weight.dtype)
        if len(weight) == 1:
            return F.linear(wide, weight.squeeze(0), None if bias is None else bias.squeeze(0))
        added = torch.bmm(wide.reshape(len(weight), -1, wide.shape[-1]), weight.mT)
        if bias is not None:
            added = added + bias[:, None]
        return added.reshape(*wide.shape[:-1], -1)

    @torch.no_grad()
    def step(self) -> None:
        """Take one step of Adam with the gradients of the loss."""
        rule = self._rule
        for table, live in ((self.weights, self._lm.weight), (self.biases, self._lm.bias)):
            for place, delta in table.items():
                start = live(place)
                assert delta.grad is not None and start is not None
                if rule.coupled and rule.decay:
                    delta.grad.add_(start.to(delta) + delta, alpha=rule.decay)
                elif rule.decay:
                    delta.mul_(1 - rule.lr * rule.decay)
        for place, importance in rule.penalty.items():
            delta = self.weights[place]
            assert delta.grad is not None
            delta.grad.addcmul_(importance.to(delta), delta, value=2.0)
        self._adam.step()
        if rule.norm is not None:
            for delta in (*self.weights.values(), *self.biases.values()):
                delta.clamp_(-rule.norm, rule.norm)

    def clear(self) -> None:
        """Drop the gradients."""
        self._adam.zero_grad()

    def keep(self, index: Tensor) -> "Deltas":
        """The trainings `index` [m] with their gradients and Adam's moments; the others are over."""
        index = index.to(next(iter(self.weights.values())).device)
        kept = Deltas(
            self._lm,
            {place: delta.detach()[index] for place, delta in self.weights.items()},
            {place: delta.detach()[index] for place, delta in self.biases.items()},
            self._rule,
        )
        for ours, theirs in ((self.weights, kept.weights), (self.biases, kept.biases)):
            for place, delta in ours.items():
                state = self._adam.state[delta]
                theirs[place].grad = None if delta.grad is None else delta.grad[index]
                if state:  # none before the first step
                    kept._adam.state[theirs[place]] = {
                        name: value[index] if value.ndim else value for name, value in state.items()
                    }
        return kept

    def change(self, place: Place, training: int = 0) -> DenseUpdate:
        """The change of `place` by one training, a copy."""
        bias = self.biases.get(place)
        return DenseUpdate(
            self.weights[place].detach()[training].clone(), None if bias is None else bias.detach()[training].clone()
        )
