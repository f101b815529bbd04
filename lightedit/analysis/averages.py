"""Averages of indirect effects over facts, by layer and class of token, with their intervals."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import NamedTuple

from lightedit.analysis.prompts import TokenClass

CLASSES: tuple[TokenClass, ...] = (
    *("first subject", "middle subject", "last subject"),
    *("first after", "further", "last"),
)
"""The classes of averages. Tokens before the subject have no effect."""

ANY = "any"
"""In place of a class: of each layer, the token from the subject on with the largest effect."""


class Mean(NamedTuple):
    """A mean over n facts.

    Attributes:
        value: the mean; NaN if there are none.
        half_width: half the width of its 95 % interval, 1.96 s / √n; NaN for fewer than two.
        facts: n.
    """

    value: float
    half_width: float
    facts: int

    def __str__(self) -> str:
        width = "" if math.isnan(self.half_width) else f" ± {self.half_width:.3f}"
        return f"{self.value:.3f}{width}"


def mean_of(values: Sequence[float]) -> Mean:
    """The mean of values, one a fact."""
    n = len(values)
    half = 1.96 * stdev(values) / math.sqrt(n) if n > 1 else math.nan
    return Mean(fmean(values) if n else math.nan, half, n)


def profiles(
    classes: Sequence[str], subject: range, effects: Mapping[int, Sequence[float]], published: bool
) -> dict[str, list[list[float]]]:
    """What one fact adds to the mean of each class: one profile of effects by layer.

    Args:
        classes: the class of each token of the prompt.
        subject: positions of the subject's tokens.
        effects: position -> its effects by layer.
        published: one profile for each token, and the published classes: a subject of one token is both the first and
            the last one of a subject, and the prompt's last token can also be the first one after it.
    """
    tokens: dict[str, list[list[float]]] = {}
    for position, effect in effects.items():
        for name in _published(position, subject, len(classes)) if published else [classes[position]]:
            tokens.setdefault(name, []).append(list(effect))
    from_subject = [list(effect) for position, effect in effects.items() if position >= subject.start]
    found: dict[str, list[list[float]]] = {name: tokens[name] for name in CLASSES if name in tokens}
    if not published:
        found = {name: [[fmean(column) for column in zip(*own, strict=True)]] for name, own in found.items()}
    if from_subject:
        found[ANY] = [[max(column) for column in zip(*from_subject, strict=True)]]
    return found


def _published(position: int, subject: range, length: int) -> list[str]:
    """The classes that the published code counts a token in."""
    first, last = subject[0], subject[-1]
    holds = {
        "first subject": position == first,
        "middle subject": first < position < last,
        "last subject": position == last,
        "first after": position == last + 1,
        "further": last + 1 < position < length - 1,
        "last": position == length - 1,
    }
    return [name for name in holds if holds[name]]
