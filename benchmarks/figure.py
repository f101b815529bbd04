"""One figure for the ops: how many times faster each is than what one would call instead."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightedit.files import whole_file

_MARKERS = "os^Dv<>Pp*"


def draw(path: Path, cases: Sequence[Mapping[str, Any]], title: str) -> None:
    """Draw one line for each case, with a mark for the ratio to each of its baselines, as SVG.

    Args:
        path: the file, which appears complete or not at all.
        cases: the figures of the row "ops".
        title: such as the machine.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    baselines = list(dict.fromkeys(name for case in cases for name in case["ratios"]))
    figure = Figure(figsize=(9, 1.6 + 0.26 * len(cases)), layout="constrained")
    axes = figure.subplots()
    for index, name in enumerate(baselines):
        points = [(case["ratios"][name], row) for row, case in enumerate(cases) if name in case["ratios"]]
        axes.plot(*zip(*points, strict=True), _MARKERS[index % len(_MARKERS)], color=f"C{index % 10}", label=name)
    axes.axvline(1, color="0.4", linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.set_yticks(range(len(cases)), [f"{case['op']}, {case['shape']}" for case in cases], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("times as fast as")
    axes.set_title(title, fontsize=9)
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize=7, frameon=False)
    content = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "lightedit"}):
        figure.savefig(content, format="svg", metadata={"Date": None})
    with whole_file(path) as unfinished:
        unfinished.write_bytes(content.getvalue())
