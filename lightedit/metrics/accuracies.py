"""Teacher-forced metrics of the model's most probable tokens, compared with the right answer or the earlier one."""

from torch import Tensor

from lightedit.metrics import functional
from lightedit.metrics.record_mean import RecordMean
from lightedit.metrics.records import PromptScores


class _Accuracy(RecordMean):
    @staticmethod
    def values(scores: PromptScores) -> Tensor | None:
        return scores.accuracy


class EfficacyAccuracy(_Accuracy):
    """Share of the new target's tokens that are the most probable ones on the fact's prompt, teacher-forced."""

    name = "efficacy_accuracy"
    prompts = "efficacy"


class ParaphraseAccuracy(_Accuracy):
    """Share of the new target's tokens that are the most probable ones on paraphrases, teacher-forced."""

    name = "paraphrase_accuracy"
    prompts = "paraphrase"


class NeighborhoodAccuracy(_Accuracy):
    """Share of the true answer's tokens that are the most probable ones on the neighbourhood, teacher-forced."""

    name = "neighborhood_accuracy"
    prompts = "neighborhood"


class PortabilityAccuracy(_Accuracy):
    """Share of the right answer's tokens that are the most probable ones on portability questions, teacher-forced.

    The answers to these questions follow from the new target (Yao et al., 2023, arXiv 2305.13172).
    """

    name = "portability_accuracy"
    prompts = "portability"


class _Stated(RecordMean):
    requires = "retain_accuracy"

    @staticmethod
    def values(scores: PromptScores) -> Tensor | None:
        return functional.accuracy(scores.accuracy)


class SuccessRate(_Stated):
    """How often every token of the new target is the most probable one on the fact's prompt, teacher-forced.

    `SuccessRate`, `RetainAccuracy` and `EquivalenceAccuracy` are those of De Cao et al. (2021, arXiv 2104.08164).

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
    """How often the model's prediction on the neighbourhood is the same as before the edit, right or wrong.

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
        """1 where the prediction is the earlier one, else 0, [n]; None if the earlier one is not known."""
        return scores.unchanged


class EquivalenceAccuracy(_Stated):
    """How often every token of the new target is the most probable one on paraphrases, teacher-forced."""

    name = "equivalence_accuracy"
    prompts = "paraphrase"


class EditRetention(_Accuracy):
    """ERR: efficacy accuracy on all facts written so far, with the model after the last round (arXiv 2211.11031).

    Update it with the facts of all rounds, scored after the last one.
    """

    name = "ERR"
    prompts = "efficacy"
    requires = "TRR"


class HeldOutRetention(_Accuracy):
    """TRR: accuracy on held-out facts, which are not edited (arXiv 2211.11031). Compare it with TRR before the edits.

    >>> import torch
    >>> from lightedit.metrics import RecordScores
    >>> metric = HeldOutRetention()
    >>> metric.update([RecordScores(held_out=PromptScores(torch.tensor([0.2]), None, torch.tensor([0.5])))])
    >>> metric.compute().item()
    50.0
    """

    name = "TRR"
    prompts = "held_out"
