"""The figure of sequential edits in docs/results.md, from their retention tables: `python -m benchmarks.sequence`."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.run import RESULTS
from lightedit.figures import Axis, Line, Panel, line_chart, save

# name in the figure -> its table, which is the retention.csv of a run
TABLES = {
    "AlphaEdit": "sequence_alphaedit.csv",
    "ENCORE": "sequence_encore.csv",
    "MEMIT": "sequence_memit.csv",
    "EMMET": "sequence_emmet.csv",
}


def read_retention(path: Path, score: str = "S") -> dict[int, list[tuple[int, float]]]:
    """After which round -> (round whose facts are scored, their score) of a retention.csv, in order."""
    found: dict[int, list[tuple[int, float]]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            found.setdefault(int(row["round"]), []).append((int(row["origin"]), float(row[score])))
    return found


def draw(path: Path, tables: Mapping[str, Mapping[int, Sequence[tuple[int, float]]]], score: str = "S") -> None:
    """Draw, for each validation, one line a method over the rounds whose facts were scored, as an .svg file."""
    panels: list[Panel] = []
    for round_ in sorted({round_ for table in tables.values() for round_ in table}):
        lines = [Line(name, table[round_], series) for series, (name, table) in enumerate(tables.items())]
        y = Axis("" if panels else f"{score} of those facts, in %", (0, 100))
        origins = {float(origin): str(origin) for table in tables.values() for origin, _ in table[round_]}
        x = Axis("round in which the facts were written", names=origins)
        panels.append(Panel(f"after round {round_}", lines, x, y))
    save(line_chart(panels, (720, 280), columns=len(panels), legend_columns=len(tables)), path)


if __name__ == "__main__":
    draw(RESULTS / "sequence.svg", {name: read_retention(RESULTS / file) for name, file in TABLES.items()})
