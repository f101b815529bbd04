"""Token rows in which the tokens of a subject carry noise, wherever the subject stands in them."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

from torch import Tensor

from lightedit.analysis.localization.settings import LocalizationSettings
from lightedit.analysis.noise import drawn
from lightedit.data.fact import Fact
from lightedit.data.prompts import FactPrompts, Row
from lightedit.lm import LanguageModel
from lightedit.lm.shifted import ShiftedTokens


class NoisedSubjects:
    """Noise for the subjects of facts, as token ids that stand for the noised tokens.

    A fact has S draws of noise. Each depends on the seed, the fact's text and the number of the subject's tokens, which
    can differ between rows: a subject that begins a text may have other tokens than one after a space. For the fact's
    prompt they are those of `trace`.

    Args:
        lm: the model. It runs such rows within `known`.
        settings: the study's settings.
        level: ν.
    """

    def __init__(self, lm: LanguageModel, settings: LocalizationSettings, level: float) -> None:
        self._width, self._settings, self._level = lm.d_model, settings, level
        self._tokens = ShiftedTokens(lm)
        self._draws: dict[tuple[str, int, bool], Tensor] = {}

    def known(self) -> AbstractContextManager[None]:
        """Within the context, the model runs rows with noised tokens."""
        return self._tokens.known()

    def row(self, fact: Fact, ids: Sequence[int], subject: range, sample: int, other: bool = False) -> list[int]:
        """A row with noise at its subject.

        Args:
            fact: the fact.
            ids: the row's token ids.
            subject: positions of the subject's tokens in it.
            sample: number of the draw, from 0; it counts modulo S.
            other: whether to take the fact's other S draws.
        """
        key = (fact.text, len(subject), other)
        if key not in self._draws:
            shape = (self._settings.samples, len(subject), self._width)
            tracing = self._settings.tracing(self._settings.effect_window, other=other)
            self._draws[key] = drawn(fact.text, shape, self._level, tracing)
        noise = self._draws[key][sample % self._settings.samples]
        new = self._tokens.add(ids[subject.start : subject.stop], noise)
        return [*ids[: subject.start], *new, *ids[subject.stop :]]

    def samples(self, fact: Fact, ids: Sequence[int], subject: range) -> list[list[int]]:
        """A row in each of the S draws."""
        return [self.row(fact, ids, subject, sample) for sample in range(self._settings.samples)]

    def serving(self) -> Callable[[FactPrompts], FactPrompts]:
        """What puts noise at the subjects of the rows that an editor reads; see `Editor.served`.

        The rows of a fact, one for each context, take its draws in turn. They are other draws than those of `samples`,
        unless the settings ask for the same noise.
        """
        other = not self._settings.same_noise

        def noised(prompts: FactPrompts) -> FactPrompts:
            def of(row: Row, sample: int) -> Row:
                assert row.first is not None
                subject = range(row.first, row.lookup + 1)
                return replace(row, ids=self.row(prompts.fact, row.ids, subject, sample, other))

            rows = tuple(of(row, sample) for sample, row in enumerate(prompts.rows))
            return replace(prompts, rows=rows, subject=of(prompts.subject, 0))

        return noised
