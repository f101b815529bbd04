"""Finding a fact in a list by its text, and giving it another target."""

from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches

from lightedit.data.facts import Fact, FactError


def place_of(facts: Sequence[Fact], fact: Fact | str) -> int:
    """The index of a fact, or of the fact with this text (prompt with subject).

    Raises:
        FactError: there is none; names the closest ones.
    """
    texts = [one.text for one in facts]
    text, target = (fact, None) if isinstance(fact, str) else (fact.text, fact.target_new)
    if text not in texts:
        close = ", ".join(map(repr, get_close_matches(text, texts, 3, 0.0))) or "none"
        raise FactError(f"{text!r} is none of the {len(texts)} facts; the closest are {close}")
    index = texts.index(text)
    if target not in (None, facts[index].target_new):
        raise FactError(
            f"{text!r} has the target {facts[index].target_new!r} here, not {target!r}; give its text alone"
        )
    return index


def with_target(fact: Fact, new: Fact | str) -> Fact:
    """The fact that takes the place of `fact`: `new`, or the same fact with the target `new`."""
    if isinstance(new, Fact):
        return new
    true = fact.target_true
    kept = None if true is not None and true.casefold() == new.casefold() else true
    return replace(fact, target_new=new, target_true=kept, target_id=None)
