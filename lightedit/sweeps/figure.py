"""The figure of a sweep: ES, PS, NS and S against a swept quantity."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightedit.figures import Axis, Level, Line, Panel, line_chart, save
from lightedit.sweeps.plan import Run, shown
from lightedit.sweeps.table import SCORES, UNEDITED, Row, Table

_TITLES = {"ES": "Efficacy", "PS": "Paraphrase", "NS": "Neighborhood", "S": "Score"}
_NAMES = {"facts": "facts", "facts_per_round": "facts a round", "lambda_": "λ"}
_SIZE = (720, 520)  # points
_LEGEND_COLUMNS = 3

Series = dict[Any, Row]
"""Swept value -> row; the key is None if the method lacks the swept field."""


def draw(path: Path, runs: Sequence[Run], table: Table, fields: Sequence[str]) -> None:
    """Draw one line for each method and setting, with 95 % intervals, and the unedited model in grey.

    The horizontal axis is the swept quantity with the most values. A method that lacks it is a dotted horizontal line.
    Runs without a row are left out. Equal tables give equal files.

    Args:
        path: an .svg or .png file.
        runs: the sweep's runs.
        table: their rows.
        fields: the swept fields.
    """
    swept = _axis(runs, fields)
    axis, places = _horizontal(swept, [_key(run.row[swept]) for run in runs if _has(run, swept)])
    found = _lines(runs, table, swept, fields)
    edited = [label for label in found if not label.startswith(UNEDITED)]
    panels: list[Panel] = []
    for score in SCORES:
        lines = [
            _line(label, series, score, edited.index(label) if label in edited else None, places)
            for label, series in found.items()
        ]
        # only the lower panel of a column has an axis label
        x = axis if len(panels) >= len(SCORES) - 2 else replace(axis, label="")
        panels.append(Panel(f"{_TITLES[score]} ({score})", lines, x, Axis("%", (0, 100)), grid="both"))
    save(line_chart(panels, _SIZE, columns=2, legend_columns=_LEGEND_COLUMNS), path)


def _horizontal(swept: str, values: Sequence[Any]) -> tuple[Axis, dict[Any, float]]:
    """The horizontal axis, and the position of each value on it: the number itself, or the index of other values."""
    values = list(dict.fromkeys(values))
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    values = sorted(values) if numeric else values
    places = {value: float(value) if numeric else float(index) for index, value in enumerate(values)}
    logarithmic = numeric and min(values) > 0 and max(values) >= 10 * min(values)
    named = not numeric or len(values) == 1
    names = {place: shown(value) for value, place in places.items()} if named else None
    low, high = min(places.values()), max(places.values())
    limits = (low - 1, high + 1) if low == high else (low, high)
    return Axis(_NAMES.get(swept, swept), limits, logarithmic, names), places


def _line(label: str, rows: Series, score: str, series: int | None, places: Mapping[Any, float]) -> Line | Level:
    points = {value: row for value, row in rows.items() if row[score] is not None}
    dashed = 1 if series is None else 0
    if None in points:
        return Level(label, points[None][score], series, dashed or 2)
    order = [value for value in places if value in points]
    widths = {} if series is None else {places[value]: points[value][f"{score}_half_width"] for value in order}
    return Line(
        label,
        [(places[value], points[value][score]) for value in order],
        series,
        dashed,
        {place: math.nan if width is None else width for place, width in widths.items()},
    )


def _axis(runs: Sequence[Run], fields: Sequence[str]) -> str:
    """The swept quantity with the most values: facts, facts_per_round or a field."""

    def size(name: str) -> int:
        if name == "facts_per_round":  # as requested: without a limit, its values are those of facts
            return len({run.round_limit for run in runs})
        return len({_key(run.row[name]) for run in runs if _has(run, name)})

    return max(("facts", *fields, "facts_per_round"), key=size)


def _has(run: Run, name: str) -> bool:
    return name in ("facts", "facts_per_round") or name in run.settings


def _key(value: Any) -> Any:
    """The value, with lists replaced by tuples, so that it is hashable."""
    return tuple(map(_key, value)) if isinstance(value, list) else value


def _lines(runs: Sequence[Run], table: Table, axis: str, fields: Sequence[str]) -> dict[str, Series]:
    """Label -> its rows; the key of a row without a value on the axis is None."""
    lines: dict[str, Series] = {}
    counts = len({run.facts for run in runs})
    for run in runs:
        counted = f", {run.facts} facts" if counts > 1 and axis != "facts" else ""
        edited, unedited = table.find(run), table.unedited(run.facts)
        if unedited is not None:
            x = run.facts if axis == "facts" and counts > 1 else None
            lines.setdefault(f"{UNEDITED}{counted}", {})[x] = unedited
        if edited is not None:
            x = _key(run.row[axis]) if _has(run, axis) else None
            lines.setdefault(_label(run, runs, axis, fields) + counted, {})[x] = edited
    return lines


def _label(run: Run, runs: Sequence[Run], axis: str, fields: Sequence[str]) -> str:
    """The method's name, and the values of swept quantities other than the axis and the number of facts."""
    own = [other for other in runs if other.name == run.name]
    parts = [run.name]
    for field in fields:
        if field != axis and len({shown(other.settings[field]) for other in own if field in other.settings}) > 1:
            parts.append(f"{_NAMES.get(field, field)} {shown(run.settings[field])}")
    if axis != "facts_per_round" and len({other.round_limit for other in own}) > 1:
        limit = "all in one round" if run.round_limit is None else f"{run.round_limit} a round"
        parts.append("each alone" if run.round_limit == "single" else limit)
    return ", ".join(parts)
