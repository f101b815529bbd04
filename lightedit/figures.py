"""Charts: they are described in plain data, and matplotlib draws them.

A chart becomes a `Drawing`, which `save` writes to a file. Matplotlib is imported with the first drawing.
"""

import io
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lightedit.errors import ArgumentError
from lightedit.files import whole_file

PALETTE = {
    "page": "#ffffff",
    "text": "#1b1f24",
    "faint": "#57606a",
    "line": "#d5dae0",
    "series-0": "#0072b2",
    "series-1": "#c44e00",
    "series-2": "#00805d",
    "series-3": "#b0518a",
    "series-4": "#946200",
    "series-5": "#5a52a3",
}
"""Name -> colour. Drawings use no other colours. In a report each is the CSS variable of that name.

Series follow Okabe and Ito (2008), darkened for text on white. Colour-blind readers can tell them apart.
"""
_COLORS = 6  # six colours and five marks give thirty different series
_MARKS = ("o", "s", "^", "D", "v")
_DASHES = ("-", (0, (3.4, 1.7)), (0, (0.9, 1.7)))  # lengths in line widths
_LINE_WIDTH = 1.75
_MARK_SIZES = (7.0, 6.4, 7.5, 6.4, 7.5)  # in points; the marks look equally large
_MARKED = 25  # a line with more points has a mark only at its end
_DRAWN = 200  # points of a line at most
_DECADES = 2  # an axis with `logarithmic` None is logarithmic from this range on
_STYLE = {
    "svg.fonttype": "none",  # text stays text, not paths
    "svg.hashsalt": "lightedit",  # equal figures give equal files
    "text.parse_math": False,  # a dollar sign in a name is printed as it is
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.titlepad": 9,
    "axes.labelsize": 11,
    "legend.fontsize": 11,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "figure.constrained_layout.hspace": 0.05,
    "figure.constrained_layout.wspace": 0.03,
    "axes.facecolor": "none",
    "axes.edgecolor": PALETTE["faint"],
    "axes.labelcolor": PALETTE["text"],
    "axes.titlecolor": PALETTE["text"],
    "axes.axisbelow": True,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "text.color": PALETTE["text"],
    "xtick.color": PALETTE["faint"],
    "ytick.color": PALETTE["faint"],
    "ytick.major.size": 0,
    "ytick.major.pad": 6,
    "grid.color": PALETTE["line"],
    "grid.linewidth": 1.0,
}


class Line(NamedTuple):
    """A line of a chart.

    Attributes:
        name: name in the legend, the tooltip and the table.
        points: (x, y), x ascending. A y that is not finite breaks the line.
        series: number of its colour and mark; None for a reference such as the unedited model, which is grey.
        style: 0 solid, 1 dashed, 2 dotted; None for marks alone.
        half_widths: x -> half the width of the interval around y. An x that is missing has no interval.
        marks: whether points have marks.
    """

    name: str
    points: Sequence[tuple[float, float]]
    series: int | None
    style: int | None = 0
    half_widths: Mapping[float, float] = {}
    marks: bool = True


class Level(NamedTuple):
    """A value that does not depend on x, drawn as a horizontal line. Fields are as in `Line`."""

    name: str
    value: float
    series: int | None
    style: int = 2


@dataclass(frozen=True)
class Axis:
    """An axis of a panel.

    Attributes:
        label: the quantity and its unit.
        limits: its ends; None takes those of the values, widened to round numbers on a vertical axis.
        logarithmic: None makes it logarithmic if it has no limits and all values are positive and span two decades.
        names: value -> the name of the tick there; None puts ticks at round numbers.
        whole: whether ticks are at whole numbers only.
        base: a value that a linear axis without limits always contains.
    """

    label: str = ""
    limits: tuple[float, float] | None = None
    logarithmic: bool | None = False
    names: Mapping[float, str] | None = None
    whole: bool = False
    base: float | None = None


@dataclass(frozen=True)
class Panel:
    """Lines on common axes. At least one line has a finite value. `grid` is "x", "y" or "both"."""

    title: str
    lines: Sequence[Line | Level]
    x: Axis
    y: Axis
    grid: str = "y"


@dataclass
class Drawing:
    """A figure of matplotlib, with its alternative text and tooltips.

    Attributes:
        figure: a `matplotlib.figure.Figure`.
        about: alternative text; empty for an ornament.
        titles: id of a group of marks -> the tooltip of each mark.
    """

    figure: Any
    about: str
    titles: dict[str, list[str]]


