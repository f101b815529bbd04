"""Studies of hidden states: what enters against what leaves attention and MLP, with the figure of the command."""

from collections.abc import Sequence

from lightedit.analysis.hidden_figures import hidden_states_figure
from lightedit.analysis.similarities import HiddenStates
from lightedit.reports.html import Html, element, scrolling_table
from lightedit.reports.inline import svg
from lightedit.reports.reading import ReportedRun

_ABOUT = (
    "At each prompt's last token, what enters attention and MLP is compared with what leaves them: by their cosine, "
    "and by the share of their most probable vocabulary tokens that both have in common."
)
_HEADS = ("layer", "part", "cosine", "Jaccard")


def hidden_states_section(runs: Sequence[ReportedRun]) -> Html | None:
    """The figure of each study of hidden states, with its means as a table; None if no run is such a study."""
    parts = [part for run in runs if run.hidden_states is not None for part in _of(run.name, run.hidden_states)]
    if not parts:
        return None
    return element("section", element("h2", "Hidden states"), element("p", _ABOUT), *parts, id="hidden-states")


def _of(name: str, found: HiddenStates) -> list[Html]:
    drawing = hidden_states_figure(found)
    figure = element("figure", element("figcaption", drawing.about), svg(drawing), class_="wide")
    return [element("h3", element("bdi", name)), element("p", str(found), "."), figure, _table(found)]


def _table(found: HiddenStates) -> Html:
    rows = [element("tr", *(element("th", head, scope="col") for head in _HEADS))]
    for row in found.rows():
        cells = (str(row["layer"]), row["part"], f"{row['cosine']:.3f}", f"{row['jaccard']:.3f}")
        rows.append(element("tr", *(element("td", cell) for cell in cells)))
    return element("details", element("summary", "Means by layer"), scrolling_table("Means by layer", *rows))
