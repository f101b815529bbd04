"""Finding a fact in a list by its text, and giving it another target."""

from collections.abc import Sequence
from dataclasses import fields, replace
from difflib import get_close_matches

from lightedit.data.facts import Fact, FactError


def place_of(facts: Sequence[Fact], fact: Fact | str) -> int:
    """The index of a fact, or of the fact with this text (prompt with subject).

    Raises:
        FactError: there is none; names the closest ones.
    """
    text = fact if isinstance(fact, str) else fact.text
    found = [index for index, one in enumerate(facts) if one.text == text]
    if not isinstance(fact, str):
        found = [index for index in found if facts[index].serving == fact.serving]
        if found and not (same := [index for index in found if facts[index].target_new == fact.target_new]):
            there = facts[found[0]].target_new
            raise FactError(
                f"{text!r} has the target {there!r} here, not {fact.target_new!r}; name the fact by its text"
            )
        found = same if found else []
    if not found:
        close = ", ".join(map(repr, get_close_matches(text, [one.text for one in facts], 3, 0.0))) or "none"
        raise FactError(f"{text!r} is none of the {len(facts)} facts; the closest are {close}")
    if len(found) > 1:
        raise FactError(f"{text!r} is the text of {len(found)} facts; give the fact itself")
    return found[0]


def with_target(fact: Fact, new: Fact | str) -> Fact:
    """The fact that takes the place of `fact`: `new`, or the same fact with the target `new`."""
    if isinstance(new, Fact):
        return new
    true = fact.target_true
    kept = None if true is not None and true.casefold() == new.casefold() else true
    return replace(fact, target_new=new, target_true=kept, target_id=None)


def with_more(fact: Fact, other: Fact) -> Fact:
    """The fact with what `other`, a record of the same text and target, says beyond the defaults.

    >>> known = Fact("The capital of {} is", "France", "Rome", relation="capital")
    >>> with_more(known, Fact("The capital of France is", target_new="Rome", target_true="Paris")).target_true
    'Paris'
    """
    key = ("prompt", "subject", "position")  # where the fact's key is read: all three belong together
    says_where = other.subject is not None or other.position is not None
    others = {field.name: getattr(other, field.name) for field in fields(Fact) if field.name not in key}
    given = {name: value for name, value in others.items() if value != getattr(Fact, name, None)}
    return replace(fact, **given, **({name: getattr(other, name) for name in key} if says_where else {}))
