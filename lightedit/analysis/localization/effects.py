"""The tracing effect of a fact at each layer, which a study sets beside the scores of edits."""

from collections.abc import Sequence

from lightedit.analysis.localization.settings import LocalizationSettings
from lightedit.analysis.trace import FactTrace
from lightedit.analysis.tracing import trace
from lightedit.data.fact import Fact
from lightedit.lm import LanguageModel


def effects(
    lm: LanguageModel, facts: Sequence[Fact], settings: LocalizationSettings, window: int, level: float
) -> list[list[float]]:
    """The tracing effect of each fact by layer, with the MLPs of a window of layers restored.

    The explained quantity is the joint probability of the true answer (Hase et al., 2023).

    Args:
        lm: the model.
        facts: the facts.
        settings: the study's settings.
        window: number of layers around each one.
        level: ν.
    """
    found = trace(lm, facts, settings=settings.tracing(window, level))
    return [restored_shares(fact, settings.largest_effect) for fact in found.facts]


def restored_shares(fact: FactTrace, largest: float | None) -> list[float]:
    """The share of P - P* that a window of MLPs restores, by layer, at the token where it restores most.

    max(0, P*_restored - P*) / |P - P*|, the maximum over the tokens from the subject's first one on; 0 if P is P*.

    Args:
        fact: a traced fact.
        largest: larger shares are cut to this; None leaves them.
    """
    whole = abs(fact.total_effect)
    restored = [fact.effects("mlp", position) for position in range(fact.subject[0], len(fact.tokens))]
    shares = [max(0.0, *column) / whole if whole > 0 else 0.0 for column in zip(*restored, strict=True)]
    return shares if largest is None else [min(share, largest) for share in shares]
