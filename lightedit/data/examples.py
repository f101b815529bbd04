"""Examples of a task: texts with their right answers. Models are trained on them, and editors correct them in streams.

Four forms are read, from JSON, JSON lines, CSV and YAML:

| form | fields | what it is |
|---|---|---|
| claims | claim, label; id | claims that are supported or refuted, as FEVER's |
| texts | text, label; date, id | texts with a class and a date, as SCOTUS's decisions |
| questions | src, answers; subject, alt, rephrase, loc, loc_ans, cond, id | zsRE as MEND and LocFT give it |
| kilt | input, output.0.answer; alternatives, filtered_rephrases, id | KnowledgeEditor's own form of FEVER and zsRE |
"""

import datetime
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightedit.data.fact import Fact, FactError
from lightedit.data.fields import lookup, optional_text, pairs, text, texts, unlike
from lightedit.data.records import json_name, records
from lightedit.errors import MissingFileError
from lightedit.lm import LanguageModel


@dataclass(frozen=True)
class Example:
    """A text with its right answer, and what an edit of it is tested on.

    Attributes:
        text: what the model reads: a claim, a question, a document.
        answer: the right answer, or the name of the class.
        alternative: another answer, which edits to a counterfactual write.
        rephrasings: texts that ask for the same.
        unrelated: (text, right answer) pairs that an edit of this example should leave alone.
        condition: KnowledgeEditor's text that names the present and the new answer.
        subject: the entity that the text is about; None if it is not named.
        date: when the text is from.
        id: name of the record in its data set.
    """

    text: str
    answer: str
    alternative: str | None = None
    rephrasings: tuple[str, ...] = ()
    unrelated: tuple[tuple[str, str], ...] = ()
    condition: str | None = None
    subject: str | None = None
    date: datetime.date | None = None
    id: str | None = None

    def fact(self, answer: str | None = None) -> Fact:
        """The fact that writes `answer` after the text, by default the right one; without a subject.

        Raises:
            FactError: the text or the answer cannot be those of a fact.
        """
        target = self.answer if answer is None else answer
        return Fact(
            self.text,
            target_new=target,
            target_true=unlike(self.answer, target),
            paraphrase_prompts=self.rephrasings,
            neighborhood_prompts=tuple(prompt for prompt, _ in self.unrelated),
            neighborhood_answers=tuple(right for _, right in self.unrelated),
            id=self.id,
        )


def read_examples(path: str | os.PathLike[str], limit: int | None = None) -> list[Example]:
    """Read the examples of a file. Its form is recognised by the fields of the first record.

    Args:
        path: a JSON, JSON lines, CSV or YAML file.
        limit: most examples that are read; None for all.

    Raises:
        FileNotFoundError: there is no such file.
        FactError: the file is of no known form, or a record lacks a field or has a wrong value. The message names the
            file, the record and the field.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"no file at {path}")
    found: list[Example] = []
    for example in _examples_of(path):
        if limit is not None and len(found) == limit:
            break
        found.append(example)
    if not found:
        raise FactError(f"{path}: holds no examples")
    return found


def with_unrelated(examples: Sequence[Example], others: Sequence[Example]) -> list[Example]:
    """The examples, each with all of `others` but itself as unrelated texts, as KnowledgeEditor's retain asks for."""
    return [
        replace(example, unrelated=tuple((other.text, other.answer) for other in others if other.text != example.text))
        for example in examples
    ]


def shortened(lm: LanguageModel, examples: Sequence[Example]) -> list[Example]:
    """The examples with texts cut to as many tokens as `lm` has positions; their rephrasings and others stay."""
    limit = lm.positions
    if limit is None:
        return list(examples)
    return [replace(example, text=_cut(lm, example.text, limit)) for example in examples]


