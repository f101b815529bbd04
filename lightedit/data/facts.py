"""Facts to edit: one `Fact`, and readers for CounterFact, zsRE and JSON lines."""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import MISSING, dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any, Self

from lightedit.files import whole_file

_PROMPT_LISTS = ("paraphrase_prompts", "neighborhood_prompts", "attribute_prompts", "generation_prompts")
_OPTIONAL_TEXTS = ("target_true", "neighborhood_target", "relation", "id", "target_id")


class FactError(ValueError):
    """A fact, a file or a set of facts cannot be used; the message names the field and the way out."""


@dataclass(frozen=True)
class Fact:
    """One fact to write into a model, with the prompts that measure the edit.

    Targets carry no leading space: they follow their prompt after one space.

    >>> fact = Fact("The mother tongue of {} is", "Danielle Darrieux", "English", target_true="French")
    >>> fact.text
    'The mother tongue of Danielle Darrieux is'

    Attributes:
        prompt: text before the target, with exactly one `{}` where the subject stands.
        subject: what the fact is about.
        target_new: the answer to write.
        target_true: the answer before the edit, where it is known.
        paraphrase_prompts: complete texts that ask for the same fact in other words.
        neighborhood_prompts: complete texts about other subjects, whose answers must not change.
        neighborhood_target: right answer of the neighbourhood prompts; None means `target_true`.
        attribute_prompts: complete texts about subjects for which `target_new` is right.
        generation_prompts: complete texts to continue freely.
        relation: name of the relation in its data set.
        id: name of the record in its data set.
        target_id: name of `target_new` in its data set, by which its reference texts are found.
        portability: (complete text, right answer) pairs, whose answers follow from the new target in a further step.

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

    def __post_init__(self) -> None:
        for field in ("prompt", "subject", "target_new"):
            _check_text(field, getattr(self, field))
        for field in _OPTIONAL_TEXTS:
            if getattr(self, field) is not None:
                _check_text(field, getattr(self, field))
        for field in _PROMPT_LISTS:
            object.__setattr__(self, field, _as_prompts(field, getattr(self, field)))
        object.__setattr__(self, "portability", _as_questions("portability", self.portability))

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


def _as_prompts(field: str, value: Any) -> tuple[str, ...]:
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


def _get(record: dict[str, Any], path: str, kind: type) -> Any:
    """Value at a dotted path of a nested record; texts are stripped."""
    value: Any = record
    for key in path.split("."):
        if not isinstance(value, dict) or key not in value:
            raise FactError(f"{path}: missing")
        value = value[key]
    if not isinstance(value, kind):
        expected = "text" if kind is str else "a list"
        raise FactError(f"{path}: expected {expected}, got {value!r}")
    return value.strip() if isinstance(value, str) else value


def _cut_subject(text: str, subject: str, any_case: bool = False) -> tuple[str, str]:
    """Prompt with `{}` for the first mention of the subject, and the subject as it is written there."""
    if not subject:
        raise FactError("subject: '' is empty; give it some text")
    found = re.search(re.escape(subject), text) or (
        re.search(re.escape(subject), text, re.IGNORECASE) if any_case else None
    )
    if found is None:
        raise FactError(f"subject: {subject!r} is not in the prompt {text!r}; correct one of them")
    return text[: found.start()] + "{}" + text[found.end() :], found.group()


def _from_counterfact(record: dict[str, Any], number: int) -> Fact:
    return Fact(
        prompt=_get(record, "requested_rewrite.prompt", str),
        subject=_get(record, "requested_rewrite.subject", str),
        target_new=_get(record, "requested_rewrite.target_new.str", str),
        target_true=_get(record, "requested_rewrite.target_true.str", str),
        relation=record["requested_rewrite"].get("relation_id"),
        id=str(record.get("case_id", number)),
        target_id=record["requested_rewrite"]["target_new"].get("id"),
        portability=_one_hop(record),
        **{field: record.get(field, ()) for field in _PROMPT_LISTS},
    )


def _one_hop(record: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """The question that Yao et al. (2023, arXiv 2305.13172) add to a record of CounterFact, if they do."""
    if "portability" not in record:
        return ()
    return ((_get(record, "portability.New Question", str), _get(record, "portability.New Answer", str)),)


def _from_counterfact_flat(record: dict[str, Any], number: int) -> Fact:
    prompt, subject = _cut_subject(_get(record, "prompt", str), _get(record, "subject", str))
    return Fact(
        prompt=prompt,
        subject=subject,
        target_new=_get(record, "target_new", str),
        target_true=_get(record, "ground_truth", str),
        paraphrase_prompts=(_get(record, "rephrase_prompt", str),) if "rephrase_prompt" in record else (),
        neighborhood_prompts=(_get(record, "locality_prompt", str),),
        neighborhood_target=_get(record, "locality_ground_truth", str),
        id=str(record.get("case_id", number)),
    )


def _from_zsre(record: dict[str, Any], number: int) -> Fact:
    prompt, subject = _cut_subject(_get(record, "src", str), _get(record, "subject", str), any_case=True)
    answers = _as_prompts("answers", _get(record, "answers", list))
    if not answers:
        raise FactError("answers: the list is empty; its first entry is the target to write")
    question = _get(record, "loc", str)
    return Fact(
        prompt=prompt,
        subject=subject,
        # MEND writes the counterfactual `alt`; MEMIT's evaluation, which later work follows, the right answer
        target_new=answers[0].strip(),
        paraphrase_prompts=(_get(record, "rephrase", str),),
        neighborhood_prompts=(question if question.endswith("?") else question + "?",),
        neighborhood_target=_get(record, "loc_ans", str),
        id=str(number),
    )


def _from_own(record: dict[str, Any], number: int) -> Fact:
    return Fact.from_dict(record)


_READERS: dict[str, Callable[[dict[str, Any], int], Fact]] = {
    "counterfact": _from_counterfact,
    "counterfact_flat": _from_counterfact_flat,
    "zsre": _from_zsre,
    "jsonl": _from_own,
}
_MARKS = {
    "counterfact": {"requested_rewrite"},
    "counterfact_flat": {"prompt", "ground_truth"},
    "zsre": {"src", "answers"},
    "jsonl": {"prompt", "target_new"},
}


def _records(path: Path, limit: int | None) -> Iterator[Any]:
    """Parsed records of a JSON list (files ending in .json) or of JSON lines (any other), at most `limit`."""
    number = 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            if path.suffix == ".json":
                content = file.read()
                if content.strip():
                    top = json.loads(content)
                    if not isinstance(top, list):
                        raise FactError(
                            f"{path}: the top level is {_json_name(top)}; expected a list of records, "
                            "or one record a line in a file ending in .jsonl"
                        )
                    yield from islice(top, limit)
                return
            for line in file:
                if number == limit:
                    return
                if line.strip():
                    yield json.loads(line)
                    number += 1
    except json.JSONDecodeError as error:
        where = f"{path}: line {error.lineno}" if path.suffix == ".json" else f"{path}: record {number}"
        lines = path.suffix == ".json" and error.msg == "Extra data"
        hint = "one record a line belongs in a file ending in .jsonl" if lines else "is the file truncated?"
        raise FactError(f"{where}: not valid JSON ({error.msg} at column {error.colno}); {hint}") from error
    except UnicodeDecodeError as error:
        raise FactError(f"{path}: not UTF-8 text ({error}); save the file as UTF-8") from error


def _json_name(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _format_of(record: Any) -> str | None:
    """The first format all of whose marking fields the record has."""
    if not isinstance(record, dict):
        return None
    return next((name for name, marks in _MARKS.items() if marks <= record.keys()), None)


def read_facts(path: str | os.PathLike[str], limit: int | None = None, format: str | None = None) -> list[Fact]:
    """Read facts from a file.

    A file ending in `.json` holds a list of records, any other holds one JSON record a line. Formats:

    - `counterfact`: the nested records of CounterFact (Meng et al., 2022), with `requested_rewrite`, and the question
      about portability that Yao et al. (2023) add;
    - `counterfact_flat`: `prompt` (subject filled in), `subject`, `target_new`, `ground_truth`,
      `locality_prompt`, `locality_ground_truth`, and `rephrase_prompt` where there is one;
    - `zsre`: the records of MEND (Mitchell et al., 2022): `src`, `rephrase`, `subject`, `answers`, `loc`,
      `loc_ans`. The first answer is written, as in MEMIT's evaluation; questions about portability, which follow from
      `alt`, are left out;
    - `jsonl`: `Fact`'s own field names, as `write_facts` writes them.

    Args:
        path: the file.
        limit: read only the first records, at least 1; what follows them is not checked.
        format: one of the names above; None recognises it by the fields of the first record.

    Raises:
        FileNotFoundError: there is no such file.
        FactError: the file, its format or a record is invalid; names the file, record (from 0) and field.
    """
    path = Path(path)
    if limit is not None and limit < 1:
        raise FactError(f"limit: {limit} facts asked of {path}; expected at least 1, or None for all")
    if format is not None and format not in _READERS:
        raise FactError(f"format: {format!r} is unknown; expected one of {', '.join(_READERS)}")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file of facts")

    facts = []
    for number, record in enumerate(_records(path, limit)):
        if not isinstance(record, dict):
            raise FactError(
                f"{path}: record {number}: expected an object with fields, got {_json_name(record)}; "
                "one list of all records belongs in a file ending in .json"
            )
        if format is None:
            format = _format_of(record)
        if format is None:
            raise FactError(
                f"{path}: record {number}: format not recognised by the fields "
                f"{', '.join(record) or '(none)'}; pass format=, one of {', '.join(_READERS)}"
            )
        try:
            facts.append(_READERS[format](record, number))
        except FactError as error:
            raise FactError(f"{path}: record {number}: {error}") from error
    if not facts:
        raise FactError(f"{path}: holds no facts; expected at least one record")
    return facts


def write_facts(path: str | os.PathLike[str], facts: Iterable[Fact]) -> None:
    """Write facts as JSON lines, which `read_facts` reads back unchanged.

    The file appears complete or not at all: an interrupted call leaves an earlier file as it was.

    Raises:
        FactError: `path` ends in `.json`, which would be read as one JSON list.
    """
    path = Path(path)
    if path.suffix == ".json":
        raise FactError(f"{path}: facts are written one a line; name the file {path.with_suffix('.jsonl').name}")
    with whole_file(path) as unfinished, unfinished.open("w", encoding="utf-8", newline="\n") as file:
        for fact in facts:
            file.write(json.dumps(fact.to_dict(), ensure_ascii=False) + "\n")


def check_facts(facts: Sequence[Fact]) -> None:
    """Check that the facts can be written together.

    Raises:
        FactError: there are none, or two complete the same text, letter case aside.
    """
    if not facts:
        raise FactError("facts: the list is empty; give at least one fact")
    first: dict[str, int] = {}
    for number, fact in enumerate(facts):
        earlier = first.setdefault(fact.text.casefold(), number)
        if earlier != number:
            raise FactError(
                f"facts {earlier} and {number}: both complete {fact.text!r}, "
                f"with {facts[earlier].target_new!r} and {fact.target_new!r}; keep one of them"
            )