def line_chart(
    panels: Sequence[Panel],
    size: tuple[float, float] = (360, 230),
    columns: int = 1,
    titles: bool = True,
    legend_columns: int = 0,
) -> Drawing:
    """Draw panels of lines in a grid.

    Args:
        panels: the panels, row by row.
        size: width and height of the whole figure in points (1/72 inch), which are pixels of an SVG.
        columns: panels in a row.
        titles: whether panels have their titles; False leaves them in `Drawing.about` only.
        legend_columns: columns of a legend below the panels; 0 for none.
    """
    with style():
        drawing = blank(size, layout="constrained")
        rows = math.ceil(len(panels) / columns)
        for axes, panel in zip(drawing.figure.subplots(rows, columns, squeeze=False).flat, panels, strict=False):
            _draw_panel(drawing, axes, panel)
            if titles:
                axes.set_title(panel.title)
        if legend_columns:
            handles = {line.name: _handle(line, panel) for panel in panels for line in panel.lines}
            drawing.figure.legend(handles=handles.values(), loc="outside lower center", ncols=legend_columns)
    return drawing


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that a chart shows: at most 200, evenly chosen, the first and the last included."""
    if len(points) <= _DRAWN:
        return list(points)
    return [points[round(place * (len(points) - 1) / (_DRAWN - 1))] for place in range(_DRAWN)]


def save(drawing: Drawing, path: Path) -> None:
    """Write a drawing to an .svg or .png file, completely or not at all. Equal drawings give equal bytes.

    Raises:
        ArgumentError: `path` has another suffix.
    """
    kind = path.suffix.removeprefix(".")
    if kind not in ("svg", "png"):
        raise ArgumentError(f"{path}: a figure is an .svg or a .png file")
    content = io.BytesIO()
    with style():
        metadata = {"Date": None} if kind == "svg" else None
        drawing.figure.savefig(content, format=kind, dpi=150, facecolor=PALETTE["page"], metadata=metadata)
    with whole_file(path) as unfinished:
        unfinished.write_bytes(content.getvalue())


def style() -> AbstractContextManager[None]:
    """Within the context, matplotlib has its defaults and the settings of this module, not the user's."""
    import matplotlib.style

    context: AbstractContextManager[None] = matplotlib.style.context(["default", _STYLE])
    return context


def blank(size: tuple[float, float], about: str = "", layout: Literal["constrained"] | None = None) -> Drawing:
    """A figure without axes. `size` is its width and height in points. Draw on it within `style`."""
    from matplotlib.figure import Figure

    return Drawing(Figure(figsize=(size[0] / 72, size[1] / 72), layout=layout), about, {})


def sample(series: int | None, dashes: int) -> Drawing:
    """A short line of a series with its mark, 46 by 14 points, for the legend of a page; `dashes` is `Line.style`."""
    with style():
        drawing = blank((46, 14))
        axes = drawing.figure.add_axes((0, 0, 1, 1), xlim=(0, 46), ylim=(0, 14))
        axes.set_axis_off()
        axes.plot([1, 45], [7, 7], color=_color(series), linestyle=_DASHES[dashes], linewidth=_LINE_WIDTH)
        axes.plot([23], [7], **_mark(series))
    return drawing


def draw_bar(axes: Any, x: Sequence[float], y: Sequence[float], series: int | None, upright: bool = False) -> None:
    """Draw a horizontal (or `upright`, vertical) interval between two points, with a stroke at each end."""
    ends, width = ("_", 1.0) if upright else ("|", _LINE_WIDTH)
    axes.plot(x, y, color=_color(series), linewidth=width, marker=ends, markeredgewidth=width, clip_on=False)


def draw_marks(
    drawing: Drawing, axes: Any, points: Sequence[tuple[float, float]], series: int | None, titles: list[str]
) -> None:
    """Draw the marks of a series at points; `titles` holds the tooltip of each mark."""
    if points:
        name = f"marks-{len(drawing.titles)}"
        drawing.titles[name] = titles
        axes.plot(*zip(*points, strict=True), gid=name, zorder=3, **_mark(series))


def _color(series: int | None) -> str:
    return PALETTE["faint" if series is None else f"series-{series % _COLORS}"]


def _mark(series: int | None) -> dict[str, Any]:
    """Matplotlib's arguments for the mark of a series. The mark of a reference is hollow."""
    color, index = _color(series), (series or 0) % len(_MARKS)
    face, edge, width = (PALETTE["page"], color, _LINE_WIDTH) if series is None else (color, PALETTE["page"], 1.0)
    return {
        "linestyle": "none",
        "marker": _MARKS[index],
        "markersize": _MARK_SIZES[index],
        "markerfacecolor": face,
        "markeredgecolor": edge,
        "markeredgewidth": width,
        "clip_on": False,
    }