def relabelled(
    examples: Sequence[Example], labels: Mapping[str, str], since: datetime.date | None = None
) -> list[Example]:
    """A stream of examples by date, in which some classes are named otherwise from a day on.

    It is a label shift as SCOTUS's, made from any texts with classes: a model that was trained on the earlier examples
    answers the later ones with their former class, and is corrected.

    Args:
        examples: the examples; those of one date, or all if no one has a date, stay in their order.
        labels: the new class of each class that changes; both are classes of the examples, so that a classifier of
            these classes can give them.
        since: the first day of the new classes; None for the date of the middle example, or without dates its place.

    Raises:
        FactError: some examples have a date and others have none, none has one and `since` is given, no example is that
            late or that early, or a class of `labels` is none of the examples.
    """
    known = {example.answer for example in examples}
    if unknown := [label for pair in labels.items() for label in pair if label not in known]:
        raise FactError(f"labels: {unknown[0]!r} is no class of the examples; they have {', '.join(sorted(known))}")
    dated = [example for example in examples if example.date is not None]
    if 0 < len(dated) < len(examples) or (since is not None and not dated):
        without = next(example for example in examples if example.date is None)
        raise FactError(
            f"{len(examples) - len(dated)} examples have no date, first {without.text[:60]!r}; give all one"
        )
    stream = sorted(examples, key=lambda example: example.date or datetime.date.min)
    middle = len(stream) // 2
    if dated:
        first = since or stream[middle].date
        assert first is not None
        middle = sum(example.date is not None and example.date < first for example in stream)
    if not 0 < middle < len(stream):
        raise FactError(
            f"since: {since} leaves {middle} examples before and {len(stream) - middle} after; expected both"
        )
    later = [replace(example, answer=labels.get(example.answer, example.answer)) for example in stream[middle:]]
    return stream[:middle] + later


def _cut(lm: LanguageModel, whole: str, limit: int) -> str:
    encoded: Any = lm.tokenizer(whole, return_offsets_mapping=True, verbose=False)
    ends = [end for start, end in encoded["offset_mapping"] if end > start]
    special = len(encoded["input_ids"]) - len(ends)
    kept = whole
    # a cut word may have more tokens than its part of the whole text, so the rest is cut again
    for count in range(limit - special, 0, -1):
        if len(lm.encode([kept])[0]) <= limit:
            return kept
        kept = whole[: ends[count - 1]].rstrip()
    return kept


def _examples_of(path: Path) -> Iterator[Example]:
    form: str | None = None
    for where, record in records(path):
        try:
            if not isinstance(record, dict):
                raise FactError(f"expected an object with fields, got {json_name(record)}")
            form = form or _form_of(record)
            example = _READERS[form][1](record)
            example.fact()  # so that what no fact can hold is refused here
            yield example
        except FactError as error:
            raise FactError(f"{path}: {where}: {error}") from error


def _form_of(record: dict[str, Any]) -> str:
    for form, (fields, _) in _READERS.items():
        if all(lookup(record, field) is not None for field in fields):
            return form
    known = "; ".join(f"{form}: {', '.join(fields)}" for form, (fields, _) in _READERS.items())
    raise FactError(
        f"no form of examples has the fields {', '.join(record) or 'of an empty record'}; known are {known}"
    )


def _claim(record: dict[str, Any]) -> Example:
    return Example(text(record, "claim"), _label(record), id=_id(record))


def _text(record: dict[str, Any]) -> Example:
    return Example(text(record, "text"), _label(record), date=_date(record), id=_id(record))


def _question(record: dict[str, Any]) -> Example:
    return Example(
        text(record, "src"),
        text(record, "answers"),
        alternative=optional_text(record, "alt"),
        rephrasings=texts(record, "rephrase"),
        unrelated=pairs(record, "loc", "loc_ans"),
        condition=optional_text(record, "cond"),
        subject=optional_text(record, "subject"),
        id=_id(record),
    )


def _kilt(record: dict[str, Any]) -> Example:
    return Example(
        text(record, "input"),
        text(record, "output.0.answer"),
        alternative=optional_text(record, "alternatives"),
        rephrasings=texts(record, "filtered_rephrases"),
        id=_id(record),
    )


_READERS: dict[str, tuple[tuple[str, ...], Callable[[dict[str, Any]], Example]]] = {
    "claims": (("claim", "label"), _claim),
    "texts": (("text", "label"), _text),
    "questions": (("src", "answers"), _question),
    "kilt": (("input", "output.0.answer"), _kilt),
}


def _label(record: dict[str, Any]) -> str:
    """The name of a class; data sets also number them."""
    label = record.get("label")
    if isinstance(label, int) and not isinstance(label, bool):
        return str(label)
    return text(record, "label")


def _id(record: dict[str, Any]) -> str | None:
    given = record.get("id")
    return None if given is None else str(given)


def _date(record: dict[str, Any]) -> datetime.date | None:
    """A date, also one of which only the year is known; then it is the first day of that year."""
    given = record.get("date")
    if given is None or isinstance(given, datetime.date):
        return given
    words = str(given).strip()
    try:
        if len(words) == 4 and words.isdecimal():
            return datetime.date(int(words), 1, 1)
        return datetime.date.fromisoformat(words[:10])
    except ValueError as error:
        raise FactError(f"date: {given!r} is no date; write it as 2009-05-31, or the year alone") from error
