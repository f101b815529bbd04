"""The figure of a sweep: ES, PS, NS and S against what is swept."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightedit.files import whole_file
from lightedit.sweeps.plan import Run, shown
from lightedit.sweeps.table import SCORES, UNEDITED, Row, Table

_TITLES = {"ES": "Efficacy", "PS": "Paraphrase", "NS": "Neighborhood", "S": "Score"}
_NAMES = {"facts": "facts", "facts_per_round": "facts a round", "lambda_": "λ"}
_STYLES = ("-", "-.")
"""Of the first ten lines, of the next ten."""

Line = dict[Any, Row]
"""Position on the horizontal axis -> row."""


def draw(path: Path, runs: Sequence[Run], table: Table, fields: Sequence[str]) -> None:
    """Draw one line for each method and setting, with 95 % intervals, and the unedited model dashed.

    The horizontal axis is the swept quantity with the most values; a method without it is a level dotted line.
    Runs without a row are left out.

    Args:
        path: an .svg or .png file.
        runs: the sweep's runs.
        table: their rows.
        fields: the swept fields.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter
    except ImportError as error:
        raise RuntimeError(
            f"{path.name} needs matplotlib: pip install 'lightedit[report]' and start again; the runs in {table.path} "
            "are finished"
        ) from error

    axis = _axis(runs, fields)
    values = list(dict.fromkeys(_key(run.row[axis]) for run in runs if _has(run, axis)))
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    values = sorted(values) if numeric else values
    places = {value: value if numeric else index for index, value in enumerate(values)}
    lines = _lines(runs, table, axis, fields)
    edited = [label for label in lines if not label.startswith(UNEDITED)]
    before = [label for label in lines if label.startswith(UNEDITED)]
    greys = {label: f"{0.7 - 0.5 * (place + 1) / len(before):.2f}" for place, label in enumerate(before)}

    figure = Figure(figsize=(9, 6.4), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True).flatten()
    for panel, score in zip(panels, SCORES, strict=True):
        for label, line in lines.items():
            unedited = label in greys
            index = 0 if unedited else edited.index(label)
            color = greys.get(label, f"C{index % 10}")
            points = {x: row for x, row in line.items() if row[score] is not None}
            if None in points:
                style = "--" if unedited else ":"
                panel.axhline(points[None][score], color=color, linestyle=style, label=label)
                continue
            order = [value for value in values if value in points]
            panel.errorbar(
                [places[value] for value in order],
                [points[value][score] for value in order],
                [points[value][f"{score}_half_width"] or math.nan for value in order],
                color=color,
                linestyle="--" if unedited else _STYLES[index // 10 % len(_STYLES)],
                marker="" if unedited else "os^Dv<>Pp*"[index % 10],
                markersize=4,
                elinewidth=0 if unedited else 0.8,
                capsize=0 if unedited else 2,
                label=label,
            )
        panel.set_title(f"{_TITLES[score]} ({score})", fontsize=10)
        panel.set_ylim(-3, 103)
        panel.set_ylabel("%")
        panel.grid(alpha=0.3)
        if numeric and min(values) > 0 and max(values) >= 10 * min(values):
            panel.set_xscale("log")
            panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: shown(x)))
        if not numeric or len(values) == 1:
            panel.set_xticks(list(places.values()), [shown(value) for value in places])
    for panel in panels[2:]:
        panel.set_xlabel(_NAMES.get(axis, axis))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9, frameon=False)

    content = io.BytesIO()
    # letters stay letters, and equal sweeps give equal files
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "lightedit"}):
        kind = path.suffix.removeprefix(".")
        figure.savefig(content, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    with whole_file(path) as unfinished:
        unfinished.write_bytes(content.getvalue())


def _axis(runs: Sequence[Run], fields: Sequence[str]) -> str:
    """What has the most values: facts, facts_per_round or a swept field."""

    def size(name: str) -> int:
        if name == "facts_per_round":  # as asked for: without a limit it goes with the facts
            return len({run.round_limit for run in runs})
        return len({_key(run.row[name]) for run in runs if _has(run, name)})

    return max(("facts", *fields, "facts_per_round"), key=size)


def _has(run: Run, name: str) -> bool:
    return name in ("facts", "facts_per_round") or name in run.settings


def _key(value: Any) -> Any:
    """The value, with tuples for lists, so that it can be a key."""
    return tuple(map(_key, value)) if isinstance(value, list) else value


def _lines(runs: Sequence[Run], table: Table, axis: str, fields: Sequence[str]) -> dict[str, Line]:
    """Label -> line; a line that has no place on the axis stands at None."""
    lines: dict[str, Line] = {}
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
    """The method and what else is swept beside the axis, but for the number of facts."""
    own = [other for other in runs if other.name == run.name]
    parts = [run.name]
    for field in fields:
        if field != axis and len({shown(other.settings[field]) for other in own if field in other.settings}) > 1:
            parts.append(f"{_NAMES.get(field, field)} {shown(run.settings[field])}")
    if axis != "facts_per_round" and len({other.round_limit for other in own}) > 1:
        limit = "all in one round" if run.round_limit is None else f"{run.round_limit} a round"
        parts.append("each alone" if run.round_limit == "single" else limit)
    return ", ".join(parts)
