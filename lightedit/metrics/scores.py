"""The metrics of knowledge editing as torchmetrics `Metric`s, exact under several processes.

All take the same update, a sequence of `RecordScores`, so one collection holds them (`edit_metrics`). Definitions are
those of Meng et al. (2022, arXiv 2202.05262; 2023, arXiv 2210.07229) unless another source is named. Values are in
percent, except generation entropy. Every metric except S is a mean over records; its 95 % interval is the mean ± 1.96
standard errors. The interval of S is bootstrapped over records.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.utilities import dim_zero_cat

from lightedit.metrics import functional
from lightedit.metrics.accuracies import (
    EditRetention,
    EfficacyAccuracy,
    EquivalenceAccuracy,
    HeldOutRetention,
    NeighborhoodAccuracy,
    ParaphraseAccuracy,
    PortabilityAccuracy,
    RetainAccuracy,
    SuccessRate,
)
from lightedit.metrics.generated import GenerationEntropy, GenerationSuccess, OwnReferenceScore, ReferenceScore
from lightedit.metrics.record_mean import RecordMean
from lightedit.metrics.records import PromptScores, RecordScores


class _Success(RecordMean):
    @staticmethod
    def values(scores: PromptScores) -> Tensor | None:
        return None if scores.nll_other is None else functional.success(scores.nll, scores.nll_other)


class _Magnitude(RecordMean):
    @staticmethod
    def values(scores: PromptScores) -> Tensor | None:
        return None if scores.nll_other is None else functional.magnitude(scores.nll, scores.nll_other)


class EfficacyScore(_Success):
    """ES: how often the new target is more probable than the true one on the fact's own prompt.

    >>> one = PromptScores(torch.tensor([0.2]), torch.tensor([1.5]), torch.tensor([1.0]))
    >>> other = PromptScores(torch.tensor([3.0]), torch.tensor([1.5]), torch.tensor([0.0]))
    >>> metric = EfficacyScore()
    >>> metric.update([RecordScores(one), RecordScores(other)])
    >>> metric.compute().item()
    50.0
    """

    name = "ES"
    prompts = "efficacy"


class ParaphraseScore(_Success):
    """PS: how often the new target is more probable than the true one on paraphrases."""

    name = "PS"
    prompts = "paraphrase"


class NeighborhoodScore(_Success):
    """NS: how often the true target is more probable than the new one on prompts about other subjects."""

    name = "NS"
    prompts = "neighborhood"


class EfficacyMagnitude(_Magnitude):
    """EM: per-token probability of the new target minus that of the true one on the fact's own prompt.

    >>> even = PromptScores(torch.tensor([0.7]), torch.tensor([0.7]), torch.tensor([1.0]))
    >>> metric = EfficacyMagnitude()
    >>> metric.update([RecordScores(even)])
    >>> metric.compute().item()
    0.0
    """

    name = "EM"
    prompts = "efficacy"


class ParaphraseMagnitude(_Magnitude):
    """PM: per-token probability of the new target minus that of the true one on paraphrases."""

    name = "PM"
    prompts = "paraphrase"


class NeighborhoodMagnitude(_Magnitude):
    """NM: per-token probability of the true target minus that of the new one on prompts about other subjects."""

    name = "NM"
    prompts = "neighborhood"


class EditScore(Metric):
    """S: the harmonic mean of ES, PS and NS, in percent.

    >>> wins = PromptScores(torch.tensor([0.2]), torch.tensor([1.5]), torch.tensor([1.0]))
    >>> half = PromptScores(torch.tensor([0.2, 3.0]), torch.tensor([1.5, 1.5]), torch.tensor([1.0, 0.0]))
    >>> metric = EditScore()
    >>> metric.update([RecordScores(wins, paraphrase=half, neighborhood=half)])
    >>> round(metric.compute().item(), 6)
    60.0
    """

    name: ClassVar[str] = "S"
    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    parts: ClassVar[tuple[type[RecordMean], ...]] = (EfficacyScore, ParaphraseScore, NeighborhoodScore)
    outcomes: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # The bootstrap needs every record's (ES, PS, NS). They are kept flat and in the metric's dtype, to match the
        # empty state that torchmetrics gathers from a process without records.
        self.set_dtype(torch.float64)
        self.add_state("outcomes", [], dist_reduce_fx="cat")

    def update(self, records: Sequence[RecordScores]) -> None:
        """Add records."""
        found = [[part.of(record) for part in self.parts] for record in records]
        # the bootstrap draws only records that have at least one of them
        counted = [row for row in found if any(value is not None for value in row)]
        values = [torch.nan if value is None else value for row in counted for value in row]
        self.outcomes.append(torch.tensor(values, dtype=torch.float64, device=self.device))

    def compute(self) -> Tensor:
        """S, a float64 scalar; NaN if ES, PS or NS is undefined."""
        return 100 * functional.edit_score(self._records())

    def interval(self) -> Tensor:
        """Ends of the 95 % confidence interval, [2]; see `functional.edit_score_interval`."""
        with self.sync_context(self.dist_sync_fn, should_sync=self.sync_on_compute):
            return 100 * functional.edit_score_interval(self._records())

    def _records(self) -> Tensor:
        outcomes = dim_zero_cat(self.outcomes) if len(self.outcomes) else torch.zeros(0, dtype=torch.float64)
        return outcomes.view(-1, len(self.parts))


METRICS: tuple[type[RecordMean | EditScore], ...] = (
    EfficacyScore,
    ParaphraseScore,
    NeighborhoodScore,
    EfficacyMagnitude,
    ParaphraseMagnitude,
    NeighborhoodMagnitude,
    EfficacyAccuracy,
    ParaphraseAccuracy,
    NeighborhoodAccuracy,
    EditScore,
    PortabilityAccuracy,
    SuccessRate,
    RetainAccuracy,
    EquivalenceAccuracy,
    EditRetention,
    HeldOutRetention,
    GenerationEntropy,
    ReferenceScore,
    OwnReferenceScore,
    GenerationSuccess,
)
"""Every metric, in the order in which they are reported."""

RECORD_MEANS: tuple[type[RecordMean], ...] = tuple(kind for kind in METRICS if issubclass(kind, RecordMean))
"""Every metric that is a mean over records."""


def edit_metrics(**kwargs: Any) -> MetricCollection:
    """All metrics in one collection, by name.

    Args:
        kwargs: arguments of `torchmetrics.Metric`, given to each metric.

    >>> metrics = edit_metrics()
    >>> scores = PromptScores(torch.tensor([0.2]), torch.tensor([1.5]), torch.tensor([1.0]))
    >>> metrics.update([RecordScores(efficacy=scores)])
    >>> {name: round(value, 1) for name, value in reported(metrics.compute()).items()}
    {'ES': 100.0, 'EM': 59.6, 'efficacy_accuracy': 100.0}
    """
    return MetricCollection({metric.name: metric(**kwargs) for metric in METRICS})


def reported(values: Mapping[str, Tensor]) -> dict[str, float]:
    """The values of `edit_metrics` to report, in order: those that are defined and do not repeat another metric.

    Success rate and equivalence accuracy are reported only with retain accuracy, and ERR only with TRR. Without these
    they would repeat the accuracies.
    """
    defined = {kind.name: float(values[kind.name]) for kind in METRICS if not values[kind.name].isnan()}
    requires = {kind.name: kind.requires for kind in RECORD_MEANS}
    return {name: value for name, value in defined.items() if (requires.get(name) or name) in defined}
