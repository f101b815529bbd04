"""Facts as prompts that are traced: token ids, the subject's tokens, and the class of every token."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lightedit.data.fact import Fact, FactError
from lightedit.data.served import Encoded, as_served, encode_served
from lightedit.errors import ArgumentError
from lightedit.lm import LanguageModel

TokenClass = Literal[
    "before subject", "first subject", "middle subject", "last subject", "first after", "further", "last"
]
"""What a token is in its prompt: one before the subject; the subject's first, a middle, or its last one; the first one
after the subject, a further one, or the prompt's last one."""


@dataclass(frozen=True)
class TracedPrompt:
    """A prompt whose answer is explained.

    Attributes:
        fact: the fact.
        ids: token ids of the prompt, and of the answer without its last token, [T].
        length: number of the prompt's tokens.
        subject: the subject's tokens, as positions.
        targets: token ids of the answer, m; they are predicted at the last m of the T positions.
        tokens: the text of each of the prompt's tokens.
    """

    fact: Fact
    ids: list[int]
    length: int
    subject: range
    targets: list[int]
    tokens: list[str]

    @property
    def reads(self) -> range:
        """The positions at which the answer's tokens are predicted."""
        return range(len(self.ids) - len(self.targets), len(self.ids))

    def explaining(self, targets: Sequence[int]) -> "TracedPrompt":
        """The same prompt with another answer."""
        ids = [*self.ids[: self.length], *targets[:-1]]
        return TracedPrompt(self.fact, ids, self.length, self.subject, list(targets), self.tokens)

    def token_class(self, position: int) -> TokenClass:
        """The class of the prompt's token at `position`. The prompt's last token is always "last"."""
        first, last = self.subject[0], self.subject[-1]
        if position == self.length - 1:
            return "last"
        if position < first:
            return "before subject"
        if position > last:
            return "first after" if position == last + 1 else "further"
        if position == last:
            return "last subject"
        return "first subject" if position == first else "middle subject"


def answer_of(fact: Fact) -> str:
    """The answer that the model should know: the true target, or without one the only target."""
    return fact.target_true or fact.target_new


def traced_prompts(lm: LanguageModel, facts: Sequence[Fact]) -> list[TracedPrompt]:
    """Tokenise each fact's prompt with the answer that the model should know.

    Raises:
        FactError: there are no facts; one has no subject, cannot be tokenised, or is longer than the model's positions.
            The message says which fact, from 0.
    """
    if not facts:
        raise FactError("facts: the list is empty; give at least one fact to trace")
    for number, fact in enumerate(facts):
        if fact.subject is None:
            raise FactError(
                f"fact {number}: {fact.prompt!r} has no subject, whose tokens tracing corrupts; give one, and write "
                '"{}" in its place'
            )
    rows = encode_served(
        lm.tokenizer,
        [fact.text for fact in facts],
        [answer_of(fact) for fact in facts],
        [fact.serving for fact in facts],
    )
    prompts = []
    for number, (fact, row) in enumerate(zip(facts, rows, strict=True)):
        try:
            lm.check_rows([row.ids[:-1]])
            prompts.append(_prompt(lm, fact, row))
        except ArgumentError as error:
            raise FactError(f"fact {number}: {error}") from error
    return prompts


def tokens_between(offsets: Sequence[tuple[int, int]], begin: int, end: int) -> range:
    """The tokens that hold a character from `begin` to before `end`, as positions; empty if there are none."""
    inside = [i for i, (start, stop) in enumerate(offsets) if max(start, begin) < min(stop, end)]
    return range(inside[0], inside[-1] + 1) if inside else range(0)


def _prompt(lm: LanguageModel, fact: Fact, row: Encoded) -> TracedPrompt:
    assert fact.subject is not None
    (text,), _ = as_served(lm.tokenizer, [fact.text], fact.chat)
    begin = row.start + fact.prompt.index("{}")
    end = begin + len(fact.subject)
    length = len(row.ids) - row.count
    offsets = row.offsets[:length]
    inside = tokens_between(offsets, begin, end)
    if not inside:
        raise FactError(f"no token of {fact.text!r} holds the subject {fact.subject!r}")
    texts = [text[start:stop] for start, stop in offsets]
    special = lm.tokenizer.convert_ids_to_tokens(row.ids[:length])
    return TracedPrompt(
        fact,
        row.ids[:-1],
        length,
        inside,
        row.ids[length:],
        [text.strip() or str(name) for text, name in zip(texts, special, strict=True)],
    )
