"""The reader of RippleEdits (Cohen et al., 2023), whose edits are whole sentences without their parts."""

import re
from itertools import takewhile
from typing import Any

from lightedit.data.fact import Fact, FactError
from lightedit.data.fields import Pairs, lookup, neighborhood, optional_text, text

_KEPT = ("Relation_Specificity", "Relation_Specifity", "Forgetfulness")
_CHANGED = ("Logical_Generalization", "Compositionality_I", "Compositionality_II", "Subject_Aliasing")

_VERBS = {"FOLLOWS": "follows", "FOLLOWED_BY": "is followed by", "SIBLING": "are", "CAST_MEMBER": "are"}
_AROUND = {
    "FOLLOWS": ("^", ""),
    "FOLLOWED_BY": ("^", ""),
    "COUNTRY": ("which ", " is associated with"),
    "ETHNIC_GROUP": ("which ", " is associated with"),
    "RELIGION": ("which ", " is associated with"),
    "MEMBER_OF_SPORTS_TEAM": ("which ", " is a member of"),
    "LEAGUE": ("which ", " plays in"),
    "CONTINENT": ("which ", " is part of"),
    "CAPITAL_OF": ("which ", " is the capital of"),
    "AWARD_RECEIVED": ("the award ", " won"),
    "NUMBER_OF_CHILDREN": ("children ", " has"),
    "CURRENCY": ("currency in ", ""),
    "LIKELY_ANTHEM": ("performed in ", ""),
    "POSITION_HELD": ("held by ", ""),
    "COUNTRY_OF_CITIZENSHIP": ("citizenship of ", ""),
    "FIELD_OF_WORK": ("field of work of ", ""),
    "HEAD_OF_GOVERNMENT": ("head of government of ", ""),
    "HEAD_OF_STATE": ("head of state of ", ""),
    "PLACE_OF_BIRTH": ("of birth of ", ""),
    "DATE_OF_BIRTH": ("of birth of ", ""),
    "PLACE_OF_DEATH": ("of death of ", ""),
    "DATE_OF_DEATH": ("of death of ", ""),
    "PLACE_OF_BURIAL": ("of burial of ", ""),
}
"""Relation -> what its sentences say before and after the subject."""
_AROUND_OTHERS = ("^The (?:names? of the )?[a-z ]+? of ", "")  # "The name of the mother of", "The gender of"


def from_ripple_edits(record: dict[str, Any], number: int) -> list[Fact]:
    """One edit with its six criteria.

    Subject, prompt and target are cut out of the sentence by its relation. Queries whose answer must stay are
    neighbourhood prompts, all others portability questions, each with the first value of its first answer. Conditions
    of a test, and whether one of its queries suffices, are not read.
    """
    relation = text(record, "edit.relation")
    sentence = text(record, "edit.prompt")
    before = optional_text(record, "edit.previous_fact.prompt", "edit.original_fact.prompt")
    stem, new, true = _split(sentence, before, relation)
    start, end = _AROUND.get(relation, _AROUND_OTHERS)
    subject = re.search(f"{start}(.+){end}$", stem.removesuffix(_verb(relation)).rstrip())
    if subject is None:
        raise FactError(f"edit.prompt: no subject of the relation {relation} in {sentence!r}; correct one of them")
    return [
        Fact(
            prompt=stem[: subject.start(1)] + "{}" + stem[subject.end(1) :],
            subject=subject.group(1),
            target_new=new,
            target_true=true,
            **neighborhood(_queries(record, _KEPT)),
            relation=relation,
            id=str(number),
            target_id=lookup(record, "edit.target_id"),
            portability=_queries(record, _CHANGED),
        )
    ]


def _verb(relation: str) -> str:
    return f" {_VERBS.get(relation, 'is')}"


def _split(sentence: str, before: str | None, relation: str) -> tuple[str, str, str | None]:
    """The sentence up to its verb, its target, and the target of the sentence before the edit, if there is one."""
    ends = [match.end() for match in re.finditer(re.escape(_verb(relation)) + "(?= )", sentence)]
    if before is not None:
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(sentence, before, strict=False)))
        ends = [end for end in ends if end < shared]
    if not ends:
        raise FactError(f"edit.prompt: no {_verb(relation).strip()!r} before a target in {sentence!r}; correct it")
    stem = sentence[: ends[-1]]
    new, true = (None if whole is None else whole[ends[-1] :].strip().removesuffix(".") for whole in (sentence, before))
    assert new is not None
    return stem, new, true


def _queries(record: dict[str, Any], criteria: tuple[str, ...]) -> Pairs:
    """The queries of some criteria that have an answer."""
    found = []
    for criterion in criteria:
        for test in record.get(criterion) or ():
            for query in lookup(test, "test_queries") or ():
                answer = optional_text(query, "answers.0.value")
                if answer is not None:
                    found.append((text(query, "prompt"), answer))
    return tuple(dict.fromkeys(found))
