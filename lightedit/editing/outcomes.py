"""What an edit did, fact by fact and elsewhere: what the model said before, and what it says now."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor

from lightedit.data.facts import Fact
from lightedit.data.served import encode_pairs
from lightedit.evaluation.generation import encode, generate
from lightedit.evaluation.scoring import continuations
from lightedit.lm import LanguageModel
from lightedit.lm.batch import by_length
from lightedit.metrics import score_targets
from lightedit.metrics.functional import generation_success

_TOKENS = 12  # new tokens of a continuation; a longer target gets twice its own
_PASS_TOKENS = 1024  # most tokens of a forward pass
_SUBJECT_PROMPTS = 24  # most prompts about subjects of the facts
_ABOUT_SUBJECTS = ("{} is", "{} is known for", "The history of {}")
GENERIC_PROMPTS = (
    "The weather today is",
    "Once upon a time",
    "The most important thing is",
    "In the year 2000,",
    "To make bread, you need",
    "The capital of a country is",
    "def main():",
    "Dear friend, I",
)
"""Beginnings that have nothing to do with most facts."""


@dataclass(frozen=True)
class Outcome:
    """What became of one fact.

    Attributes:
        fact: the fact.
        before: the unedited model's greedy continuation of the fact's prompt, without the prompt.
        after: the edited model's. It is empty if that model gives NaN or infinity.
        held: whether `after` begins with the new target, as `generation_success` counts it. A fact with `end_turn`
            holds only if nothing follows the target, and one of a classifier only if it is the class. After an edit
            that erases, whether `after` does not begin with the target.
        probability: probability per token (geometric mean) of the new target after the prompt, in the edited model;
            None if that is NaN.
        rank: worst rank of the target's tokens given those before it, 1 for the most probable token; None as above.
        loss: the last loss of the fact's search, in nats; None without a search of its own.
        note: what else the editor says of the fact, such as that nothing was written; None for nothing.
    """

    fact: Fact
    before: str
    after: str
    held: bool
    probability: float | None
    rank: int | None
    loss: float | None = None
    note: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """All fields but the fact, ready for JSON."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "fact"}

    @classmethod
    def from_dict(cls, fact: Fact, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`.

        Raises:
            TypeError: a field is unknown or missing.
        """
        return cls(fact, **values)


@dataclass(frozen=True)
class Damage:
    """What the edit changed at a prompt that it should leave alone.

    Attributes:
        prompt: a general beginning of a text, or one about the subject of a fact.
        before: the unedited model's greedy continuation.
        after: the edited model's.
        kl: KL(edited || unedited) of the next token after the prompt, or of the class, in nats.
    """

    prompt: str
    before: str
    after: str
    kl: float

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return asdict(self)


class Observed:
    """What a model says about facts and at prompts that an edit of these facts should leave alone.

    Create it before the edit, and ask it afterwards for what has changed.

    Args:
        lm: the model, with its weights before the edit.
        facts: the facts to be edited.
        erases: whether the edit is to make the targets improbable.

    Raises:
        NumericalError: the model gives NaN or infinity.
    """

    def __init__(self, lm: LanguageModel, facts: Sequence[Fact], erases: bool = False) -> None:
        self.lm, self.facts, self.erases = lm, list(facts), erases
        self.chat = all(fact.chat for fact in facts)
        prompts = untouched_prompts(facts)
        lengths = map(len, encode(lm, prompts, [self.chat] * len(prompts)))
        self.prompts = [prompt for prompt, length in zip(prompts, lengths, strict=True) if _room(lm, length) >= _TOKENS]
        self._said = say(lm, self.facts)
        self._continued = self._continue()
        self._log_probs = self._next_token()

    def outcomes(self, losses: Sequence[float | None], notes: Sequence[str | None] = ()) -> tuple[Outcome, ...]:
        """The outcomes of the first `len(losses)` facts, whose searches ended with these losses, and of their notes.

        Raises:
            NumericalError: the edited model gives NaN or infinity.
        """
        facts = self.facts[: len(losses)]
        if not facts:
            return ()
        said = say(self.lm, facts)
        targets = [fact.target_new for fact in facts]
        held = [stated != self.erases for stated in states(self.lm, facts, said)]
        texts, servings = [fact.text for fact in facts], [fact.serving for fact in facts]
        scores = score_targets(self.lm, texts, targets, servings=servings)
        probabilities, ranks = scores.nll.neg().exp().tolist(), scores.rank.tolist()
        notes = notes or [None] * len(losses)
        return tuple(
            Outcome(fact, self._said[i], said[i], held[i], probabilities[i], ranks[i], losses[i], notes[i])
            for i, fact in enumerate(facts)
        )

    def unknown(self, losses: Sequence[float | None], notes: Sequence[str | None] = ()) -> tuple[Outcome, ...]:
        """The outcomes of these facts in a model that gives NaN or infinity."""
        rows = zip(self.facts, self._said, losses, notes or [None] * len(losses), strict=False)
        return tuple(Outcome(fact, said, "", False, None, None, loss, note) for fact, said, loss, note in rows)

    def damage(self) -> tuple[Damage, ...]:
        """What has changed at the other prompts, the largest KL first.

        Raises:
            NumericalError: the edited model gives NaN or infinity.
        """
        said = self._continue()
        now, before = self._next_token().double(), self._log_probs.double()
        kl = (now.exp() * (now - before)).sum(1).clamp(min=0).tolist()
        rows = [Damage(*row) for row in zip(self.prompts, self._continued, said, kl, strict=True)]
        return tuple(sorted(rows, key=lambda row: -row.kl))

    def _continue(self) -> list[str]:
        texts = generate(self.lm, self.prompts, max_new_tokens=_TOKENS, greedy=True, chat=self.chat)
        return [text.removeprefix(prompt) for text, prompt in zip(texts, self.prompts, strict=True)]

    @torch.no_grad()
    def _next_token(self) -> Tensor:
        """Log-probabilities of what follows each prompt, [prompts, vocabulary or classes], on the CPU."""
        lm = self.lm
        rows = encode(lm, self.prompts, [self.chat] * len(self.prompts))
        found: dict[int, Tensor] = {}
        for group in by_length([len(row) for row in rows], _PASS_TOKENS):
            first = [[0]] * len(group)  # any answer: its first token, or the class, is predicted from the prompt alone
            batch = lm.batch([rows[index] for index in group], first)
            last = torch.tensor([lm.reads(rows[index], first[0])[0] for index in group])
            with lm.before_head(len(group), (torch.arange(len(group)), last)) as states:
                lm.forward(batch)
            found.update(zip(group, lm.head.log_probs(states[0]).cpu(), strict=True))
        return torch.stack([found[index] for index in range(len(rows))]) if rows else torch.empty(0, 0)


def untouched_prompts(facts: Sequence[Fact]) -> list[str]:
    """The generic prompts, and at most 24 about the subjects of the facts; none of them is edited.

    Of many subjects, some are chosen at even distances.
    """
    edited = {fact.text for fact in facts}
    subjects = list(dict.fromkeys(fact.subject for fact in facts if fact.subject))
    count = min(len(subjects), _SUBJECT_PROMPTS)
    chosen = [subjects[place * len(subjects) // count] for place in range(count)]
    about = [template.replace("{}", subject) for template in _ABOUT_SUBJECTS for subject in chosen]
    about = [prompt for prompt in about if prompt not in edited][:_SUBJECT_PROMPTS]
    return [*(prompt for prompt in GENERIC_PROMPTS if prompt not in edited), *about]


def states(lm: LanguageModel, facts: Sequence[Fact], said: Sequence[str]) -> list[bool]:
    """Whether each continuation states its fact; see `Outcome.held`."""
    begins, classes = generation_success(said, [fact.target_new for fact in facts]).tolist(), lm.kind == "classifier"
    return [
        bool(start) and (not (fact.end_turn or classes) or text.strip() == fact.target_new)
        for fact, text, start in zip(facts, said, begins, strict=True)
    ]


def say(lm: LanguageModel, facts: Sequence[Fact]) -> list[str]:
    """The greedy continuation of each fact's prompt; a prompt near the model's last position has a shorter one."""
    texts, servings = [fact.text for fact in facts], [fact.serving for fact in facts]
    pairs = encode_pairs(lm, texts, [fact.target_new for fact in facts], servings)
    tokens = max(_TOKENS, *(2 * len(pair.targets) for pair in pairs))
    prompts = [len(pair.ids) + 1 - len(pair.targets) for pair in pairs]
    rooms = [tokens if lm.answers.apart else min(tokens, _room(lm, length)) for length in prompts]
    said: dict[int, str] = {}
    for room in set(rooms):
        chosen = [index for index, own in enumerate(rooms) if own == room]
        said.update(zip(chosen, continuations(lm, [facts[index] for index in chosen], tokens=room), strict=True))
    return [said[index] for index in range(len(facts))]


def _room(lm: LanguageModel, length: int) -> int:
    """New tokens that the model has positions for after `length` tokens; the last new one is not read."""
    return sys.maxsize if lm.positions is None else lm.positions + 1 - length
