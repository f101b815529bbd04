"""Causal traces: where in a model facts are carried, with the figures of `lightedit trace`."""

from collections.abc import Sequence

from lightedit.analysis.figures import drawings
from lightedit.analysis.trace import Trace
from lightedit.reports.html import Html, element, scrolling_table
from lightedit.reports.inline import svg
from lightedit.reports.reading import ReportedRun

_FACTS = 3  # facts with heat maps of their own
_ABOUT = (
    "Noise at the subject's tokens lowers the answer's probability from P to P*. An indirect effect is by how much it "
    "rises again when one token's output of a block, or of the MLPs or attentions of a window of layers, is restored."
)


def traces_section(runs: Sequence[ReportedRun]) -> Html | None:
    """The figures of each trace, with its effects as a table; None if no run is a trace."""
    parts = [part for run in runs if run.trace is not None for part in _of(run.name, run.trace)]
    if not parts:
        return None
    return element("section", element("h2", "Causal tracing"), element("p", _ABOUT), *parts, id="traces")


def _of(name: str, trace: Trace) -> list[Html]:
    parts = [element("h3", element("bdi", name)), element("p", str(trace), "."), _strongest(trace)]
    for drawing in drawings(trace, _FACTS).values():
        parts.append(element("figure", element("figcaption", drawing.about), svg(drawing), class_="wide"))
    return parts


def _strongest(trace: Trace) -> Html:
    """For each kind and class of token, the layer with the largest average effect."""
    heads = ("restored", "token", "layer", "average indirect effect", "facts")
    rows = [element("tr", *(element("th", head, scope="col") for head in heads))]
    for kind in trace.kinds:
        for role, means in trace.averages(kind).items():
            layer = max(range(len(means)), key=lambda i: means[i].value)
            cells = (kind, role, str(layer), str(means[layer]), str(means[layer].facts))
            rows.append(element("tr", *(element("td", cell) for cell in cells)))
    table = scrolling_table("Layers with the largest average indirect effects", *rows)
    return element("details", element("summary", "Layers with the largest effects"), table)
