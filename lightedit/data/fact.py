"""One fact to edit, with the prompts that measure the edit."""

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, Self

from lightedit.errors import LightEditError

PROMPT_LISTS = ("paraphrase_prompts", "neighborhood_prompts", "attribute_prompts", "generation_prompts")
"""The fields of `Fact` that are lists of complete texts."""

_OPTIONAL_TEXTS = ("target_true", "neighborhood_target", "relation", "id", "target_id")


class FactError(LightEditError, ValueError):
    """A fact, a file or a set of facts cannot be used; the message names the field and the way out."""


@dataclass(frozen=True)
class Fact:
    """One fact to write into a model, with the prompts that measure the edit.

    Targets carry no leading space: they follow their prompt after one space.

    >>> fact = Fact("The mother tongue of {} is", "Danielle Darrieux", "English", target_true="French")
    >>> fact.text
    'The mother tongue of Danielle Darrieux is'

    Attributes:
        prompt: text before the target, with exactly one `{}` for the subject.
        subject: the entity that the fact is about.
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

    Raises:
        FactError: a field has the wrong type or a value that cannot be edited or scored.
    """

    prompt: str
    subject: str
    target_new: str
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

    def __post_init__(self) -> None:
        for field in ("prompt", "subject", "target_new"):
            _check_text(field, getattr(self, field))
        for field in _OPTIONAL_TEXTS:
            if getattr(self, field) is not None:
                _check_text(field, getattr(self, field))
        for field in PROMPT_LISTS:
            object.__setattr__(self, field, as_prompts(field, getattr(self, field)))
        object.__setattr__(self, "portability", _as_questions("portability", self.portability))
        self._check_neighborhood_answers()

        slots = self.prompt.count("{}")
        if slots != 1:
            found = 'no "{}"' if slots == 0 else f'{slots} times "{{}}"'
            raise FactError(f'prompt: {found} in {self.prompt!r}; write "{{}}" once, where the subject stands')
        if self.prompt != self.prompt.rstrip():
            raise FactError(
                f"prompt: {self.prompt!r} ends in whitespace; remove it, the target follows after one space"
            )
        for field in ("subject", "target_new", "target_true", "neighborhood_target"):
            value = getattr(self, field)
            if value is not None and value != value.strip():
                raise FactError(f"{field}: {value!r} begins or ends with whitespace; remove it")
        if self.target_true is not None and self.target_new.casefold() == self.target_true.casefold():
            raise FactError(
                f"target_new: {self.target_new!r} is the target_true {self.target_true!r} already; "
                "give another target, or leave target_true out"
            )

    def _check_neighborhood_answers(self) -> None:
        answers = as_prompts("neighborhood_answers", self.neighborhood_answers)
        object.__setattr__(self, "neighborhood_answers", answers)
        if not answers:
            return
        if self.neighborhood_target is not None:
            raise FactError("neighborhood_answers: give one answer a prompt, or one neighborhood_target for all")
        if len(answers) != len(self.neighborhood_prompts):
            raise FactError(
                f"neighborhood_answers: {len(answers)} for {len(self.neighborhood_prompts)} neighborhood_prompts; "
                "give each prompt one"
            )
        for answer in answers:
            if answer != answer.strip():
                raise FactError(f"neighborhood_answers: {answer!r} begins or ends with whitespace; remove it")

    @property
    def neighborhood(self) -> tuple[tuple[str, str], ...]:
        """(neighbourhood prompt, right answer) pairs; empty if no right answer is known."""
        one = self.neighborhood_target or self.target_true
        answers = self.neighborhood_answers or (() if one is None else (one,) * len(self.neighborhood_prompts))
        return tuple(zip(self.neighborhood_prompts, answers, strict=False))

    @property
    def text(self) -> str:
        """The prompt with the subject filled in."""
        return self.prompt.replace("{}", self.subject)

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
        for field in fields(cls):
            if field.default is MISSING and field.name not in record:
                raise FactError(f"{field.name}: missing; prompt, subject and target_new are required")
        return cls(**record)


def _check_text(field: str, value: Any) -> None:
    if not isinstance(value, str):
        raise FactError(f"{field}: expected text, got {value!r}")
    if not value.strip():
        raise FactError(f"{field}: {value!r} is empty; give it some text")


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
