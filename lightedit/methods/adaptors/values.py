"""The training of a codebook's values: one for each fact, all facts together."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightedit.data.prompts import FactPrompts
from lightedit.errors import NumericalError
from lightedit.lm import LanguageModel, Place
from lightedit.lm.hooks import OutputChange
from lightedit.lm.reading import Positions
from lightedit.methods.adaptors.rows import Rows, losses


@dataclass(frozen=True)
class Training:
    """How values are trained.

    Attributes:
        lr: Adam's learning rate.
        steps: most steps.
        stop: a fact whose loss is below this takes no further step; 0 for none.
        copies: noised copies of each value that share its loss, the first one without noise; 1 for none.
    """

    lr: float
    steps: int
    stop: float = 0.0
    copies: int = 1


class ValueTraining:
    """The training of one value for each fact. Facts do not influence one another, so B facts equal B trainings.

    Args:
        lm: the model; nothing in it is written.
        place: the place whose output the values replace.
        positions: the tokens at which they do.
        prompts: B facts.
        rows: their rows.
        values: the first values, [B, d_out] float32 or wider.
        how: how they are trained.
        generators: one for the noise of each fact.

    Attributes:
        losses: the last loss of each fact, before its last step, [B].
        steps: steps taken.
    """

    def __init__(
        self,
        lm: LanguageModel,
        place: Place,
        positions: Positions,
        prompts: Sequence[FactPrompts],
        rows: Sequence[Rows],
        values: Tensor,
        how: Training,
        generators: Sequence[torch.Generator],
    ) -> None:
        self._lm, self._place, self._prompts, self._how, self._generators = lm, place, prompts, how, generators
        self._groups = [group.repeated(how.copies) if how.copies > 1 else group for group in rows]
        self._masks = [group.at(positions)[..., None] for group in self._groups]
        self._values = nn.Parameter(values.detach().clone())
        self._adam = torch.optim.Adam([self._values], lr=how.lr)
        self._found = torch.zeros(len(prompts), dtype=torch.bool, device=values.device)
        self.losses = torch.full((len(prompts),), torch.nan)
        self.steps = 0

    @property
    def done(self) -> bool:
        """Whether no fact takes a further step."""
        return self.steps >= self._how.steps or bool(self._found.all())

    @property
    def values(self) -> Tensor:
        """The present values, [B, d_out]."""
        return self._values.detach().clone()

    @torch.enable_grad()
    def step(self) -> Tensor:
        """Take one step; returns the losses of the facts before it, [B]."""
        self._adam.zero_grad()
        noise = self._noise()
        for group, mask in zip(self._groups, self._masks, strict=True):
            value = self._values[group.facts.to(self._values.device)]
            if noise is not None:
                value = value + noise[group.facts[:: self._how.copies]].flatten(0, 1).to(value)
            found = losses(self._lm, self._place, group, _replacing(value, mask))
            found = found.view(-1, self._how.copies).mean(1)
            facts = group.facts[:: self._how.copies]
            self._check(found.detach(), facts)
            self.losses[facts] = found.detach().float().cpu()
            found.sum().backward()
        self._found |= (self.losses < self._how.stop).to(self._found.device)
        before = self._values.detach().clone()
        self._adam.step()
        with torch.no_grad():
            self._values[self._found] = before[self._found]
        self.steps += 1
        return self.losses

    def _noise(self) -> Tensor | None:
        """Standard normal noise of each copy, [B, copies, d_out]; 0 for the first one."""
        if self._how.copies == 1:
            return None
        shape = (self._how.copies, self._values.shape[1])
        noise = torch.stack([torch.randn(shape, generator=each) for each in self._generators])
        noise[:, 0] = 0.0
        return noise

    def _check(self, found: Tensor, facts: Tensor) -> None:
        for number in (~torch.isfinite(found)).nonzero().flatten().tolist()[:1]:
            fact = self._prompts[int(facts[number])].fact
            raise NumericalError(
                f"the loss of fact {fact.text!r} -> {fact.target_new!r} is {found[number].item()}; lower lr "
                f"({self._how.lr}), or load the model in float32"
            )


def _replacing(values: Tensor, mask: Tensor) -> OutputChange:
    """Replaces each row's output by its value, at the tokens of `mask` [rows, tokens, 1]."""
    return lambda _, output: torch.where(mask, values[:, None].to(output), output)
