"""The scores of runs: a table with intervals, and figures of the intervals."""

import inspect
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from lightedit.evaluation.result import Evaluation, decimals, label
from lightedit.metrics.scores import METRICS
from lightedit.reports.charts import Interval, interval_figure, legend
from lightedit.reports.html import Html, element, group, scrolling_table
from lightedit.reports.reading import ReportedRun

HEADLINES = ("S", "ES", "PS", "NS")
ACCURACIES = ("efficacy_accuracy", "paraphrase_accuracy", "neighborhood_accuracy")

_CLASSES = {metric.name: metric for metric in METRICS}
_ON_TEXT = {
    "perplexity": "Perplexity on held-out text.",
    "kl": "How far what the model says on held-out text is from the unedited model, KL in nats per token.",
}
"""Scores that are not a `Metric`; lower is better."""


class Column(NamedTuple):
    """One column of scores.

    Attributes:
        head: the column's heading.
        scores: the evaluation.
        series: index of its colour and mark in figures; None for the unedited model, which is grey.
        compared: whether the column is compared with others.
    """

    head: str
    scores: Evaluation
    series: int | None
    compared: bool


def scores_section(runs: Sequence[ReportedRun]) -> Html | None:
    """The table and figures of all scores; None if no run has any."""
    columns = score_columns(runs)
    if not columns:
        return None
    comparable = same_facts(columns)
    notes = ["↑ marks metrics of which more is better, ↓ those of which less is."]
    if any(not math.isnan(low) for column in columns for low, _ in column.scores.intervals.values()):
        notes.append("The number after ± is half the width of the 95 % confidence interval over the facts.")
    if comparable and sum(column.compared for column in columns) > 1:
        notes.append("“better” stands where that interval overlaps with none of those it is compared with.")
    if not comparable:
        notes.append("These columns were scored on different facts, so none is marked as better.")
    return element(
        "section",
        element("h2", "Scores"),
        element("p", " ".join(notes)),
        element("div", _table(columns, comparable), _figures(columns), class_="beside"),
        _explanations(_metrics(columns)),
        id="scores",
    )


def score_columns(runs: Sequence[ReportedRun]) -> list[Column]:
    """The evaluations of all runs.

    A single run is compared with its own unedited model, several runs with one another. If the unedited model's scores
    are the same in all runs, it has one column.
    """
    befores = [run.before for run in runs if run.before is not None]
    shared = len(runs) > 1 and len(befores) == len(runs) and all(other.scores == befores[0].scores for other in befores)
    columns = [Column("unedited", befores[0], None, False)] if shared else []
    for index, run in enumerate(runs):
        alone = len(runs) == 1
        if run.before is not None and not shared:
            columns.append(Column("before" if alone else f"{run.name}, before", run.before, None, alone))
        if run.after is not None:
            edited = "after" if run.before is not None else "score"
            columns.append(Column(edited if alone else run.name, run.after, index, True))
    return columns


def same_facts(columns: Sequence[Column]) -> bool:
    """Whether all compared columns were scored on the same facts, as far as is known."""
    sets = {frozenset(fact_key(record) for record in column.scores.records) for column in columns if column.compared}
    return len(sets - {frozenset()}) <= 1


def fact_key(record: dict[str, Any]) -> tuple[Any, ...]:
    """The fields that identify a fact: two records with the same key are of the same fact."""
    return tuple(record.get(field) for field in ("prompt", "subject", "target_new"))


def better(values: Sequence[tuple[float, float] | None], higher: bool) -> int | None:
    """The index of the interval that is better than all others without overlap; None if there is none.

    Args:
        values: ends of the intervals. An unknown interval is None or NaN, and counts as overlapping all others.
        higher: whether higher is better.
    """
    if len(values) < 2 or any(ends is None or math.isnan(ends[0]) for ends in values):
        return None
    known = [ends for ends in values if ends is not None]
    for index, (low, high) in enumerate(known):
        others = [ends for place, ends in enumerate(known) if place != index]
        if all(low > ends[1] if higher else high < ends[0] for ends in others):
            return index
    return None


