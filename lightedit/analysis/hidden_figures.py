"""The figure of the study of hidden states: cosine and Jaccard similarity by layer."""

import math
from pathlib import Path

from lightedit.analysis.similarities import NAMES, SUBLAYERS, HiddenStates, Measure
from lightedit.data.words import counted
from lightedit.figures import Axis, Drawing, Line, Panel, line_chart, save

_SIZE = (720, 300)  # points
_LABELS: dict[Measure, str] = {"cosine": "cosine", "jaccard": "Jaccard"}


def hidden_states_figure(found: HiddenStates) -> Drawing:
    """Two panels by layer, a line for attention and one for MLP: mean over prompts, with 95 % intervals."""
    titles: dict[Measure, str] = {
        "cosine": "Cosine of what enters and leaves",
        "jaccard": f"Jaccard similarity of their top {found.settings.top} tokens",
    }
    panels = [_panel(found, measure, title) for measure, title in titles.items()]
    drawing = line_chart(panels, _SIZE, columns=2, legend_columns=2)
    drawing.about += f" Means over {counted(len(found.prompts), 'prompt')} in {found.model}, with 95 % intervals."
    return drawing


def save_hidden_states_figure(found: HiddenStates, folder: Path) -> list[Path]:
    """Write the figure as hidden_states.svg and hidden_states.png, and return the files."""
    files = [folder / f"hidden_states.{suffix}" for suffix in ("svg", "png")]
    for file in files:
        save(hidden_states_figure(found), file)
    return files


def _panel(found: HiddenStates, measure: Measure, title: str) -> Panel:
    lines = []
    ends = [0.0]
    for series, part in enumerate(SUBLAYERS):
        means = found.means(measure, part)
        points = [(layer, mean.value) for layer, mean in enumerate(means)]
        widths: dict[float, float] = {layer: mean.half_width for layer, mean in enumerate(means)}
        lines.append(Line(NAMES[part], points, series, series, widths))
        halves = [0.0 if math.isnan(mean.half_width) else mean.half_width for mean in means]
        ends += [mean.value + sign * half for mean, half in zip(means, halves, strict=True) for sign in (-1, 1)]
    low = 0.0 if measure == "jaccard" else math.floor(10 * min(ends)) / 10
    high = math.ceil(10 * max(*ends, 0.01)) / 10  # whole intervals are seen
    return Panel(title, lines, Axis("layer", whole=True), Axis(_LABELS[measure], (low, high)))
