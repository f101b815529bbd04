"""The figure of sequential edits in docs/results.md, from their retention tables: `python -m benchmarks.sequence`."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.run import RESULTS
from lightedit.files import whole_file

# name in the figure -> its table, which is the retention.csv of a run
TABLES = {
    "AlphaEdit": "sequence_alphaedit.csv",
    "ENCORE": "sequence_encore.csv",
    "MEMIT": "sequence_memit.csv",
    "EMMET": "sequence_emmet.csv",
}
_MARKERS = "osD^"


def read_retention(path: Path, score: str = "S") -> dict[int, list[tuple[int, float]]]:
    """After which round -> (round whose facts are scored, their score) of a retention.csv, in order."""
    found: dict[int, list[tuple[int, float]]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            found.setdefault(int(row["round"]), []).append((int(row["origin"]), float(row[score])))
    return found


def draw(path: Path, tables: Mapping[str, Mapping[int, Sequence[tuple[int, float]]]], score: str = "S") -> None:
    """Draw, for each validation, one line a method over the rounds whose facts were scored, as SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    rounds = sorted({round_ for table in tables.values() for round_ in table})
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    panels = figure.subplots(1, len(rounds), sharey=True, squeeze=False)[0]
    for panel, round_ in zip(panels, rounds, strict=True):
        for index, (name, table) in enumerate(tables.items()):
            label = name if round_ == rounds[0] else None
            panel.plot(*zip(*table[round_], strict=True), marker=_MARKERS[index], color=f"C{index}", label=label)
        panel.set_title(f"after round {round_}", fontsize=10)
        panel.set_xlabel("round in which the facts were written")
        panel.set_xticks([origin for origin, _ in next(iter(tables.values()))[round_]])
        panel.grid(axis="y", alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(f"{score} of those facts, in %")
    figure.legend(loc="outside lower center", ncols=len(tables), frameon=False)
    content = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "lightedit"}):
        figure.savefig(content, format="svg", metadata={"Date": None})
    with whole_file(path) as unfinished:
        unfinished.write_bytes(content.getvalue())


if __name__ == "__main__":
    draw(RESULTS / "sequence.svg", {name: read_retention(RESULTS / file) for name, file in TABLES.items()})
