"""Figures of knowledge neurons: how many there are in each layer, and what each layer accounts for in each fact."""

from pathlib import Path

from lightedit.analysis.figures import draw_cell
from lightedit.analysis.found_neurons import Neurons
from lightedit.data.words import counted
from lightedit.figures import PALETTE, Drawing, blank, save, style

_HUE = "series-2"  # of MLPs, as in causal tracing
_FACTS = 40  # most facts of the heat map
_ROW, _FRAME, _WIDTH = 15, 80, 560  # height of its rows and of what is around them, width, in points
_LABEL = 46  # most characters of a fact's text
_LAYERS = 10  # with more layers, every fifth is named


def layers_figure(found: Neurons) -> Drawing:
    """Bars: the neurons of all facts in each layer that was searched."""
    with style():
        about = f"Neurons of {counted(len(found.facts))} in {found.model} by layer; one of two facts counts twice."
        drawing = blank((_WIDTH, 240), about, layout="constrained")
        axes = drawing.figure.subplots()
        axes.bar(found.layers, found.by_layer, width=0.8, color=PALETTE[_HUE])
        axes.grid(axis="y")
        axes.set(xlabel="layer", ylabel="neurons of facts", title="Knowledge neurons by layer")
        axes.set_xticks(_ticks(found.layers))
        axes.yaxis.get_major_locator().set_params(integer=True)
    return drawing


def attribution_map(found: Neurons) -> Drawing:
    """Heat map: facts by layers, coloured by the sum of all attributions of the layer. Negative sums are grey."""
    facts = found.facts[:_FACTS]
    top = max((abs(value) for fact in facts for value in fact.by_layer), default=0.0) or 1.0
    with style():
        about = f"Sum of the attributions of each layer's neurons, for {counted(len(facts))} in {found.model}."
        drawing = blank((_WIDTH + 8 * len(found.layers), _FRAME + _ROW * len(facts)), about, layout="constrained")
        axes = drawing.figure.subplots()
        for y, fact in enumerate(facts):
            for x, value in enumerate(fact.by_layer):
                draw_cell(axes, x, y, value, top, _HUE)
        axes.set(xlim=(-0.5, len(found.layers) - 0.5), ylim=(len(facts) - 0.5, -0.5), xlabel="layer")
        axes.set_yticks(range(len(facts)), [_label(f"{fact.fact} →{fact.answer}") for fact in facts])
        named = _ticks(found.layers)
        axes.set_xticks([found.layers.index(layer) for layer in named], [str(layer) for layer in named])
        axes.set_title(f"Attributions of each layer, 0 to {top:.2g}")
    return drawing


def save_neuron_figures(found: Neurons, folder: Path) -> list[Path]:
    """Write both figures, as .svg and as .png, and return their files."""
    files = []
    for name, drawing in (("layers", layers_figure(found)), ("attributions", attribution_map(found))):
        for suffix in ("svg", "png"):
            files.append(folder / f"{name}.{suffix}")
            save(drawing, files[-1])
    return files


def _ticks(layers: tuple[int, ...]) -> list[int]:
    return list(layers) if len(layers) <= _LAYERS else list(layers[::5])


def _label(text: str) -> str:
    return text if len(text) <= _LABEL else f"…{text[1 - _LABEL :]}"