def _stroke(line: Line | Level, panel: Panel) -> dict[str, Any]:
    """Matplotlib's arguments for a line. Each further reference of a panel is fainter."""
    references = [other.name for other in panel.lines if other.series is None]
    return {
        "color": _color(line.series),
        "linestyle": "none" if line.style is None else _DASHES[line.style],
        "linewidth": _LINE_WIDTH,
        "alpha": 1 - 0.7 * references.index(line.name) / len(references) if line.series is None else 1,
        "clip_on": False,
    }


def _handle(line: Line | Level, panel: Panel) -> Any:
    from matplotlib.lines import Line2D

    marked = isinstance(line, Line) and line.marks
    return Line2D([], [], label=line.name, **((_mark(line.series) if marked else {}) | _stroke(line, panel)))


def _draw_panel(drawing: Drawing, axes: Any, panel: Panel) -> None:
    points = [point for line in panel.lines if isinstance(line, Line) for point in line.points]
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    levels = [line.value for line in panel.lines if isinstance(line, Level) and math.isfinite(line.value)]
    _lay_out(axes, "x", panel.x, [x for x, _ in finite] or [0.0])
    _lay_out(axes, "y", panel.y, [y for _, y in finite] + levels)
    axes.grid(axis=panel.grid)
    scale = ", logarithmic scale" if axes.get_yscale() == "log" else ""
    drawing.about += f"{' ' * bool(drawing.about)}{panel.title}: {panel.y.label} by {panel.x.label}{scale}."
    for line in panel.lines:
        if isinstance(line, Level):
            axes.axhline(line.value, **_stroke(line, panel))
        else:
            _draw_line(drawing, axes, line, panel)


def _lay_out(axes: Any, name: str, axis: Axis, values: Sequence[float]) -> None:
    """Scale, limits and ticks of the axis "x" or "y"."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    logarithmic = axis.logarithmic
    if logarithmic is None:
        logarithmic = axis.limits is None and min(values) > 0 and max(values) >= 10**_DECADES * min(values)
    drawn = axes.xaxis if name == "x" else axes.yaxis
    locator = (
        LogLocator(numticks=7)
        if logarithmic
        else MaxNLocator(6 if name == "x" else 5, steps=[1, 2, 5, 10], integer=axis.whole)
    )
    axes.set(**{f"{name}scale": "log" if logarithmic else "linear", f"{name}label": axis.label})
    axes.set(**{f"{name}lim": axis.limits or _limits(axis, values, name == "y", logarithmic, locator)})
    drawn.set_major_locator(locator)
    drawn.set_minor_locator(NullLocator())
    drawn.set_major_formatter(FuncFormatter(lambda value, _: _number(value)))
    if axis.names is not None:
        drawn.set_ticks(list(axis.names), list(axis.names.values()))


def _limits(axis: Axis, values: Sequence[float], widened: bool, logarithmic: bool, locator: Any) -> tuple[float, float]:
    if logarithmic:
        low, high = min(values), max(values)
        if widened:
            return 10.0 ** math.floor(math.log10(low)), 10.0 ** math.ceil(math.log10(high))
        return (low / 2, high * 2) if low == high else (low, high)
    known = [*values, *([] if axis.base is None else [axis.base])]
    low, high = min(known), max(known)
    if not widened:
        return (low - 1, high + 1) if low == high else (low, high)
    ticks = locator.tick_values(low, low + 1 if low == high else high)
    return ticks[0], ticks[-1]


def _draw_line(drawing: Drawing, axes: Any, line: Line, panel: Panel) -> None:
    points = thinned(line.points)
    if line.style is not None:
        axes.plot(*zip(*points, strict=True), **_stroke(line, panel))
    low, high = sorted(axes.get_ylim())
    for x, y in points:
        half = line.half_widths.get(x, math.nan)
        if math.isfinite(half) and math.isfinite(y):
            draw_bar(axes, [x, x], [max(low, y - half), min(high, y + half)], line.series, upright=True)
    if line.marks:
        marked = points if len(points) <= _MARKED else points[-1:]
        found = [(x, y) for x, y in marked if math.isfinite(y)]
        titles = [f"{line.name}, {_number(x)}: {y:.4g}" for x, y in found]
        draw_marks(drawing, axes, found, line.series, titles)


def _number(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.4g}".replace("-", "−")
