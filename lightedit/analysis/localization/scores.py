"""The scores of one edit, from what was measured before and after it."""

from dataclasses import dataclass
from statistics import fmean

from lightedit.analysis.localization.settings import Overall, Problem

_LARGEST_RISE = 5.0  # of the perplexity; from there on, the essence score is 0


@dataclass(frozen=True)
class Measured:
    """What is measured of a fact in one state of the model. None is what the fact has no texts for.

    Attributes:
        rewrite: joint probability of the target's tokens after the fact's prompt; in forcing with a noised subject,
            averaged over samples.
        paraphrase: the same after the first paraphrase.
        neighborhood: probability of the same target after the first neighbourhood prompt.
        perplexity: mean perplexity of the essence texts.
    """

    rewrite: float
    paraphrase: float | None
    neighborhood: float | None
    perplexity: float | None


@dataclass(frozen=True)
class Scores:
    """The scores of one edit, each at least 0 and at most 1; higher is better. None is what has no texts."""

    rewrite: float
    paraphrase: float | None
    neighborhood: float | None
    essence: float | None
    overall: float | None


def rewrite_score(problem: Problem, before: float, after: float) -> float:
    """How much of what could be gained was gained, at least 0 (Hase et al., 2023).

    >>> rewrite_score("injection", 0.5, 0.75), rewrite_score("erasure", 0.5, 0.125), rewrite_score("forcing", 0.5, 0.25)
    (0.5, 0.75, 0.0)

    Args:
        problem: what the edit is for; erasure lowers the probability, the others raise it.
        before: probability of the target before the edit.
        after: that after it.

    Returns:
        The score; 0 if there was nothing to gain.
    """
    gained, possible = (before - after, before) if problem == "erasure" else (after - before, 1 - before)
    return max(0.0, gained / possible) if possible > 0 else 0.0


def neighborhood_score(before: float, after: float) -> float:
    """1 less the share of the largest possible change by which a probability changed.

    >>> neighborhood_score(0.2, 0.6), neighborhood_score(0.5, 0.0)
    (0.5, 0.0)
    """
    return max(0.0, 1 - abs(after - before) / (abs(before - 0.5) + 0.5))


def essence_score(before: float, after: float) -> float:
    """1 less a fifth of the rise of a perplexity, which counts from 0 to 5.

    >>> essence_score(10.0, 12.0), essence_score(10.0, 9.0), essence_score(10.0, 80.0)
    (0.6, 1.0, 0.0)
    """
    return 1 - min(max(after - before, 0.0), _LARGEST_RISE) / _LARGEST_RISE


def scores(problem: Problem, before: Measured, after: Measured, overall: Overall = "three") -> Scores:
    """The scores of one edit. An overall score of which a part is missing is missing."""
    rewrite = rewrite_score(problem, before.rewrite, after.rewrite)
    paraphrase = neighborhood = essence = None
    if before.paraphrase is not None and after.paraphrase is not None:
        paraphrase = rewrite_score(problem, before.paraphrase, after.paraphrase)
    if before.neighborhood is not None and after.neighborhood is not None:
        neighborhood = neighborhood_score(before.neighborhood, after.neighborhood)
    if before.perplexity is not None and after.perplexity is not None:
        essence = essence_score(before.perplexity, after.perplexity)
    parts = [rewrite, paraphrase, neighborhood, *([essence] if overall == "four" else [])]
    present = [part for part in parts if part is not None]
    return Scores(rewrite, paraphrase, neighborhood, essence, fmean(present) if len(present) == len(parts) else None)
