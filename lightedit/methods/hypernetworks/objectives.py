"""What hyper-networks are trained for: the losses of KE and MEND, and their optimizers."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightedit.lm import Place
from lightedit.lm.changes import LowRankUpdate
from lightedit.methods.hypernetworks.mend_network import MENDNetwork
from lightedit.methods.hypernetworks.network import HyperNetwork

Constraint = Literal["kl", "lp"]


class Objective(nn.Module, ABC):
    """The loss of a batch of separate edits, and how it is lowered.

    Attributes:
        asks_prompt: whether the loss asks for the answer after the fact's own prompt, and not only after a rephrasing.
        clip: largest norm of a gradient, to which longer ones are scaled; None for no limit.
    """

    asks_prompt: ClassVar[bool] = False
    clip: float | None = None

    @abstractmethod
    def loss(self, answer: Tensor, locality: Tensor, updates: Mapping[Place, LowRankUpdate]) -> Tensor:
        """The loss of B separate edits, a scalar.

        Args:
            answer: the mean NLL of each edit's answers, [B].
            locality: KL(unedited || edited) of the next token at each edit's locality texts, averaged, [B].
            updates: place -> the B updates.
        """

    @abstractmethod
    def optimizer(self, network: HyperNetwork) -> dict[str, Any]:
        """The optimizer, and its schedule if there is one, as Lightning's `configure_optimizers` returns them."""

    def after_step(self) -> None:
        """Called after each step of the optimizer."""
        return None

    def validated(self, figures: Mapping[str, float]) -> None:
        """Called after each validation of a fit."""
        return None

    def figures(self) -> dict[str, float]:
        """What the objective itself has to tell in a validation."""
        return {}

    @abstractmethod
    def score(self, figures: Mapping[str, float]) -> float:
        """How good a network is by the figures of its validation; less is better."""


class MENDObjective(Objective):
    """c_e times the answers' loss plus the locality loss, minimised by Adam in two groups (Mitchell et al., 2022).

    Args:
        edit_weight: c_e.
        lr: learning rate of the networks.
        rate_lr: learning rate of the matrices' learned rates.
        clip: see `Objective`.
    """

    def __init__(self, edit_weight: float, lr: float, rate_lr: float, clip: float | None) -> None:
        super().__init__()
        self.edit_weight, self.lr, self.rate_lr, self.clip = edit_weight, lr, rate_lr, clip

    def loss(self, answer: Tensor, locality: Tensor, updates: Mapping[Place, LowRankUpdate]) -> Tensor:
        return (self.edit_weight * answer + locality).mean()

    def optimizer(self, network: HyperNetwork) -> dict[str, Any]:
        assert isinstance(network, MENDNetwork)
        rates = {id(rate) for rate in network.rates.values()}
        groups = [
            {"params": [one for one in network.parameters() if id(one) not in rates], "lr": self.lr},
            {"params": list(network.rates.values()), "lr": self.rate_lr},
        ]
        return {"optimizer": torch.optim.Adam(groups)}

    def score(self, figures: Mapping[str, float]) -> float:
        """The loss."""
        return figures["loss"]


class KEObjective(Objective):
    """The answers' loss under the constraint C <= m, by a multiplier that rises while C > m (De Cao et al., 2021).

    The loss is min over the network, and max over the multiplier a >= 0, of answers + a (C - m). Both take steps of
    centered RMSprop. The network's rate rises to `lr` over `warmup` steps, then falls to 0 at the last step. After each
    validation in which more than 90 % of the edits succeed, m is multiplied by 0.8, down to `margin_end`.

    Args:
        constraint: "kl" constrains the locality loss. "lp" constrains the size of ΔW: the root mean square of its
            entries, averaged over matrices.
        margin: m at the start.
        margin_end: its least value.
        lr: learning rate of the network.
        multiplier_lr: that of the multiplier.
        warmup: steps of warm-up.
        steps: steps in all.
        clip: see `Objective`.

    Attributes:
        multiplier: a.
        margin: m.
    """

    asks_prompt = True
    margin: Tensor

    def __init__(
        self,
        constraint: Constraint,
        margin: float,
        margin_end: float,
        lr: float,
        multiplier_lr: float,
        warmup: int,
        steps: int,
        clip: float | None,
    ) -> None:
        super().__init__()
        self.constraint, self.margin_end = constraint, margin_end
        self.lr, self.multiplier_lr, self.warmup, self.steps, self.clip = lr, multiplier_lr, warmup, steps, clip
        self.multiplier = nn.Parameter(torch.ones(()))
        self.register_buffer("margin", torch.tensor(margin, dtype=torch.float64))

    def loss(self, answer: Tensor, locality: Tensor, updates: Mapping[Place, LowRankUpdate]) -> Tensor:
        constrained = locality if self.constraint == "kl" else sizes(updates)
        return answer.mean() + self.multiplier * (constrained.mean() - self.margin.to(constrained.dtype))

    def optimizer(self, network: HyperNetwork) -> dict[str, Any]:
        groups = [
            {"params": list(network.parameters()), "lr": self.lr},
            {"params": [self.multiplier], "lr": self.multiplier_lr, "maximize": True},
        ]
        optimizer = torch.optim.RMSprop(groups, centered=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [self._share, _whole])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _share(self, step: int) -> float:
        """The share of the learning rate at a step."""
        if step < self.warmup:
            return step / self.warmup
        return max(0.0, (self.steps - step) / max(1, self.steps - self.warmup))

    @torch.no_grad()
    def after_step(self) -> None:
        """Keep the multiplier from falling below 0."""
        self.multiplier.clamp_(min=0)

    def validated(self, figures: Mapping[str, float]) -> None:
        """Lower the margin if more than 90 % of the edits succeed."""
        if figures["success"] > _ENOUGH:
            self.margin.mul_(_TIGHTER).clamp_(min=self.margin_end)

    def figures(self) -> dict[str, float]:
        """The margin and the multiplier."""
        return {"margin": float(self.margin), "multiplier": float(self.multiplier)}

    def score(self, figures: Mapping[str, float]) -> float:
        """The share of edits that fail."""
        return 1 - figures["success"]


_ENOUGH, _TIGHTER = 0.9, 0.8  # share of edits that succeed, and the factor of the margin


def _whole(step: int) -> float:
    """The rate of the multiplier stays."""
    return 1.0


def sizes(updates: Mapping[Place, LowRankUpdate]) -> Tensor:
    """The root mean square of the entries of each edit's ΔW, averaged over matrices, [B]; from the factors alone.

    The square of ||left rightᵀ|| is the inner product of the factors' Gram matrices.
    """
    each = []
    for update in updates.values():
        grams = [part.mT @ part for part in (update.left, update.right)]
        entries = update.left.shape[-2] * update.right.shape[-2]
        squares = (grams[0] * grams[1]).sum((-2, -1)) / entries
        each.append(squares.clamp(min=torch.finfo(squares.dtype).tiny).sqrt())
    return torch.stack(each).mean(0)
