"""What became of each fact of a run, and what changed elsewhere."""

from collections.abc import Sequence

from lightedit.data.facts import Fact
from lightedit.editing.artefact import Edit
from lightedit.editing.outcomes import Damage, Outcome
from lightedit.editing.summary import count_held, number
from lightedit.reports.html import Html, element, group, scrolling_table
from lightedit.reports.reading import ReportedRun

_OPEN = 30  # most facts of one table; the others that hold are folded

_RULE = (
    "A fact holds if the model's most probable continuation of its prompt begins with the new target. Probability is "
    "the target's after the prompt, per token (geometric mean). Rank is the worst one of its tokens, 1 for the most "
    "probable token. Loss is where the fact's search ended, in nats. KL(edited || unedited) is that of the token after "
    "a prompt, in nats."
)


def outcomes_section(runs: Sequence[ReportedRun]) -> Html | None:
    """Every fact of each run with the model's words before and after; None if no run asked for them."""
    parts = [_of_run(run.edit, run.name if len(runs) > 1 else None) for run in runs if run.edit and run.edit.outcomes]
    if not parts:
        return None
    rule = element("details", element("summary", "How to read this"), element("p", _RULE))
    return element("section", element("h2", "Outcomes"), rule, *parts, id="outcomes")


def _of_run(edit: Edit, name: str | None) -> Html:
    ordered = sorted(edit.outcomes, key=lambda outcome: outcome.held)
    failed = sum(not outcome.held for outcome in ordered)
    shown = max(_OPEN, failed)
    rest = ordered[shown:]
    return element(
        "div",
        None if name is None else element("h3", element("bdi", name)),
        element("p", element("b", f"{count_held(edit.outcomes)}."), class_="warning" if failed else None),
        _facts(ordered[:shown]),
        element("details", element("summary", f"{len(rest)} more that hold"), _facts(rest)) if rest else None,
        _elsewhere(edit.damage) if edit.damage else None,
    )


def _facts(outcomes: Sequence[Outcome]) -> Html:
    names = ("", "fact", "said before", "says now", "probability", "rank", "loss")
    rows = [
        element(
            "tr",
            element("th", "holds" if outcome.held else "does not hold", scope="row"),
            element("td", _fact(outcome.fact)),
            _text(outcome.before),
            _text(outcome.after) if outcome.probability is not None else element("td", "NaN or infinity"),
            *(
                element("td", number(value), class_="number")
                for value in (outcome.probability, outcome.rank, outcome.loss)
            ),
        )
        for outcome in outcomes
    ]
    return scrolling_table("Outcomes of facts", _heads(names), *rows)


def _fact(fact: Fact) -> Html:
    start, _, end = fact.prompt.partition("{}")
    prompt = element("bdi", start, None if fact.subject is None else element("mark", fact.subject), end)
    return group(prompt, " → ", element("bdi", fact.target_new, class_="target"))


def _elsewhere(damage: Sequence[Damage]) -> Html:
    rows = [
        element(
            "tr",
            element("th", element("bdi", row.prompt), scope="row"),
            _text(row.before),
            _text(row.after),
            element("td", f"{row.kl:.3g}", class_="number"),
        )
        for row in damage
    ]
    heads = _heads(("prompt that should stay", "said before", "says now", "KL (nats)"))
    return group(element("h4", "Elsewhere, the largest change first"), scrolling_table("Elsewhere", heads, *rows))


def _heads(names: Sequence[str]) -> Html:
    return element("tr", *(element("th", name, scope="col") for name in names))


def _text(text: str) -> Html:
    return element("td", element("bdi", " ".join(text.split())))