def higher_is_better(metric: str) -> bool | None:
    """Whether higher values of a metric are better; None for an unknown metric."""
    if metric in _CLASSES:
        return _CLASSES[metric].higher_is_better
    return False if metric in _ON_TEXT else None


def _arrow(metric: str) -> str:
    higher = higher_is_better(metric)
    return "" if higher is None else "↑" if higher else "↓"


def explanation(metric: str) -> str:
    """A sentence that explains a metric; empty for an unknown metric."""
    if metric not in _CLASSES:
        return _ON_TEXT.get(metric, "")
    text = (inspect.getdoc(_CLASSES[metric]) or "").partition("\n\n")[0].replace("\n", " ")
    text = text.removeprefix(f"{metric}: ")
    return text[:1].upper() + text[1:]


def _explanations(metrics: Sequence[str]) -> Html:
    rows = [element("div", element("dt", label(name)), element("dd", explanation(name))) for name in metrics]
    return element(
        "details", element("summary", "What the metrics are"), element("dl", *rows), open="", class_="metrics"
    )


def _metrics(columns: Sequence[Column]) -> list[str]:
    found = dict.fromkeys(name for column in columns for name in column.scores.scores)
    return sorted(found, key=lambda name: name != "S")  # S first: the harmonic mean of ES, PS, NS


def _table(columns: Sequence[Column], comparable: bool) -> Html:
    changes = len(columns) == 2 and all(column.compared for column in columns) and columns[0].series is None
    heads = [element("th", column.head, scope="col", class_="number") for column in columns]
    if changes:
        heads.append(element("th", "change", scope="col", class_="number"))
    rows = [element("tr", element("th", "in %", scope="col"), *heads)]
    for metric in _metrics(columns):
        compared = [index for index, column in enumerate(columns) if column.compared]
        best = None
        if comparable and (higher := higher_is_better(metric)) is not None:
            best = better([columns[index].scores.intervals.get(metric) for index in compared], higher)
        winner = None if best is None else compared[best]
        cells = [_cell(column.scores, metric, index == winner) for index, column in enumerate(columns)]
        if changes:
            old, new = (column.scores.scores.get(metric) for column in columns)
            change = "" if old is None or new is None else number(new - old, decimals(metric), "+")
            cells.append(element("td", change, class_="number"))
        name = group(element("b", label(metric)), f" {_arrow(metric)}")
        rows.append(element("tr", element("th", name, scope="row", title=explanation(metric)), *cells))
    return scrolling_table("Scores, with 95 % confidence intervals", *rows)


def number(value: float, digits: int = 1, sign: str = "-") -> str:
    """A number for a table, with a minus sign instead of a hyphen; with `sign` "+" it always has a sign."""
    return f"{value:{sign}.{digits}f}".replace("-", "−")


def _cell(scores: Evaluation, metric: str, is_better: bool) -> Html:
    if metric not in scores.scores:
        return element("td", "–", class_="number")
    low, high = scores.intervals.get(metric, (math.nan, math.nan))
    known, digits = not math.isnan(low), decimals(metric)
    return element(
        "td",
        element("b" if is_better else "span", number(scores.scores[metric], digits)),
        element("span", f" ± {(high - low) / 2:.{digits}f}", class_="spread") if known else None,
        element("span", "better", class_="better") if is_better else None,
        class_="number",
        title=f"from {number(low, digits)} to {number(high, digits)}" if known else None,
    )


def _figures(columns: Sequence[Column]) -> Html | None:
    found = _metrics(columns)
    panels = []
    for title, names in (("Does the edit hold?", HEADLINES), ("Is it what the model says?", ACCURACIES)):
        shown = [name for name in names if name in found]
        if shown:
            rows = [(label(name), [_interval(column, name) for column in columns]) for name in shown]
            panels.append(interval_figure(title, rows))
    if not panels:
        return None
    keys = legend([(column.head, column.series, 0) for column in columns])
    return element("div", keys, element("div", *panels, class_="panels"))


def _interval(column: Column, metric: str) -> Interval | None:
    if metric not in column.scores.scores:
        return None
    low, high = column.scores.intervals.get(metric, (math.nan, math.nan))
    return Interval(column.head, column.scores.scores[metric], low, high, column.series)
