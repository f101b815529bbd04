"""Metrics of generated text."""

import torch
from torch import Tensor

from lightedit.metrics import functional
from lightedit.metrics.record_mean import RecordMean
from lightedit.metrics.records import Generations


class GenerationEntropy(RecordMean):
    """GE: n-gram entropy of generated texts, in bits times 100, as papers report it.

    It is low for a model that repeats itself. See `functional.generation_entropy`.

    >>> from lightedit.metrics import RecordScores
    >>> metric = GenerationEntropy()
    >>> metric.update([RecordScores(generations=Generations(("to be or not to be",), " Rome", "Rome"))])
    >>> round(metric.compute().item(), 2)
    197.4
    """

    name = "GE"
    prompts = "generations"

    @staticmethod
    def values(scores: Generations) -> Tensor | None:
        """The entropy of each text, [n] bits."""
        return functional.generation_entropy(scores.texts)


class ReferenceScore(RecordMean):
    """RS: TF-IDF cosine between generated texts and reference texts about subjects that have the new target.

    See `functional.reference_score`.

    >>> from lightedit.metrics import RecordScores
    >>> written = Generations(("Rome is old",), " Rome", "Rome", reference_score=0.25)
    >>> metric = ReferenceScore()
    >>> metric.update([RecordScores(generations=written)])
    >>> metric.compute().item()
    25.0
    """

    name = "RS"
    prompts = "generations"

    @staticmethod
    def values(scores: Generations) -> Tensor | None:
        """The score of all texts, [1]; None if there is none against such references."""
        return None if scores.own_references else _score(scores)


class OwnReferenceScore(ReferenceScore):
    """RS against self-generated text of the unedited model. It is not comparable with published figures."""

    name = "RS_own"

    @staticmethod
    def values(scores: Generations) -> Tensor | None:
        """The score of all texts, [1]; None if there is none against such references."""
        return _score(scores) if scores.own_references else None


def _score(scores: Generations) -> Tensor | None:
    score = scores.reference_score
    return None if score is None else torch.tensor([score], dtype=torch.float64)


class GenerationSuccess(RecordMean):
    """Share of facts whose own prompt the model continues with the new target, by greedy generation.

    The efficacy metrics are teacher-forced instead.
    """

    name = "generation_success"
    prompts = "generations"

    @staticmethod
    def values(scores: Generations) -> Tensor | None:
        """1 if the continuation begins with the target, else 0, [1]."""
        return functional.generation_success([scores.continuation], [scores.target])
