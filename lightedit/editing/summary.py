"""The outcomes of an edit as text: a line a fact, what changed elsewhere, and what to change if facts do not hold."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lightedit.editing.outcomes import Damage, Outcome

_FACTS, _PROMPTS, _NAMED = 20, 5, 2  # most lines of facts, most lines of prompts, and most facts that advice names
_PROMPT, _TARGET, _SAID = 30, 14, 22  # most characters of a prompt, a target and a continuation

REACHED = 0.7
"""A search whose last loss, in nats, is above this and its threshold did not reach its target.

At a mean loss of ln 2 = 0.69 per token, tokens of the target have a probability of one half.
"""
_ERASED = 0.5  # the same of a search that erases, whose loss is the probability of a target's token

# Settings of methods that make a search stronger, and those that make the written edit hold better
_OF_SEARCH = {"steps": "more", "lr": "higher", "clamp_norm_factor": "larger"}
_OF_WRITING = {
    "lambda_": "smaller",
    "share": "larger",
    "ridge": "smaller",
    "norm_weight": "smaller",
    "threshold": "larger",
    "mu": "smaller",
    "passes": "more",
    "epochs": "more",
    "lr": "higher",
    "norm": "larger",
    "add": "larger",
}


def count_held(outcomes: Sequence[Outcome]) -> str:
    """Such as "4 of 5 facts hold"."""
    held = sum(outcome.held for outcome in outcomes)
    return f"{held} of {len(outcomes)} {'fact holds' if len(outcomes) == 1 else 'facts hold'}"


def lines_of(outcomes: Sequence[Outcome], damage: Sequence[Damage]) -> list[str]:
    """A table of at most 20 facts, those that do not hold first, and of the 5 prompts that changed most elsewhere."""
    ordered = sorted(outcomes, key=lambda outcome: outcome.held)
    rows = [
        (
            "holds" if outcome.held else "NOT HELD",
            f"{cut(outcome.fact.text, _PROMPT)} -> {cut(outcome.fact.target_new, _TARGET)}",
            cut(outcome.before, _SAID),
            cut(outcome.after, _SAID) if outcome.probability is not None else "(NaN or infinity)",
            number(outcome.probability),
            number(outcome.rank),
            number(outcome.loss),
        )
        for outcome in ordered[:_FACTS]
    ]
    lines = _aligned([("", "fact", "said before", "says now", "prob.", "rank", "loss"), *rows], right=3) if rows else []
    if rest := ordered[_FACTS:]:
        failed = sum(not outcome.held for outcome in rest)
        what = f"of which {failed} do not hold" if failed else "which hold"
        lines.append(f"... and {len(rest)} more, {what}; edit.outcomes and the report have all")
    for note in dict.fromkeys(outcome.note for outcome in ordered if outcome.note):
        lines.append(f"{_named([outcome for outcome in ordered if outcome.note == note])}: {note}")
    if damage:
        changed = [(cut(row.prompt, _PROMPT), cut(row.before, _SAID), cut(row.after, _SAID), f"{row.kl:.3g}")
                   for row in damage[:_PROMPTS]]  # fmt: skip
        title = f"elsewhere, {len(changed)} of {len(damage)} prompts"
        lines += ["", *_aligned([(title, "said before", "says now", "KL (nats)"), *changed], right=1)]
    return lines


def advice(
    outcomes: Sequence[Outcome], method: Mapping[str, Any], facts_in_round: Sequence[int], on_collision: str
) -> str | None:
    """What to change if facts do not hold, with the present values; None if all hold.

    Args:
        outcomes: the outcomes of a run.
        method: the method's settings, as `Method.to_dict` returns them.
        facts_in_round: number of facts of each round.
        on_collision: the run's setting.
    """
    failed = [outcome for outcome in outcomes if not outcome.held]
    if not failed:
        return None
    values = method.get("values") or {}
    erases = _erases(method)
    bound = _ERASED if erases else max(REACHED, values.get("loss_threshold") or 0.0)
    begins, states, unit = ("does not begin", "still states", "") if erases else ("begins", "does not state", " nats")
    unreached = [outcome for outcome in failed if outcome.loss is not None and outcome.loss > bound]
    unwritten = [outcome for outcome in failed if outcome not in unreached and outcome.note is None]
    noted = [outcome for outcome in failed if outcome.note is not None]
    parts = [f"{count_held(outcomes)} (the model's own continuation {begins} with the target)"]
    if any(outcome.probability is None for outcome in failed):
        parts.append("the edited model gives NaN or infinity: revert the edit, and write more weakly")
    elif unwritten:
        ways = [
            f"{way} {name} ({_present(method[name])})" for name, way in _OF_WRITING.items() if _is_set(method, name)
        ]
        if method.get("folder") is not None:  # the other settings are those of the network's training
            ways = [f"a network trained longer, or on more facts like these ({_present(method['folder'])} now)"]
        subjects = Counter(outcome.fact.subject for outcome in outcomes)
        if any(outcome.fact.subject and subjects[outcome.fact.subject] > 1 for outcome in unwritten):
            if on_collision != "joint":
                ways.append(f"on_collision 'joint' ({on_collision!r} now) for facts about one subject")
        elif (most := max(facts_in_round, default=1)) > 1:
            ways.append(f"fewer facts at a time (facts_per_round, {most} now)")
        ways.append(f"other layers ({_present(method['layers'])})" if "layers" in method else "other settings")
        searched = "the search reached the target" if unwritten[0].loss is not None else "the edit was written"
        parts.append(f"{searched} of {_named(unwritten)}, but the model {states} it: try {_listed(ways)}")
    if noted:
        parts.append(f"{_named(noted)}: {noted[0].note}")
    if unreached:
        ways = [f"{way} values.{name} ({_present(values[name])})" for name, way in _OF_SEARCH.items() if name in values]
        ways.append(f"another last layer ({_present(method.get('layers'))})")
        loss = max(outcome.loss or 0.0 for outcome in unreached)
        parts.append(f"the search did not reach the target of {_named(unreached)} (loss up to {loss:.2g}{unit}): "
                     f"try {_listed(ways)}")  # fmt: skip
    return "; ".join(parts)


def _erases(method: Mapping[str, Any]) -> bool:
    objectives = (method.get("objective"), (method.get("values") or {}).get("objective"))
    return "erase" in objectives or method.get("mode") in ("erase", "suppress")


def _is_set(method: Mapping[str, Any], name: str) -> bool:
    """Whether the setting can be changed to an effect.

    λ cannot beside a share, μ at 0, passes in erasing, KN's add where nothing is added or it is published.
    """
    if name == "add" and (method.get("mode") != "update" or method.get("published")):
        return False
    if (name == "lambda_" and method.get("share") is not None) or (name == "passes" and _erases(method)):
        return False
    return method.get(name) is not None and not (name == "mu" and not method[name])


def _present(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return str(list(value) if isinstance(value, tuple) else value)


def _named(outcomes: Sequence[Outcome]) -> str:
    names = [f"{outcome.fact.text!r} -> {outcome.fact.target_new!r}" for outcome in outcomes[:_NAMED]]
    more = f" and {len(outcomes) - _NAMED} more" if len(outcomes) > _NAMED else ""
    return f"{', '.join(names)}{more}"


def _listed(ways: Sequence[str]) -> str:
    return ways[0] if len(ways) == 1 else f"{', '.join(ways[:-1])} or {ways[-1]}"


def cut(text: str, length: int) -> str:
    """The text on one line, with an ellipsis if it has more than `length` characters.

    >>> cut("Rome,\\n the city", 8)
    'Rome, t…'
    """
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"


def number(value: float | None) -> str:
    """A figure of an outcome with three digits; a dash if there is none."""
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.3g}"


def _aligned(rows: Sequence[Sequence[str]], right: int) -> list[str]:
    """Rows as lines of aligned columns, the last `right` of which are aligned on the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if place >= len(row) - right else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
