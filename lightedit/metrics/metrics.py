"""The metrics of knowledge editing as torchmetrics `Metric`s, exact under several processes.

All take the same update, a sequence of `RecordScores`, so they live in one collection (`edit_metrics`).
Definitions are those of Meng et al. (2022, arXiv 2202.05262; 2023, arXiv 2210.07229). Values are in percent, but for
generation entropy.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.utilities import dim_zero_cat

from lightedit.metrics import functional
from lightedit.metrics.records import Generations, PromptScores, RecordScores


class RecordMean(Metric):
    """Mean over records of a value that is a mean over a record's prompts, times 100.

    Records without prompts of the metric's kind, or without what its value needs, do not count.

    Attributes:
        name: its short name in papers, and its key in a collection.
        prompts: the field of `RecordScores` that it reads.
    """

    name: ClassVar[str]
    prompts: ClassVar[Literal["efficacy", "paraphrase", "neighborhood", "generations"]]
    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # The sum of values, of their squares, and their number. Its name differs between metrics because a
        # MetricCollection takes metrics whose states have equal names, and equal values at first, for one.
        self._sums = f"sums_{self.name}"
        self.add_state(self._sums, torch.zeros(3, dtype=torch.float64), dist_reduce_fx="sum")

    @staticmethod
    @abstractmethod
    def values(scores: Any) -> Tensor | None:
        """The value on each prompt, [n]; None if the scores, of the kind that `prompts` names, do not allow it."""

    @classmethod
    def of(cls, record: RecordScores) -> float | None:
        """A record's own value, not in percent; None if it has none."""
        scores = getattr(record, cls.prompts)
        values = None if scores is None else cls.values(scores)
        return None if values is None else values.double().mean().item()

    def update(self, records: Sequence[RecordScores]) -> None:
        """Add records."""
        found = [value for record in records if (value := self.of(record)) is not None]
        values = torch.tensor(found, dtype=torch.float64, device=self.device)
        sums = torch.stack([values.sum(), values.square().sum(), values.new_tensor(len(found))])
        setattr(self, self._sums, getattr(self, self._sums) + sums)

    def compute(self) -> Tensor:
        """The mean, a float64 scalar; NaN if no record counted."""
        total, _, count = getattr(self, self._sums).unbind()
        return 100 * total / count

    def interval(self) -> Tensor:
        """Ends of the mean's 95 % confidence interval, [2]; see `functional.mean_interval`."""
        with self.sync_context(self.dist_sync_fn, should_sync=self.sync_on_compute):
            return 100 * functional.mean_interval(getattr(self, self._sums))


class _Success(RecordMean):
    @staticmethod
    def values(scores: PromptScores) -> Tensor | None:
        return None if scores.nll_other is None else functional.success(scores.nll, scores.nll_other)


class _Magnitude(RecordMean):
    @staticmethod
    def values(scores: PromptScores) -> Tensor | None:
        return None if scores.nll_other is None else functional.magnitude(scores.nll, scores.nll_other)


class _Accuracy(RecordMean):
    @staticmethod
    def values(scores: PromptScores) -> Tensor | None:
        return scores.accuracy


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
    """EM: by how much the new target is more probable than the true one on the fact's own prompt.

    >>> even = PromptScores(torch.tensor([0.7]), torch.tensor([0.7]), torch.tensor([1.0]))
    >>> metric = EfficacyMagnitude()
    >>> metric.update([RecordScores(even)])
    >>> metric.compute().item()
    0.0
    """

    name = "EM"
    prompts = "efficacy"


class ParaphraseMagnitude(_Magnitude):
    """PM: by how much the new target is more probable than the true one on paraphrases."""

    name = "PM"
    prompts = "paraphrase"


class NeighborhoodMagnitude(_Magnitude):
    """NM: by how much the true target is more probable than the new one on prompts about other subjects."""

    name = "NM"
    prompts = "neighborhood"


class EfficacyAccuracy(_Accuracy):
    """How often the new target is what the model says on the fact's own prompt, teacher-forced."""

    name = "efficacy_accuracy"
    prompts = "efficacy"


class ParaphraseAccuracy(_Accuracy):
    """How often the new target is what the model says on paraphrases, teacher-forced."""

    name = "paraphrase_accuracy"
    prompts = "paraphrase"


class NeighborhoodAccuracy(_Accuracy):
    """How often the true answer is what the model says on prompts about other subjects, teacher-forced."""

    name = "neighborhood_accuracy"
    prompts = "neighborhood"


class GenerationEntropy(RecordMean):
    """GE: how varied the texts are that the model draws, in bits times 100, as papers give it.

    A model that falls into repetition has a low one. See `functional.generation_entropy`.

    >>> one = PromptScores(torch.tensor([0.2]), torch.tensor([1.5]), torch.tensor([1.0]))
    >>> metric = GenerationEntropy()
    >>> metric.update([RecordScores(one, generations=Generations(("to be or not to be",), " Rome", "Rome"))])
    >>> round(metric.compute().item(), 2)
    197.4
    """

    name = "GE"
    prompts = "generations"

    @staticmethod
    def values(scores: Generations) -> Tensor | None:
        """The entropy of each text, [n] bits."""
        return functional.generation_entropy(scores.texts)


class GenerationSuccess(RecordMean):
    """How often the model, writing greedily, continues the fact's own prompt with the new target.

    The share of facts that it states by itself; the efficacy metrics show it the target or count token by token.
    """

    name = "generation_success"
    prompts = "generations"

    @staticmethod
    def values(scores: Generations) -> Tensor | None:
        """Whether the continuation begins with the target, [1]."""
        return functional.generation_success([scores.continuation], [scores.target])


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
        # The bootstrap needs every record's (ES, PS, NS). They are kept flat and in the metric's own dtype,
        # because so is the empty state that torchmetrics gathers from a process without records.
        self.set_dtype(torch.float64)
        self.add_state("outcomes", [], dist_reduce_fx="cat")

    def update(self, records: Sequence[RecordScores]) -> None:
        """Add records."""
        found = [part.of(record) for record in records for part in self.parts]
        values = [torch.nan if value is None else value for value in found]
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


RECORD_MEANS: tuple[type[RecordMean], ...] = (
    EfficacyScore,
    ParaphraseScore,
    NeighborhoodScore,
    EfficacyMagnitude,
    ParaphraseMagnitude,
    NeighborhoodMagnitude,
    EfficacyAccuracy,
    ParaphraseAccuracy,
    NeighborhoodAccuracy,
    GenerationEntropy,
    GenerationSuccess,
)
"""Every metric that is a mean over records."""

METRICS: tuple[type[RecordMean | EditScore], ...] = (*RECORD_MEANS[:-2], EditScore, *RECORD_MEANS[-2:])
"""Every metric, in the order in which they are reported."""


def edit_metrics(**kwargs: Any) -> MetricCollection:
    """All metrics in one collection, by name.

    Args:
        kwargs: of `torchmetrics.Metric`, given to each.
    """
    return MetricCollection({metric.name: metric(**kwargs) for metric in METRICS})
