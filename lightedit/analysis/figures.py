"""Figures of causal tracing: heat maps of one fact and of averages, averages by layer, and severed paths."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightedit.analysis.averages import ANY, Mean
from lightedit.analysis.settings import SEVERED
from lightedit.analysis.trace import FactTrace, Trace
from lightedit.data.words import counted
from lightedit.figures import PALETTE, Drawing, blank, save, style

TITLES = {"state": "Restored state", "mlp": "Restored MLP", "attention": "Restored attention"}
# of the published figures: purple states, green MLPs, red attentions
_HUES = {"state": "series-5", "mlp": "series-2", "attention": "series-1"}
_BELOW = "faint"  # of negative effects
_ROLES = {
    "first subject": "first subject token",
    "middle subject": "middle subject tokens",
    "last subject": "last subject token",
    "first after": "first token after",
    "further": "further tokens",
    "last": "last token",
    ANY: "largest of any token",
}
_ROW, _FRAME = 17, 92  # height of a row of a heat map and of what is around it, in points
_WIDTH = 330  # of one panel


def fact_map(fact: FactTrace, window: int) -> Drawing:
    """Heat maps of one fact, one for each kind: tokens by layers, coloured by the indirect effect.

    Tokens of the subject are starred. Positive effects have the colour of the kind, negative ones are grey.
    """
    first, stop = fact.subject
    names = [f"{token}*" if first <= i < stop else token for i, token in enumerate(fact.tokens)]
    grids = {
        kind: [fact.effects(kind, position) for position in fact.p_restored[kind]]
        for kind in TITLES
        if kind in fact.p_restored
    }
    shown = [names[position] for position in next(iter(fact.p_restored.values()))]
    about = f"Indirect effects on p({fact.answer.strip()}) after {fact.fact!r}: P {fact.p_clean:.3f}, corrupted "
    return _maps(grids, shown, window, f"{about}{fact.p_corrupted:.3f}.", apart=True)


def average_map(trace: Trace) -> Drawing:
    """Heat maps of the average indirect effect, one for each kind on one scale: classes of tokens by layers."""
    averages = {kind: trace.averages(kind) for kind in TITLES if kind in trace.kinds}
    roles = [role for role in _ROLES if role != ANY and role in next(iter(averages.values()))]
    grids = {kind: [[mean.value for mean in own[role]] for role in roles] for kind, own in averages.items()}
    about = f"Average indirect effects over {counted(len(trace.facts))}, by layer and class of token."
    return _maps(grids, [_ROLES[role] for role in roles], trace.settings.window, about, apart=False)


def average_lines(trace: Trace) -> Drawing:
    """The average indirect effect by layer, one line for each class of token, with 95 % bands; one panel a kind."""
    averages = {kind: trace.averages(kind) for kind in TITLES if kind in trace.kinds}
    roles = [role for role in _ROLES if role != ANY and any(role in own for own in averages.values())]
    with style():
        about = f"Average indirect effects over {counted(len(trace.facts))} by layer, with 95 % intervals."
        drawing = blank((_WIDTH * len(averages), 270), about, layout="constrained")
        panels = drawing.figure.subplots(1, len(averages), sharey=True, squeeze=False)[0]
        for axes, (kind, own) in zip(panels, averages.items(), strict=True):
            for role in (role for role in roles if role in own):
                _band(axes, own[role], f"series-{roles.index(role)}", _ROLES[role])
            axes.axhline(0, color=PALETTE["faint"], linewidth=0.8)
            axes.grid(axis="y")
            _layers(axes, trace.n_layers, _title(kind, trace.settings.window))
        panels[0].set_ylabel("average indirect effect")
        drawing.figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return drawing


def severed_bars(trace: Trace) -> Drawing:
    """The average indirect effect of states of the last subject token: as usual, and with severed paths. Bars a layer.

    Ends of a stroke are those of the 95 % interval.
    """
    names = {"state": "no path severed", SEVERED["attention"]: "attention severed", SEVERED["mlp"]: "MLP severed"}
    hues = {"state": "series-5", SEVERED["attention"]: "series-1", SEVERED["mlp"]: "series-2"}
    with style():
        about = f"Indirect effects of the last subject token's states over {counted(len(trace.facts))}, paths severed."
        drawing = blank((2 * _WIDTH, 260), about, layout="constrained")
        axes = drawing.figure.subplots()
        for index, kind in enumerate(name for name in names if name in trace.kinds):
            means = trace.averages(kind)["last subject"]
            places = [layer + (index - 1) * 0.27 for layer in range(len(means))]
            heights = [mean.value for mean in means]
            axes.bar(places, heights, width=0.25, color=PALETTE[hues[kind]], label=names[kind])
            for place, mean in zip(places, means, strict=True):
                ends = [mean.value - mean.half_width, mean.value + mean.half_width]
                axes.plot([place, place], ends, color=PALETTE["text"], linewidth=0.7)
        axes.axhline(0, color=PALETTE["faint"], linewidth=0.8)
        axes.grid(axis="y")
        _layers(axes, trace.n_layers, "Restored state of the last subject token")
        axes.set_ylabel("average indirect effect")
        drawing.figure.legend(loc="outside lower center", ncols=3)
    return drawing


def drawings(trace: Trace, facts: int = 3) -> dict[str, Drawing]:
    """All figures of a trace by name: averages, severed paths, and heat maps of the first `facts` facts."""
    found: dict[str, Drawing] = {}
    by_class = trace.settings.tokens == "all"
    if by_class:
        found["averages"] = average_map(trace)
    found["layers"] = average_lines(trace)
    if set(SEVERED.values()) & set(trace.kinds) and "state" in trace.kinds and _has_last_subject(trace):
        found["severed"] = severed_bars(trace)
    if by_class:
        for number, fact in enumerate(trace.facts[:facts], start=1):
            found[f"fact-{number}"] = fact_map(fact, trace.settings.window)
    return found


def save_figures(trace: Trace, folder: Path, facts: int = 3) -> list[Path]:
    """Write all figures of a trace, each as .svg and as .png, and return their files."""
    files = []
    for name, drawing in drawings(trace, facts).items():
        for suffix in ("svg", "png"):
            files.append(folder / f"{name}.{suffix}")
            save(drawing, files[-1])
    return files


def _has_last_subject(trace: Trace) -> bool:
    return all("last subject" in trace.averages(kind) for kind in ("state", *SEVERED.values()))


def _maps(
    grids: Mapping[str, Sequence[Sequence[float]]], rows: Sequence[str], window: int, about: str, apart: bool
) -> Drawing:
    """One heat map a kind side by side, each with its own scale (`apart`) or all with one."""
    tops = {kind: max((abs(x) for row in grid for x in row), default=0.0) or 1.0 for kind, grid in grids.items()}
    if not apart:
        tops = dict.fromkeys(tops, max(tops.values()))
    with style():
        drawing = blank((_WIDTH * len(grids), _FRAME + _ROW * len(rows)), about, layout="constrained")
        panels = drawing.figure.subplots(1, len(grids), sharey=True, squeeze=False)[0]
        for axes, (kind, grid) in zip(panels, grids.items(), strict=True):
            for y, row in enumerate(grid):
                for x, value in enumerate(row):
                    draw_cell(axes, x, y, value, tops[kind], _HUES[kind])
            axes.set(xlim=(-0.5, len(grid[0]) - 0.5), ylim=(len(rows) - 0.5, -0.5))
            axes.set_yticks(range(len(rows)), rows)
            _layers(axes, len(grid[0]), f"{_title(kind, window)}, 0 to {tops[kind]:.2g}")
    return drawing


def draw_cell(axes: Any, x: int, y: int, value: float, top: float, hue: str) -> None:
    """One cell: the hue of its sign, as opaque as its value is large. A page's dark colours then suit it, too."""
    from matplotlib.patches import Rectangle

    if math.isfinite(value) and abs(value) >= 0.004 * top:
        color = PALETTE[hue if value > 0 else _BELOW]
        axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=color, alpha=min(1.0, abs(value) / top)))


def _band(axes: Any, means: Sequence[Mean], hue: str, label: str) -> None:
    layers = range(len(means))
    axes.plot(layers, [mean.value for mean in means], color=PALETTE[hue], linewidth=1.75, label=label)
    ends = [[mean.value + sign * mean.half_width for mean in means] for sign in (-1, 1)]
    if all(map(math.isfinite, ends[0])):
        axes.fill_between(layers, *ends, color=PALETTE[hue], alpha=0.18, linewidth=0)


def _layers(axes: Any, n_layers: int, title: str) -> None:
    axes.set_xticks(range(0, n_layers, 5 if n_layers > 10 else 1))
    axes.set_xlabel("layer")
    axes.set_title(title)


def _title(kind: str, window: int) -> str:
    return TITLES[kind] if kind == "state" else f"{TITLES[kind]}, window {window}"
