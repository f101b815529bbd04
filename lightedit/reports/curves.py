"""Curves over the rounds of a run: retention, norms of updates, and the model's health."""

import math
from collections.abc import Sequence
from typing import Any

from lightedit.evaluation.result import label
from lightedit.figures import Axis, Line, Panel, thinned
from lightedit.reports.charts import legend, line_figure
from lightedit.reports.html import Html, element, group, scrolling_table
from lightedit.reports.reading import ReportedRun
from lightedit.reports.scores import ACCURACIES, HEADLINES

_FIRST, _ALL, _LATEST = "facts of the first round", "all facts so far", "facts of the latest round"
_HEALTH = (
    ("drift", "Drift of the edited matrices", "‖W − W₀‖", 0.0),
    ("kl", "Change of what the model says on text", "KL, nats per token", 0.0),
    ("perplexity_ratio", "Perplexity on text", "times the unedited model's", 1.0),
)


def curves_section(runs: Sequence[ReportedRun]) -> Html | None:
    """Curves of all runs that have several rounds or tables of rounds; None if no run has."""
    parts = [_retention(runs), _health(runs)]
    if not any(parts):
        return None
    return element("section", element("h2", "Over the rounds"), *parts, id="rounds")


def _retention(runs: Sequence[ReportedRun]) -> Html | None:
    known = {name for run in runs for row in run.retention for name in row}
    metrics = [name for name in HEADLINES if name in known] or [name for name in ACCURACIES if name in known]
    if not metrics:
        return None
    panels = [
        _panel(f"{label(name)} after each round", _over_rounds(runs, name), "rounds written", "%", (0, 100))
        for name in metrics
    ]
    panels.append(
        _panel(
            f"{label(metrics[0])} after the last round, by origin",
            _by_origin(runs, metrics[0]),
            "round in which the facts were written",
            "%",
            (0, 100),
        )
    )
    styles = [(_FIRST, 0), (_ALL, 1), (_LATEST, 2)]
    keys = [
        (_named(run, name, runs), index, style) for index, run in _with(runs, "retention") for name, style in styles
    ]
    about = "Retention: facts are scored again after later rounds. What all rounds so far score is their average."
    return group(element("p", about), legend(keys), element("div", *panels, class_="panels"))


def _over_rounds(runs: Sequence[ReportedRun], metric: str) -> list[Line]:
    lines = []
    for index, run in _with(runs, "retention"):
        validations: dict[int, list[dict[str, Any]]] = {}
        for row in run.retention:
            if metric in row:
                validations.setdefault(row["round"], []).append(row)
        found = sorted(validations.items())
        first = [(now, row[metric]) for now, rows in found for row in rows if row["origin"] == 1]
        everything = [(now, _average(rows, metric)) for now, rows in found]
        latest = [(now, row[metric]) for now, rows in found for row in rows if row["origin"] == now]
        for style, (name, points) in enumerate(((_FIRST, first), (_ALL, everything), (_LATEST, latest))):
            lines.append(Line(_named(run, name, runs), points, index, style))
    return lines


def _by_origin(runs: Sequence[ReportedRun], metric: str) -> list[Line]:
    lines = []
    for index, run in _with(runs, "retention"):
        last = max(row["round"] for row in run.retention)
        points = [(row["origin"], row[metric]) for row in run.retention if row["round"] == last and metric in row]
        lines.append(Line(run.name, points, index))
    return lines


def _average(rows: Sequence[dict[str, Any]], metric: str) -> float:
    return sum(row["facts"] * row[metric] for row in rows) / sum(row["facts"] for row in rows)


def _health(runs: Sequence[ReportedRun]) -> Html | None:
    panels = [_panel("Size of each round's update", _update_norms(runs), "round", "‖ΔW‖")]
    for name, title, unit, unedited in _HEALTH:
        lines = [
            Line(run.name, [(row["round"], row[name]) for row in run.health if name in row], index)
            for index, run in _with(runs, "health")
        ]
        panels.append(_panel(title, lines, "rounds written", unit, base=unedited))
    if not any(panels):
        return None
    drawn = [index for index, run in enumerate(runs) if run.health or len(_norms(run)) > 1]
    keys = legend([(runs[index].name, index, 0) for index in drawn])
    about = "Health of the model. Norms are Frobenius norms over all edited matrices together."
    return group(element("p", about), keys, element("div", *panels, class_="panels"))


def _update_norms(runs: Sequence[ReportedRun]) -> list[Line]:
    return [Line(run.name, points, index) for index, run in enumerate(runs) if len(points := _norms(run)) > 1]


def _norms(run: ReportedRun) -> list[tuple[float, float]]:
    """Norm of each round's update over all matrices, from the edit; without an edit, from the log."""
    if run.edit is not None:
        norms = [[update.norm() for update in updates.values()] for updates in run.edit.rounds]
        return [(number, math.hypot(*round_)) for number, round_ in enumerate(norms, 1)]
    rows = [(row["round"], [row[name] for name in row if name.startswith("update_norm/")]) for row in run.health]
    return [(number, math.hypot(*norms)) for number, norms in rows if norms]


def _panel(
    title: str,
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    limits: tuple[float, float] | None = None,
    base: float = 0.0,
) -> Html | None:
    """A chart, with its numbers as a table; None if there is nothing to draw."""
    lines = [line for line in lines if any(math.isfinite(y) for _, y in line.points)]
    if not lines:
        return None
    columns = [dict(thinned(line.points)) for line in lines]
    places = sorted({x for column in columns for x in column})
    heads = [element("th", name, scope="col", class_="number") for name in (x_label, *(line.name for line in lines))]
    rows = [
        element(
            "tr",
            element("th", f"{x:g}", scope="row"),
            *(element("td", f"{column[x]:.4g}" if x in column else "–", class_="number") for column in columns),
        )
        for x in places
    ]
    # an axis of percentages has fixed limits; other axes may be logarithmic
    y = Axis(y_label, limits, logarithmic=None, base=base)
    panel = Panel(title, lines, Axis(x_label, whole=True), y)
    table = scrolling_table(f"{title}, as figures", element("tr", *heads), *rows)
    details = element("details", element("summary", "as a table"), table)
    return element("div", line_figure(panel), details)


def _with(runs: Sequence[ReportedRun], table: str) -> list[tuple[int, ReportedRun]]:
    return [(index, run) for index, run in enumerate(runs) if getattr(run, table)]


def _named(run: ReportedRun, name: str, runs: Sequence[ReportedRun]) -> str:
    return name if len(runs) == 1 else f"{run.name}, {name}"
