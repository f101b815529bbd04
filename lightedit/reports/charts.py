"""Charts of the page: `figure` elements with a drawing and a caption, and legends."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from lightedit.figures import Drawing, Panel, blank, draw_bar, draw_marks, line_chart, sample, style
from lightedit.reports.html import Html, element
from lightedit.reports.inline import svg

_ROW, _GAP = 14, 6  # height of a line of text or an interval, and gap below the last one of a label, in points
_MARGIN, _TOP, _FOOT = 18, 4, 22
_WIDTH = 360


class Interval(NamedTuple):
    """A value of one series with its confidence interval, in percent; unknown ends are NaN."""

    name: str
    value: float
    low: float
    high: float
    series: int | None


def line_figure(panel: Panel) -> Html:
    """One panel of lines under its title."""
    return _figure(panel.title, line_chart([panel], titles=False))


def interval_figure(title: str, rows: Sequence[tuple[str, Sequence[Interval | None]]]) -> Html:
    """Percentages with their intervals, below their label, one a line; None leaves a line empty."""
    plot = _TOP + sum(_ROW * (1 + len(intervals)) + _GAP for _, intervals in rows) + 2
    height = plot + _FOOT
    with style():
        drawing = blank((_WIDTH, height), f"{title} Values with their intervals, in percent.")
        box = (_MARGIN / _WIDTH, _FOOT / height, 1 - 2 * _MARGIN / _WIDTH, (plot - _TOP) / height)
        axes = drawing.figure.add_axes(box, xlim=(0, 100), ylim=(plot, _TOP), yticks=[])
        axes.spines["bottom"].set_visible(False)
        axes.set_xticks(range(0, 101, 25), [f"{tick} %" for tick in range(0, 101, 25)])
        axes.tick_params("x", length=0)
        axes.grid(axis="x")
        y = float(_TOP)
        for label, intervals in rows:
            y += _ROW
            axes.text(0, y, label)
            for interval in intervals:
                y += _ROW
                if interval is not None:
                    _draw(drawing, axes, label, interval, y - 4)
            y += _GAP
    return _figure(title, drawing)


def _draw(drawing: Drawing, axes: Any, label: str, interval: Interval, y: float) -> None:
    spread = ""
    if not math.isnan(interval.low):
        draw_bar(axes, [_within(interval.low), _within(interval.high)], [y, y], interval.series)
        spread = f", from {interval.low:.1f} to {interval.high:.1f}"
    title = f"{interval.name}: {label} {interval.value:.1f}{spread}"
    draw_marks(drawing, axes, [(_within(interval.value), y)], interval.series, [title])


def _within(value: float) -> float:
    return min(100.0, max(0.0, value))


def legend(keys: Sequence[tuple[str, int | None, int]]) -> Html:
    """A legend of colours, marks and dashes, with one key for each (name, series, style)."""
    items = [element("li", svg(sample(series, style)), element("bdi", name)) for name, series, style in keys]
    return element("ul", *items, class_="legend")


def _figure(title: str, drawing: Drawing) -> Html:
    return element("figure", element("figcaption", title), svg(drawing))
