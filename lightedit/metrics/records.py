"""What the metrics read: one record's scores and texts."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PromptScores:
    """Scores of the n >= 1 prompts of one kind, each tensor [n].

    Attributes:
        nll: mean NLL per token of the wanted answer, in nats.
        nll_other: that of the answer it competes with; None if there is none.
        accuracy: whether, or to which share, the wanted answer's tokens are the most probable, in [0, 1].
    """

    nll: Tensor
    nll_other: Tensor | None
    accuracy: Tensor


@dataclass(frozen=True)
class Generations:
    """What the model wrote by itself for one fact.

    Attributes:
        texts: n >= 1 texts drawn after the fact's generation prompts, prompts included.
        continuation: what it says after the fact's own prompt, greedily, without that prompt.
        target: what the continuation should begin with.
    """

    texts: tuple[str, ...]
    continuation: str
    target: str


@dataclass(frozen=True)
class RecordScores:
    """Scores of one fact: on its own prompt, on its paraphrases and on its neighbourhood; and its generations.

    The wanted answer is the new target on the first two, and the true one on the neighbourhood.
    """

    efficacy: PromptScores
    paraphrase: PromptScores | None = None
    neighborhood: PromptScores | None = None
    generations: Generations | None = None
