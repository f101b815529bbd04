"""Metrics of what the model writes by itself."""

import torch
from torch import Tensor

from lightedit.metrics import functional
from lightedit.metrics.record_mean import RecordMean
from lightedit.metrics.records import Generations


class GenerationEntropy(RecordMean):
    """GE: how varied the texts are that the model draws, in bits times 100, as papers give it.

    A model that falls into repetition has a low one. See `functional.generation_entropy`.

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
    """RS: how alike, in its words, what the model writes is to given texts about things of the new target's kind.

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
    """RS against texts that the unedited model wrote itself; not to be compared with published figures."""

    name = "RS_own"

    @staticmethod
    def values(scores: Generations) -> Tensor | None:
        """The score of all texts, [1]; None if there is none against such references."""
        return _score(scores) if scores.own_references else None


def _score(scores: Generations) -> Tensor | None:
    score = scores.reference_score
    return None if score is None else torch.tensor([score], dtype=torch.float64)


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
