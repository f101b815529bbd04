"""One figure for the ops: how many times faster each is than what one would call instead."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightedit.figures import Axis, Line, Panel, line_chart, save

_WIDTH, _ROW, _REST = 860, 20, 130  # points


def draw(path: Path, cases: Sequence[Mapping[str, Any]], title: str) -> None:
    """Draw one row for each case, with a mark for the ratio to each of its baselines.

    Args:
        path: the .svg file, which appears complete or not at all.
        cases: the figures of the row "ops".
        title: such as the machine.
    """
    last = len(cases) - 1
    lines = [Line("equally fast", [(1.0, -0.5), (1.0, last + 0.5)], None, marks=False)]
    for series, name in enumerate(dict.fromkeys(name for case in cases for name in case["ratios"])):
        points = [(case["ratios"][name], row) for row, case in enumerate(cases) if name in case["ratios"]]
        lines.append(Line(name, points, series, style=None))
    rows = {float(row): f"{case['op']}, {case['shape']}" for row, case in enumerate(cases)}
    x = Axis("times as fast as", logarithmic=True)
    panel = Panel(title, lines, x, Axis(limits=(last + 0.5, -0.5), names=rows), grid="x")
    save(line_chart([panel], (_WIDTH, _REST + _ROW * len(cases)), legend_columns=2), path)
