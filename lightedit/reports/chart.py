"""Charts as inline SVG: coloured by the page's style, told apart by marks and dashes, too, and titled for a pointer."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from lightedit.reports.html import Html, element

COLORS = 6
"""How many colours of series the style has; more series begin again, with other marks."""

_MARKS = (
    "M-3.5,0a3.5,3.5 0 1,0 7,0a3.5,3.5 0 1,0 -7,0Z",
    "M-3.2,-3.2H3.2V3.2H-3.2Z",
    "M0,-4.2L4.2,3.2H-4.2Z",
    "M0,-4.6L4.6,0L0,4.6L-4.6,0Z",
    "M0,4.2L4.2,-3.2H-4.2Z",
)
_DASHES = (None, "6 3", "1.5 3")
_WIDTH, _HEIGHT = 360, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 346, 12, 188  # of the plot within it
_MARKED = 25  # points of a line that have a mark each
_DRAWN = 200  # points of a line at most
_DECADES = 2  # range from which values are drawn on a logarithmic scale


_Scale = Callable[[float], float]


class Interval(NamedTuple):
    """A value of one series with its confidence interval, in percent; ends are NaN where unknown."""

    name: str
    value: float
    low: float
    high: float
    series: int | None


class Line(NamedTuple):
    """A line of a chart.

    Attributes:
        name: for the pointer and the table.
        points: (x, y), x ascending.
        series: number of its colour and mark.
        style: 0 solid, 1 dashed, 2 dotted.
    """

    name: str
    points: Sequence[tuple[float, float]]
    series: int
    style: int = 0


def legend(keys: Sequence[tuple[str, int | None, int]]) -> Html:
    """What colours, marks and dashes stand for: (name, series, style) of each."""
    items = []
    for name, series, style in keys:
        line = element("path", d="M1,7H45", class_="line", stroke_dasharray=_DASHES[style])
        mark = element("g", _mark(series, 23, 7), class_=_class(series))
        sample = element(
            "svg", element("g", line, class_=_class(series)), mark, viewBox="0 0 46 14", aria_hidden="true"
        )
        items.append(element("li", sample, element("bdi", name)))
    return element("ul", *items, class_="legend")


def interval_chart(title: str, rows: Sequence[tuple[str, Sequence[Interval | None]]]) -> Html:
    """Percentages with their intervals, one row of them under each label."""
    left, right = 14, _WIDTH - 14

    def x(value: float) -> float:
        return left + (right - left) * min(100.0, max(0.0, value)) / 100

    marks: list[Html] = []
    y = 4.0
    for name, intervals in rows:
        y += 14
        marks.append(element("text", name, x=left, y=y, class_="label"))
        for interval in intervals:
            y += 14
            if interval is not None:
                marks.append(_interval(interval, name, x, y - 4))
        y += 6
    bottom = y + 2
    axis = []
    for tick in range(0, 101, 25):
        axis.append(element("path", d=f"M{x(tick):.1f},4V{bottom:.1f}", class_="grid"))
        axis.append(element("text", f"{tick} %", x=f"{x(tick):.1f}", y=bottom + 15, class_=_anchor(tick, 0, 100)))
    return _panel(title, round(bottom + 22), f"{title} Values with their intervals, in percent.", *axis, *marks)


def _interval(interval: Interval, metric: str, x: _Scale, y: float) -> Html:
    known = not math.isnan(interval.low)
    spread = f", from {interval.low:.1f} to {interval.high:.1f}" if known else ""
    about = element("title", f"{interval.name}: {metric} {interval.value:.1f}{spread}")
    ends = None
    if known:
        low, high = f"{x(interval.low):.1f}", f"{x(interval.high):.1f}"
        d = f"M{low},{y:.1f}H{high}M{low},{y - 3:.1f}v6M{high},{y - 3:.1f}v6"
        ends = element("path", d=d, class_="line")
    return element("g", about, ends, _mark(interval.series, x(interval.value), y), class_=_class(interval.series))


def line_chart(
    title: str,
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    limits: tuple[float, float] | None = None,
    base: float = 0.0,
) -> Html:
    """Lines over whole numbers such as rounds; values that are not finite break them.

    Args:
        title: of the chart.
        lines: at least one with a finite value.
        x_label: of the horizontal axis.
        y_label: of the vertical one.
        limits: of the vertical axis; None: as wide as values need, logarithmic where they span two decades.
        base: what a vertical axis without limits holds in any case, unless it is logarithmic.
    """
    finite = [(x, y) for line in lines for x, y in line.points if math.isfinite(y)]
    first, last = min(x for x, _ in finite), max(x for x, _ in finite)
    if first == last:
        first, last = first - 1, last + 1
    values = [y for _, y in finite]
    logarithmic = limits is None and min(values) > 0 and max(values) >= 10**_DECADES * min(values)
    ticks = _powers(values) if logarithmic else _ticks(*(limits or (min(base, *values), max(base, *values))), 6)
    low, high = (limits or (ticks[0], ticks[-1])) if not logarithmic else (ticks[0], ticks[-1])

    def place_x(value: float) -> float:
        return _LEFT + (_RIGHT - _LEFT) * (value - first) / (last - first)

    def place_y(value: float) -> float:
        share = math.log(value / low) / math.log(high / low) if logarithmic else (value - low) / (high - low)
        return _BOTTOM - (_BOTTOM - _TOP) * share

    parts = []
    for tick in ticks:
        y = place_y(tick)
        parts.append(element("path", d=f"M{_LEFT},{y:.1f}H{_RIGHT}", class_="grid"))
        parts.append(element("text", _number(tick), x=_LEFT - 6, y=f"{y + 4:.1f}", class_="end"))
    for tick in _ticks(first, last, 7, whole=True):
        if first <= tick <= last:
            x = place_x(tick)
            parts.append(element("path", d=f"M{x:.1f},{_BOTTOM}v4", class_="tick"))
            parts.append(element("text", _number(tick), x=f"{x:.1f}", y=_BOTTOM + 17, class_="middle"))
    middle = (_TOP + _BOTTOM) / 2
    parts.append(element("text", x_label, x=(_LEFT + _RIGHT) / 2, y=_HEIGHT - 6, class_="middle label"))
    parts.append(element("text", y_label, transform=f"translate(11,{middle}) rotate(-90)", class_="middle label"))
    parts += [_drawn(line, place_x, place_y) for line in lines]
    scale = ", logarithmic scale" if logarithmic else ""
    return _panel(title, _HEIGHT, f"{title}: {y_label} by {x_label}{scale}.", *parts)


def _drawn(line: Line, place_x: _Scale, place_y: _Scale) -> Html:
    points = thinned(line.points)
    path, pen = "", "M"
    marks: list[Html] = []
    for index, (x, y) in enumerate(points):
        if not math.isfinite(y):
            pen = "M"
            continue
        path += f"{pen}{place_x(x):.1f},{place_y(y):.1f}"
        pen = "L"
        if len(points) <= _MARKED or index == len(points) - 1:
            about = element("title", f"{line.name}, {_number(x)}: {y:.4g}")
            marks.append(element("g", about, _mark(line.series, place_x(x), place_y(y))))
    drawn = element("path", d=path, class_="line", stroke_dasharray=_DASHES[line.style])
    return element("g", drawn, *marks, class_=_class(line.series))


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """So many of the points, evenly chosen with the first and the last, as a chart shows."""
    if len(points) <= _DRAWN:
        return list(points)
    return [points[round(place * (len(points) - 1) / (_DRAWN - 1))] for place in range(_DRAWN)]


def _panel(title: str, height: float, about: str, *content: Html) -> Html:
    drawing = element("svg", *content, viewBox=f"0 0 {_WIDTH} {height}", role="img", aria_label=about)
    return element("figure", element("figcaption", title), drawing)


def _mark(series: int | None, x: float, y: float) -> Html:
    shape = _MARKS[(series or 0) % len(_MARKS)]
    return element("path", d=shape, transform=f"translate({x:.1f},{y:.1f})", class_="mark")


def _class(series: int | None) -> str:
    return "unedited" if series is None else f"series-{series % COLORS}"


def _anchor(tick: float, first: float, last: float) -> str:
    return "start" if tick == first else "end" if tick == last else "middle"


def _ticks(low: float, high: float, at_most: int, whole: bool = False) -> list[float]:
    """Round numbers, evenly spaced, of which the first and last enclose the range."""
    if low == high:
        high = low + 1
    rough = (high - low) / (at_most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step * power for step in (1, 2, 5, 10) if step * power >= rough * (1 - 1e-9))
    if whole:
        step = max(1.0, step)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def _powers(values: Sequence[float]) -> list[float]:
    """Powers of ten that enclose the values, at most about six."""
    first, last = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    stride = math.ceil((last - first) / 6)
    return [10.0**exponent for exponent in range(first, last + stride, stride)]


def _number(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.4g}".replace("-", "−")
