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
        predicted: for each prompt, the token that is the most probable one where each of the wanted answer's stands.
        unchanged: 1 where `predicted` is what it was before the edit, else 0; None if that is not known.
    """

    nll: Tensor
    nll_other: Tensor | None
    accuracy: Tensor
    predicted: tuple[tuple[int, ...], ...] = ()
    unchanged: Tensor | None = None


@dataclass(frozen=True)
class Generations:
    """What the model wrote by itself for one fact.

    Attributes:
        texts: n >= 1 texts drawn after the fact's generation prompts, prompts included.
        continuation: what it says after the fact's own prompt, greedily, without that prompt.
        target: what the continuation should begin with.
        reference_score: likeness of the texts, joined, to reference texts; None without any.
        own_references: whether the unedited model wrote those itself.
    """

    texts: tuple[str, ...]
    continuation: str
    target: str
    reference_score: float | None = None
    own_references: bool = False


@dataclass(frozen=True)
class RecordScores:
    """Scores of one fact: on its own prompt, on its paraphrases, on its neighbourhood and so on; and its generations.

    The wanted answer is the new target on the first two, the true one on the neighbourhood, and on `portability`
    what follows from the new target. A fact that is held out, never edited, has `held_out` alone, the scores of its
    right answer.
    """

    efficacy: PromptScores | None = None
    paraphrase: PromptScores | None = None
    neighborhood: PromptScores | None = None
    generations: Generations | None = None
    portability: PromptScores | None = None
    held_out: PromptScores | None = None
