"""Metrics of what the model would say, teacher-forced: how often it is the right answer, or the earlier one."""

from torch import Tensor

from lightedit.metrics import functional
from lightedit.metrics.record_mean import RecordMean
from lightedit.metrics.records import PromptScores


class _Accuracy(RecordMean):
    @staticmethod
    def values(scores: PromptScores) -> Tensor | None:
        return scores.accuracy


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


class PortabilityAccuracy(_Accuracy):
    """How often the model draws the right conclusion from the new target, teacher-forced (arXiv 2305.13172)."""

    name = "portability_accuracy"
    prompts = "portability"


class _Stated(RecordMean):
    requires = "retain_accuracy"

    @staticmethod
    def values(scores: PromptScores) -> Tensor | None:
        return functional.accuracy(scores.accuracy)


class SuccessRate(_Stated):
    """How often the model says the whole new target on the fact's own prompt, teacher-forced.

    This and the next two are those of De Cao et al. (2021, arXiv 2104.08164).

    >>> import torch
    >>> from lightedit.metrics import RecordScores
    >>> metric = SuccessRate()
    >>> metric.update([RecordScores(PromptScores(torch.tensor([0.2]), None, torch.tensor([0.5])))])
    >>> metric.compute().item()  # half of the target's tokens are not enough
    0.0
    """

    name = "success_rate"
    prompts = "efficacy"


class RetainAccuracy(RecordMean):
    """How often the model predicts on the neighbourhood what it predicted before the edit, right or wrong.

    >>> import torch
    >>> from lightedit.metrics import RecordScores
    >>> kept = PromptScores(torch.tensor([2.0, 2.0]), None, torch.tensor([0.0, 0.0]), ((4,), (7,)), torch.ones(2))
    >>> metric = RetainAccuracy()
    >>> metric.update([RecordScores(neighborhood=kept)])
    >>> metric.compute().item()
    100.0
    """

    name = "retain_accuracy"
    prompts = "neighborhood"

    @staticmethod
    def values(scores: PromptScores) -> Tensor | None:
        """Whether the prediction is the earlier one, [n]; None if that is not known."""
        return scores.unchanged


class EquivalenceAccuracy(_Stated):
    """How often the model says the whole new target on paraphrases, teacher-forced."""

    name = "equivalence_accuracy"
    prompts = "paraphrase"


class EditRetention(_Accuracy):
    """ERR: accuracy on all facts written so far, by the model as it is after the last (arXiv 2211.11031).

    Update it with the facts of every round, scored after the last one.
    """

    name = "ERR"
    prompts = "efficacy"
    requires = "TRR"


class HeldOutRetention(_Accuracy):
    """TRR: accuracy on held-out facts, which are not edited, to compare with that before the edits (arXiv 2211.11031).

    >>> import torch
    >>> from lightedit.metrics import RecordScores
    >>> metric = HeldOutRetention()
    >>> metric.update([RecordScores(held_out=PromptScores(torch.tensor([0.2]), None, torch.tensor([0.5])))])
    >>> metric.compute().item()
    50.0
    """

    name = "TRR"
    prompts = "held_out"
