"""Figures of a localisation study: tracing effects, scores by layer, scores against effects, and R²."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightedit.analysis.averages import Mean
from lightedit.analysis.localization.regressions import Regression
from lightedit.analysis.localization.result import Cell, LocalizationStudy, Score
from lightedit.analysis.localization.settings import Problem
from lightedit.data.words import counted
from lightedit.figures import PALETTE, Axis, Drawing, Line, Panel, blank, draw_marks, line_chart, save, style

TITLES: dict[Problem, str] = {
    "injection": "Error injection",
    "reversal": "Tracing reversal",
    "erasure": "Fact erasure",
    "amplification": "Fact amplification",
    "forcing": "Fact forcing",
}
_PANEL = (300, 230)  # width and height of a panel, in points
_COLUMNS = 3
_R2 = {"layer": "layer", "effect": "tracing effect", "both": "both"}


def effect_lines(study: LocalizationStudy) -> Drawing:
    """The mean tracing effect by layer, one line for each number of restored layers, with 95 % intervals."""
    lines = [
        _line(f"{window} layer{'s' * (window > 1)}", dict(enumerate(study.effects_by_layer(window))), series)
        for series, window in enumerate(study.settings.windows)
    ]
    most = study.settings.largest_effect
    y = Axis("tracing effect", limits=None if most is None else (0.0, most), base=0.0)
    panel = Panel("Tracing effect by restored MLPs", lines, _layers(study), y)
    return line_chart([panel], (2 * _PANEL[0], _PANEL[1] + 40), legend_columns=len(lines))


def peaks(study: LocalizationStudy) -> Drawing:
    """How many facts have their largest tracing effect at each layer, one panel for each number of restored layers."""
    windows = study.settings.windows
    with style():
        about = f"Layers with the largest tracing effect, {counted(len(study.facts))}, by restored layers."
        drawing = blank((_PANEL[0] * len(windows), _PANEL[1]), about, layout="constrained")
        panels = drawing.figure.subplots(1, len(windows), sharey=True, squeeze=False)[0]
        for axes, window in zip(panels, windows, strict=True):
            counts = [0] * study.n_layers
            for fact in study.facts:
                own = list(fact.effects[window])
                counts[own.index(max(own))] += 1
            axes.bar(range(study.n_layers), counts, width=0.8, color=PALETTE["series-2"])
            axes.grid(axis="y")
            axes.set(title=f"window {window}", xlabel="layer")
            axes.set_xticks(range(0, study.n_layers, 5 if study.n_layers > 10 else 1))
        panels[0].set_ylabel("facts")
        panels[0].yaxis.get_major_locator().set_params(integer=True)
    return drawing


def score_lines(study: LocalizationStudy, score: Score) -> Drawing:
    """The mean score by layer, one panel for each problem and one line for each method, with 95 % intervals."""
    panels = []
    for problem in study.settings.problems:
        lines = [
            _line(method, study.by_layer(problem, method, score), series) for series, method in enumerate(study.methods)
        ]
        if any(math.isfinite(y) for line in lines for _, y in line.points):
            panels.append(Panel(TITLES[problem], lines, _layers(study), Axis(f"{score} score", limits=(0.0, 1.0))))
    columns = min(_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    drawing = line_chart(
        panels, (_PANEL[0] * columns, _PANEL[1] * rows + 30), columns, legend_columns=max(1, len(study.methods))
    )
    for axes in drawing.figure.axes[len(panels) :]:  # the grid's last row may not be full
        axes.set_axis_off()
    return drawing


def against_effects(study: LocalizationStudy, problem: Problem, method: str) -> Drawing:
    """The rewrite score of every edit against its fact's tracing effect there, one panel for each layer, with a fit.

    The line is that of least squares; a layer at which all effects are the same has none.
    """
    columns = min(4, len(study.layers))
    rows = math.ceil(len(study.layers) / columns)
    with style():
        about = f"{TITLES[problem]}, {method}: rewrite score against tracing effect, by layer."
        drawing = blank((200 * columns, 190 * rows), about, layout="constrained")
        grid = drawing.figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axes in list(grid.flat)[len(study.layers) :]:
            axes.set_axis_off()
        for axes, layer in zip(grid.flat, study.layers, strict=False):
            _scatter(drawing, axes, study, [cell for cell in study.of(problem, method) if cell.layer == layer])
            axes.set_title(f"layer {layer}")
        for axes in grid[-1]:
            axes.set_xlabel("tracing effect")
        for axes in grid[:, 0]:
            axes.set_ylabel("rewrite score")
    return drawing


def r2_bars(regressions: Sequence[Regression]) -> Drawing:
    """R² of the rewrite score by layer, by tracing effect, and by both; one panel a method, one group a problem."""
    methods = list(dict.fromkeys(each.method for each in regressions))
    problems = list(dict.fromkeys(each.problem for each in regressions))
    with style():
        about = "R² of the rewrite score, explained by the layer of the edit, the tracing effect there, and both."
        width = max(_PANEL[0], 110 * len(problems))
        drawing = blank((width * len(methods), _PANEL[1] + 30), about, layout="constrained")
        panels = drawing.figure.subplots(1, len(methods), sharey=True, squeeze=False)[0]
        for axes, method in zip(panels, methods, strict=True):
            own = {each.problem: each for each in regressions if each.method == method}
            for series, (name, label) in enumerate(_R2.items()):
                places = [i + (series - 1) * 0.27 for i in range(len(problems))]
                heights = [getattr(own[problem], name) for problem in problems]
                axes.bar(places, heights, width=0.25, color=PALETTE[f"series-{series}"], label=label)
            axes.set(title=method, ylim=(0, 1))
            axes.set_xticks(range(len(problems)), problems)
            axes.grid(axis="y")
        panels[0].set_ylabel("R²")
        drawing.figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(_R2))
    return drawing


def drawings(study: LocalizationStudy) -> dict[str, Drawing]:
    """All figures of a study by name.

    Raises:
        MissingPackageError: statsmodels, which the regressions need, is not installed.
    """
    found = {"effects": effect_lines(study), "peaks": peaks(study), "rewrite": score_lines(study, "rewrite")}
    if any(study.scores(cell).overall is not None for cell in study.cells):
        found["overall"] = score_lines(study, "overall")
    for problem in study.settings.problems:
        for method in study.methods:
            found[f"{problem}-{method}"] = against_effects(study, problem, method)
    found["r2"] = r2_bars(study.regressions())
    return found


def save_figures(study: LocalizationStudy, folder: Path) -> list[Path]:
    """Write all figures of a study, each as .svg and as .png, and return their files.

    Raises:
        MissingPackageError: statsmodels, which the regressions need, is not installed.
    """
    files = []
    for name, drawing in drawings(study).items():
        for suffix in ("svg", "png"):
            files.append(folder / f"{name}.{suffix}")
            save(drawing, files[-1])
    return files


def _line(name: str, means: dict[int, Mean], series: int) -> Line:
    points = [(float(layer), mean.value) for layer, mean in means.items()]
    return Line(name, points, series, half_widths={float(layer): mean.half_width for layer, mean in means.items()})


def _layers(study: LocalizationStudy) -> Axis:
    return Axis("layer", limits=(-0.5, study.n_layers - 0.5), whole=True)


def _scatter(drawing: Drawing, axes: Any, study: LocalizationStudy, cells: Sequence[Cell]) -> None:
    points = [(study.effect(cell), study.scores(cell).rewrite) for cell in cells]
    titles = [study.facts[cell.fact].fact for cell in cells]
    x, y = np.array(points).T
    axes.set_ylim(-0.03, 1.03)
    draw_marks(drawing, axes, points, 0, titles)
    if np.ptp(x) > 0:
        slope, start = np.polyfit(x, y, 1)
        ends = np.array([x.min(), x.max()])
        axes.plot(ends, start + slope * ends, color=PALETTE["series-1"], linewidth=1.5)
    axes.grid(axis="y")
