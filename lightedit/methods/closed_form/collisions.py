"""Facts of one round whose keys nearly coincide, such as facts about one subject."""

from collections.abc import Sequence
from itertools import combinations

from torch import Tensor

from lightedit.data.facts import Fact, FactError
from lightedit.data.prompts import FactPrompts

_NAMED = 10  # pairs that a message names at most


def equal_keys(prompts: Sequence[FactPrompts], rounds: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Pairs of facts of one round whose keys are equal, because the tokens up to the key's are.

    Args:
        prompts: the facts' rows; the first row of each is read.
        rounds: the indices of the facts that each round writes together.
    """
    heads = [tuple(fact.rows[0].ids[: fact.rows[0].lookup + 1]) for fact in prompts]
    pairs = []
    for round_ in rounds:
        of_head: dict[tuple[int, ...], list[int]] = {}
        for index in round_:
            of_head.setdefault(heads[index], []).append(index)
        pairs += [pair for group in of_head.values() for pair in combinations(group, 2)]
    return pairs


def refuse(facts: Sequence[Fact], pairs: Sequence[tuple[int, int]]) -> None:
    """Raise FactError if there are pairs that collide; names them, with facts counted from 1."""
    if not pairs:
        return
    named = [f"{_name(facts, one)} and {_name(facts, other)}" for one, other in pairs[:_NAMED]]
    more = f"; and {len(pairs) - _NAMED} more pairs" if len(pairs) > _NAMED else ""
    raise FactError(
        f"{len(pairs)} {'pair' if len(pairs) == 1 else 'pairs'} of facts of one round have nearly equal keys, so that "
        f"one solve cannot give both exactly their own value: {'; '.join(named)}{more}. Set on_collision to 'joint' "
        "(the default), which searches their values together, to 'keep' or to 'merge', write them in different rounds "
        "(facts_per_round), or leave one out"
    )


def _name(facts: Sequence[Fact], index: int) -> str:
    return f"fact {index + 1} {facts[index].text!r} -> {facts[index].target_new!r}"


def linked_groups(linked: Tensor) -> list[list[int]]:
    """Connected components with at least two members of a relation [n, n]; the members of each ascend."""
    linked = linked | linked.T
    left = set(linked.any(1).nonzero().flatten().tolist())
    groups = []
    while left:
        group: set[int] = set()
        border = {min(left)}
        while border:
            group |= border
            border = {j for i in border for j in linked[i].nonzero().flatten().tolist()} - group
        left -= group
        groups.append(sorted(group))
    return groups
