"""Settings of a stream of edits, shared by Python and the command line."""

from dataclasses import dataclass
from typing import Literal, get_args

from lightedit.errors import ArgumentError

Score = Literal["f1", "accuracy", "perplexity"]


@dataclass(frozen=True)
class StreamSettings:
    """Settings of a stream of edits.

    Attributes:
        score: "f1" is that of the words of the greedy answer, "accuracy" the share of answers of which every token is
            the most probable one after those before it, "perplexity" that of the answer's tokens, for answers that are
            texts.
        max_edits: edits after which the stream ends.
        score_every: edits between scores of what was known and of all edits so far.
        test_first: skip facts that the model states already.
        answer_tokens: for "f1" of facts with `end_turn`, most tokens of an answer. Other facts get as many as their
            target has, because a model goes on after an answer.
        paraphrases: score the paraphrases of the facts edited so far, too.
        batch_size: prompts of one forward pass at most, while scoring.
        progress_bar: show progress and the time left on standard error.

    Raises:
        ArgumentError: a value is out of range.
    """

    score: Score = "f1"
    max_edits: int = 1000
    score_every: int = 50
    test_first: bool = True
    answer_tokens: int = 20
    paraphrases: bool = True
    batch_size: int = 64
    progress_bar: bool = True

    def __post_init__(self) -> None:
        if self.score not in get_args(Score):
            raise ArgumentError(f"score is one of {', '.join(get_args(Score))}, got {self.score!r}")
        for name in ("max_edits", "score_every", "answer_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name} must be at least 1, got {getattr(self, name)}")
