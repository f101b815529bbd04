"""When the value optimisation of a fact ends, beside its loss falling below a threshold."""

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
        most_probable: how many target tokens are the most probable ones, [B, C].
        tokens: target tokens, [B, C].
        times: at how many evaluations `Stopping.reached` has held so far, [B].
    """

    kl: Tensor
    most_probable: Tensor
    tokens: Tensor
    times: Tensor


class Stopping(ABC):
    """A rule that looks at the target's rank rather than at the loss."""

    @abstractmethod
    def reached(self, step: Evaluated) -> Tensor:
        """Which facts have their target as the most probable continuation, [B] bool."""

    def counted(self, step: Evaluated) -> Evaluated:
        """The same evaluation with itself counted in `times`."""
        return replace(step, times=step.times + self.reached(step))

    @abstractmethod
    def done(self, step: Evaluated) -> Tensor:
        """Which facts are finished, [B] bool; `step` is counted in its `times`."""

    def nll_factor(self, step: Evaluated) -> Tensor:
        """Weight of the target's NLL at the next evaluation, [B]."""
        return torch.ones_like(step.kl)


@dataclass(frozen=True)
class MostProbable(Stopping):
    """Most-probable early stopping (Gupta et al., 2025, arXiv 2502.01636, section 4).

    A fact is done `extra_steps` steps after every token of its target became the most probable one in every context.

    Attributes:
        extra_steps: steps still taken, k.
        published: test as the published code does: the bare prompt is left out, and the right *tokens* of the other
            contexts must be as many as there are contexts, which a target of several tokens meets wrongly or never.
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
    """PMET's rule (Li et al., 2024, arXiv 2308.08742): let go of the target once it leads, and stop when KL is small.

    Attributes:
        max_kl: a fact whose target leads in every context is done at this weighted KL, in nats.
        nll_factor_after: weight of the NLL while the target leads.
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
