"""Rules that end the value optimisation of a fact, in addition to the threshold on its loss."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightedit.errors import ArgumentError


@dataclass(frozen=True)
class Evaluated:
    """One evaluation of the loss of B facts in C contexts.

    Attributes:
        kl: the weighted KL term, [B].
        most_probable: number of target tokens that are the most probable ones, [B, C].
        tokens: number of target tokens, [B, C].
        times: number of evaluations so far at which `Stopping.reached` held, [B].
    """

    kl: Tensor
    most_probable: Tensor
    tokens: Tensor
    times: Tensor


class Stopping(ABC):
    """A stopping rule that depends on whether the target is the most probable continuation."""

    @abstractmethod
    def reached(self, step: Evaluated) -> Tensor:
        """The facts whose target is the most probable continuation, [B] bool."""

    def counted(self, step: Evaluated) -> Evaluated:
        """A copy of `step` whose `times` include `step` itself."""
        return replace(step, times=step.times + self.reached(step))

    @abstractmethod
    def done(self, step: Evaluated) -> Tensor:
        """The facts that are finished, [B] bool; the `times` of `step` include it."""

    def nll_factor(self, step: Evaluated) -> Tensor:
        """Weight of the target's NLL at the next evaluation, [B]."""
        return torch.ones_like(step.kl)


@dataclass(frozen=True)
class MostProbable(Stopping):
    """Most-probable early stopping (Gupta et al., 2025, arXiv 2502.01636, section 4).

    A fact is done `extra_steps` steps after every token of its target became the most probable one in every context.

    Attributes:
        extra_steps: further steps, k.
        published: test as the published code does. The bare prompt is left out, and the number of most probable
            *tokens* in the other contexts must equal the number of these contexts. This is wrong for targets of
            several tokens.
    """

    extra_steps: int = 1
    published: bool = False

    def __post_init__(self) -> None:
        if self.extra_steps < 0:
            raise ArgumentError(f"extra_steps must not be negative, got {self.extra_steps}")

    def reached(self, step: Evaluated) -> Tensor:
        if self.published:
            return step.most_probable[:, 1:].sum(1) == step.most_probable.shape[1] - 1
        return (step.most_probable == step.tokens).all(1)

    def done(self, step: Evaluated) -> Tensor:
        return step.times > self.extra_steps


@dataclass(frozen=True)
class KLBelow(Stopping):
    """PMET's rule (Li et al., 2024, arXiv 2308.08742).

    While the target is the most probable continuation in every context, its NLL has a lower weight, and the fact is
    done if its KL is small.

    Attributes:
        max_kl: largest weighted KL, in nats, at which such a fact is done.
        nll_factor_after: weight of the NLL of such a fact.
    """

    max_kl: float = 0.01
    nll_factor_after: float = 0.1

    def __post_init__(self) -> None:
        if self.max_kl < 0 or self.nll_factor_after < 0:
            raise ArgumentError(f"max_kl and nll_factor_after must not be negative, got {self}")

    def reached(self, step: Evaluated) -> Tensor:
        return (step.most_probable == step.tokens).all(1)

    def done(self, step: Evaluated) -> Tensor:
        return self.reached(step) & (step.kl <= self.max_kl)

    def nll_factor(self, step: Evaluated) -> Tensor:
        return torch.where(self.reached(step), self.nll_factor_after, 1.0).to(step.kl)
