"""The built-in facts: four relations of the world's countries, each with a made-up new target."""

import csv
from dataclasses import dataclass
from importlib.resources import files
from zlib import crc32

from lightedit.data.facts import Fact

_MOST_NEIGHBORS = 5


@dataclass(frozen=True)
class _Relation:
    """The prompts of one column of the table. `{}` stands for the country, with its article."""

    name: str
    prompt: str
    paraphrases: tuple[str, ...]


_RELATIONS = (
    _Relation(
        "capital",
        "The capital of {} is",
        ("The capital city of {} is called", "The government of {} sits in its capital city,"),
    ),
    _Relation(
        "currency",
        "The currency of {} is the",
        ("The currency used in {} is the", "The official currency of {} is the"),
    ),
    _Relation(
        "language",
        "The official language of {} is",
        ("In {}, the official language is", "The main language of {} is"),
    ),
    _Relation(
        "continent",
        "{} is a country in the continent of",
        ("Geographically, {} is part of the continent of", "On a map of the world, {} is found in the continent of"),
    ),
)
_LANDMARK_PROMPT = "{} is located in the city of"


@dataclass(frozen=True)
class _Country:
    """One row of the table: the country's name as written inside a sentence, and the right answers by column.

    The first answer of a column is the true target of its fact. Further answers, such as a second official language,
    are also right, so none of them is a new target.
    """

    name: str
    answers: dict[str, tuple[str, ...]]

    @property
    def subject(self) -> str:
        return self.name.removeprefix("the ")


def builtin_facts() -> list[Fact]:
    """Some 700 facts on capitals, currencies, languages and continents, for trials without a data set.

    New targets are other values of the same relation. Neighbourhood prompts name landmarks of the capital, or other
    countries that share the value. A fact with neither has none. The other countries are subjects of facts as well, so
    editing all facts edits neighbours: measure locality on a part of the facts. Every call returns the same facts in
    the same order.

    >>> builtin_facts()[0].text
    'The capital of Afghanistan is'
    """
    countries = _read_countries()
    return [
        _fact(relation, country, countries)
        for relation in _RELATIONS
        for country in countries
        if country.answers[relation.name]
    ]


def _read_countries() -> list[_Country]:
    with files("lightedit.data").joinpath("countries.tsv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [
        _Country(
            row["country"],
            {column: tuple(cell.split(";")) if cell else () for column, cell in row.items()},
        )
        for row in rows
    ]


def _fact(relation: _Relation, country: _Country, countries: list[_Country]) -> Fact:
    true = country.answers[relation.name][0]
    article = "the " if country.name.startswith("the ") else ""
    return Fact(
        prompt=_sentence(relation.prompt, article + "{}"),
        subject=country.subject,
        target_new=_new_target(relation, country, countries),
        target_true=true,
        paraphrase_prompts=tuple(_sentence(prompt, country.name) for prompt in relation.paraphrases),
        neighborhood_prompts=_neighborhood(relation, country, countries),
        relation=relation.name,
        id=f"builtin/{relation.name}/{country.subject}",
    )


def _sentence(template: str, name: str) -> str:
    text = template.replace("{}", name)
    return text[0].upper() + text[1:]


def _new_target(relation: _Relation, country: _Country, countries: list[_Country]) -> str:
    """Another value of the relation. Each value is equally likely, whatever the number of countries that have it."""
    known = [other for other in countries if relation.name != "capital" or other.answers["landmarks"]]
    values = {other.answers[relation.name][0] for other in known if other.answers[relation.name]}
    right = {answer for answers in country.answers.values() for answer in answers}
    candidates = sorted(values - right)
    return candidates[crc32(f"{relation.name}/{country.name}".encode()) % len(candidates)]


def _neighborhood(relation: _Relation, country: _Country, countries: list[_Country]) -> tuple[str, ...]:
    if relation.name == "capital":
        return tuple(_sentence(_LANDMARK_PROMPT, landmark) for landmark in country.answers["landmarks"])
    true = country.answers[relation.name][0]
    # "Guinea-Bissau" contains the subject "Guinea", so a prompt about it would contain the subject's tokens
    others = [
        other.name
        for other in countries
        if other.answers[relation.name][:1] == (true,) and country.subject.casefold() not in other.name.casefold()
    ]
    others.sort(key=lambda other: crc32(f"{relation.name}/{country.name}/{other}".encode()))
    return tuple(_sentence(relation.prompt, other) for other in others[:_MOST_NEIGHBORS])
