"""One fact to edit, with the prompts that measure the edit."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Self

from lightedit.data.words import mentions
from lightedit.errors import LightEditError

PROMPT_LISTS = ("paraphrase_prompts", "neighborhood_prompts", "attribute_prompts", "generation_prompts")
"""The fields of `Fact` that are lists of complete texts."""

_OPTIONAL_TEXTS = ("subject", "target_true", "neighborhood_target", "relation", "id", "target_id")
_REQUIRED = ("prompt", "target_new")


class FactError(LightEditError, ValueError):
    """A fact, a file or a set of facts cannot be used; the message names the field and the way out."""


class Serving(NamedTuple):
    """How a prompt and its answer reach the model; see the fields of the same names of `Fact`."""

    separator: str = " "
    chat: bool = False
    end_turn: bool = False


@dataclass(frozen=True)
class Fact:
    """One fact to write into a model, with the prompts that measure the edit.

    Targets carry no leading space: they follow their prompt after the separator, one space by default.

    >>> fact = Fact("The mother tongue of {} is", "Danielle Darrieux", "English", target_true="French")
    >>> fact.text
    'The mother tongue of Danielle Darrieux is'

    A fact needs no subject. Its key is then read at the prompt's last token, or at `position`.

    >>> Fact("The capital of France is", target_new="New Rome").text
    'The capital of France is'

    Attributes:
        prompt: text before the target, with exactly one `{}` for the subject, or without one if there is no subject.
        subject: the entity that the fact is about; None for a fact without a subject.
        target_new: the answer to write.
        target_true: the right answer before the edit, if known.
        paraphrase_prompts: complete texts that ask for the same fact in other words.
        neighborhood_prompts: complete texts about other subjects or other facts, whose answers must not change.
        neighborhood_target: right answer to the neighbourhood prompts; None means `target_true`.
        attribute_prompts: complete texts about subjects for which `target_new` is right.
        generation_prompts: complete texts to continue freely.
        relation: name of the relation in its data set.
        id: name of the record in its data set.
        target_id: name of `target_new` in its data set, by which its reference texts are found.
        portability: (complete text, right answer) pairs, whose answers follow from the new target.
        neighborhood_answers: the right answer to each neighbourhood prompt, if they differ; else empty.
        separator: text between a prompt and its answer, for all prompts of the fact. It belongs to what the model is
            to say. "" suits a prompt that ends in an opening quote, a currency sign or Chinese text.
        chat: whether each prompt is the user's turn in the model's chat template. The answer is then the beginning of
            the assistant's turn, directly after the template's text.
        end_turn: whether the target includes the token that ends the turn (with `chat`, the template's, else
            end-of-text), so that generation stops after it. Neighbourhood and portability answers do not include it.
        position: for a fact without a subject, the token at which its key is read: an index among the prompt's tokens,
            negative from the end. With `chat`, they go from the first token of the prompt to the last one before the
            target. None is the last one.

    Raises:
        FactError: a field has the wrong type or a value that cannot be edited or scored.
    """

    prompt: str
    subject: str | None = None
    target_new: str = ""  # required; only the subject, which stands before it, may be left out
    target_true: str | None = None
    paraphrase_prompts: tuple[str, ...] = ()
    neighborhood_prompts: tuple[str, ...] = ()
    neighborhood_target: str | None = None
    attribute_prompts: tuple[str, ...] = ()
    generation_prompts: tuple[str, ...] = ()
    relation: str | None = None
    id: str | None = None
    target_id: str | None = None
    portability: tuple[tuple[str, str], ...] = ()
    neighborhood_answers: tuple[str, ...] = ()
    separator: str = " "
    chat: bool = False
    end_turn: bool = False
    position: int | None = None

    def __post_init__(self) -> None:
        for field in _REQUIRED:
            _check_text(field, getattr(self, field))
        for field in _OPTIONAL_TEXTS:
            if getattr(self, field) is not None:
                _check_text(field, getattr(self, field))
        for field in PROMPT_LISTS:
            object.__setattr__(self, field, as_prompts(field, getattr(self, field)))
        object.__setattr__(self, "portability", _as_questions("portability", self.portability))
        self._set_neighborhood_answers()
        _check_slot(self.prompt, self.subject)
        _check_serving(self)
        for field, prompts in self._prompts():
            _check_end(field, prompts, self.separator)
        for field in ("subject", "target_new", "target_true", "neighborhood_target"):
            value = getattr(self, field)
            if value is not None and value != value.strip():
                raise FactError(f"{field}: {value!r} begins or ends with whitespace; remove it")
        if self.target_true is not None and self.target_new.casefold() == self.target_true.casefold():
            raise FactError(
                f"target_new: {self.target_new!r} is the target_true {self.target_true!r} already; "
                "give another target, or leave target_true out"
            )

    @classmethod
    def of(cls, text: str, subject: str, target_new: str, **others: Any) -> Self:
        """A fact from a complete text, in which the subject is found as a whole word; see `cut_subject`.

        >>> Fact.of("The capital of France is", "France", "Rome").prompt
        'The capital of {} is'

        Raises:
            FactError: the subject is not in the text, or several times; or a field is invalid.
        """
        _check_text("prompt", text)
        _check_text("subject", subject)
        prompt, subject = cut_subject(text, subject)
        return cls(prompt, subject, target_new, **others)

    @property
    def neighborhood(self) -> tuple[tuple[str, str], ...]:
        """(neighbourhood prompt, right answer) pairs; empty if no right answer is known."""
        one = self.neighborhood_target or self.target_true
        answers = self.neighborhood_answers or (() if one is None else (one,) * len(self.neighborhood_prompts))
        return tuple(zip(self.neighborhood_prompts, answers, strict=False))

    @property
    def text(self) -> str:
        """The prompt with the subject filled in."""
        return self.prompt if self.subject is None else self.prompt.replace("{}", self.subject)

    @property
    def serving(self) -> Serving:
        """How the fact's prompts and answers reach the model."""
        return Serving(self.separator, self.chat, self.end_turn)

    def _prompts(self) -> Iterable[tuple[str, Sequence[str]]]:
        """All prompts of the fact, by field."""
        yield "prompt", (self.prompt,)
        for field in PROMPT_LISTS:
            yield field, getattr(self, field)
        yield "portability", tuple(prompt for prompt, _ in self.portability)

    def _set_neighborhood_answers(self) -> None:
        field, prompts = "neighborhood_answers", self.neighborhood_prompts
        answers = as_prompts(field, self.neighborhood_answers)
        object.__setattr__(self, field, answers)
        if answers and (len(answers) != len(prompts) or self.neighborhood_target is not None):
            raise FactError(
                f"{field}: {len(answers)} for {len(prompts)} prompts; give each one, or neighborhood_target"
            )
        _as_questions(field, tuple(zip(prompts, answers, strict=False)))

    def to_dict(self) -> dict[str, Any]:
        """All fields by name, ready for JSON: tuples become lists."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Self:
        """Build a fact from what `to_dict` returns; fields with a default may be missing.

        Raises:
            FactError: a field is unknown, missing or invalid.
        """
        names = [field.name for field in fields(cls)]
        for name in record:
            if name not in names:
                raise FactError(f"{name}: unknown field; known are {', '.join(names)}")
        for name in _REQUIRED:
            if name not in record:
                raise FactError(f"{name}: missing; prompt and target_new are required")
        return cls(**record)


def served_as(
    facts: Iterable[Fact], *, chat: bool = False, end_turn: bool = False, separator: str | None = None
) -> list[Fact]:
    """The facts, served otherwise where asked for.

    Args:
        facts: the facts.
        chat: serve all of them through the chat template, which decides what stands before an answer.
        end_turn: let all targets include the token that ends the turn.
        separator: the text between prompts and answers; None leaves each fact's own.

    Raises:
        FactError: a fact cannot be served so.
    """
    changes: dict[str, Any] = {}
    if chat:
        changes |= {"chat": True, "separator": " "}
    if end_turn:
        changes["end_turn"] = True
    if separator is not None:
        changes["separator"] = separator
    return [replace(fact, **changes) if changes else fact for fact in facts]


def cut_subject(text: str, subject: str, any_case: bool = False) -> tuple[str, str]:
    """Find the only mention of a subject in a text.

    A mention is a whole word, or several: no letter, digit or mark continues it. Scripts without spaces between words,
    such as Chinese, and Korean, whose particles follow directly, have no such limits.

    >>> cut_subject("Nice is nicer than Nicea", "Nice")
    ('{} is nicer than Nicea', 'Nice')

    Args:
        text: a complete text, or a prompt with one "{}", which is returned as it is.
        subject: the subject, not empty.
        any_case: whether a mention in other letter case counts where there is none in the same.

    Returns:
        The text with "{}" in place of the mention, and the subject as it is written there.

    Raises:
        FactError: there is no mention, or several.
    """
    if not subject:
        raise FactError("subject: '' is empty; give it some text")
    if text.count("{}") == 1:
        return text, subject
    found, whole = mentions(text, subject)
    if not whole and any_case:
        found, whole = mentions(text, subject, re.IGNORECASE)
    if not whole:
        part = " as a whole word, only within another" if found else ""
        raise FactError(f"subject: {subject!r} is not in the prompt {text!r}{part}; correct one of them")
    if len(whole) > 1:
        raise FactError(
            f'subject: {subject!r} is {len(whole)} times in the prompt {text!r}; write "{{}}" once, in place of the '
            "mention that the fact is about"
        )
    start, end = whole[0]
    return f"{text[:start]}{{}}{text[end:]}", text[start:end]


def _check_slot(prompt: str, subject: str | None) -> None:
    slots = prompt.count("{}")
    if subject is None and slots:
        raise FactError(f'subject: missing, for the "{{}}" in {prompt!r}; give it, or write the prompt without "{{}}"')
    if subject is not None and slots != 1:
        found = 'no "{}"' if slots == 0 else f'{slots} times "{{}}"'
        raise FactError(f'prompt: {found} in {prompt!r}; write "{{}}" once, where the subject stands')


def _check_serving(fact: Fact) -> None:
    if not isinstance(fact.separator, str):
        raise FactError(f"separator: expected text, got {fact.separator!r}")
    _check_whole("separator", fact.separator)
    for field in ("chat", "end_turn"):
        if not isinstance(getattr(fact, field), bool):
            raise FactError(f"{field}: expected true or false, got {getattr(fact, field)!r}")
    if fact.chat and fact.separator not in (" ", ""):
        raise FactError(
            f"separator: {fact.separator!r} with chat; the chat template decides what stands before an answer, so "
            "leave separator out"
        )
    if fact.position is not None:
        if not isinstance(fact.position, int) or isinstance(fact.position, bool):
            raise FactError(f"position: expected a whole number, got {fact.position!r}")
        if fact.subject is not None:
            raise FactError(
                f"position: {fact.position} with the subject {fact.subject!r}, at whose last token the key is read; "
                "leave one of them out"
            )


def _check_end(field: str, prompts: Sequence[str], separator: str) -> None:
    """Refuse prompts that end in whitespace where a separator follows, since no text holds both."""
    for prompt in prompts:
        if separator and prompt != prompt.rstrip():
            follows = "one space" if separator == " " else repr(separator)
            raise FactError(
                f"{field}: {prompt!r} ends in whitespace; remove it, the target follows after {follows}"
                + (', or set separator ""' if separator == " " else "")
            )


def _check_text(field: str, value: Any) -> None:
    if not isinstance(value, str):
        raise FactError(f"{field}: expected text, got {value!r}")
    if not value.strip():
        raise FactError(f"{field}: {value!r} is empty; give it some text")
    _check_whole(field, value)


def _check_whole(field: str, value: str) -> None:
    """Refuse half of a surrogate pair, which no tokenizer reads and no file holds."""
    if half := next((char for char in value if "\ud800" <= char <= "\udfff"), None):
        raise FactError(
            f"{field}: {value!r} holds {half!r}, half of a character (as a cut emoji leaves it); complete or remove it"
        )


def as_prompts(field: str, value: Any) -> tuple[str, ...]:
    """The texts of a field.

    Raises:
        FactError: `value` is not a list of texts, or one of them is empty.
    """
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise FactError(f"{field}: expected a list of texts, got {value!r}")
    for prompt in value:
        _check_text(field, prompt)
    return tuple(value)


def _as_questions(field: str, value: Any) -> tuple[tuple[str, str], ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise FactError(f"{field}: expected a list of [text, answer], got {value!r}")
    for pair in value:
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise FactError(f"{field}: expected [text, answer], got {pair!r}")
        for text in pair:
            _check_text(field, text)
        if pair[1] != pair[1].strip():
            raise FactError(f"{field}: the answer {pair[1]!r} begins or ends with whitespace; remove it")
    return tuple((prompt, answer) for prompt, answer in value)
