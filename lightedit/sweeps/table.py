"""The table of a sweep: one row for each finished run, kept as a CSV file."""

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightedit.errors import ArgumentError
from lightedit.evaluation.result import Evaluation
from lightedit.files import whole_file
from lightedit.sweeps.plan import Run, shown

SCORES = ("ES", "PS", "NS", "S")
"""The scores by which runs are compared."""
_COLUMNS = ("ES", "PS", "NS", "EM", "PM", "NM", "S")
_GENERATION_COLUMNS = ("GE", "generation_success")
UNEDITED = "unedited"
"""The method's name in the rows of the unedited model."""

Row = dict[str, Any]


class Table:
    """Rows of finished runs. Every addition writes the whole file atomically, so the file is always complete.

    Columns:
        method, swept fields: empty where the method lacks the field.
        facts, facts_per_round: "single" where each fact was edited alone; step 2 then counts as evaluation.
        ES, PS, NS, EM, PM, NM, S: in percent; empty where the facts do not allow them.
        GE, generation_success: with `generation`; in bits times 100, and in percent.
        <score>_half_width: half the width of the score's 95 % interval.
        seconds_values, seconds_update, seconds_evaluation: of step 1 (0 if another run found the values), of step 2,
            and of the evaluation.

    Args:
        path: the file; its rows are read if it exists.
        fields: the swept fields.
        generation: whether there are columns for generation entropy and success.

    Attributes:
        rows: column -> value, one for each finished run.

    Raises:
        ArgumentError: the file has other columns or is damaged.
    """

    def __init__(self, path: Path, fields: Sequence[str], generation: bool = False) -> None:
        self.path = path
        self._key = ["method", *fields, "facts", "facts_per_round"]
        self._scores = _COLUMNS + _GENERATION_COLUMNS * generation
        self._columns = [
            *self._key,
            *self._scores,
            *(f"{name}_half_width" for name in self._scores),
            *(f"seconds_{part}" for part in ("values", "update", "evaluation")),
        ]
        self.rows: list[Row] = self._read() if path.exists() else []

    def add(
        self, run: Run | None, evaluation: Evaluation, values: float = 0.0, update: float = 0.0, scoring: float = 0.0
    ) -> None:
        """Add the row of a finished run, or of the unedited model (None), with its scores and seconds."""
        row: Row = dict.fromkeys(self._columns)
        row |= run.row if run else {"method": UNEDITED, "facts": len(evaluation.records)}
        for name in self._scores:
            if name in evaluation.scores:
                low, high = evaluation.intervals[name]
                row[name] = evaluation.scores[name]
                row[f"{name}_half_width"] = None if math.isnan(low) else (high - low) / 2
        row |= {"seconds_values": values, "seconds_update": update, "seconds_evaluation": scoring}
        self.rows.append(row)
        self._write()

    def find(self, run: Run) -> Row | None:
        """The row of `run` or of an equal run; None if it is not finished."""
        wanted = dict.fromkeys(self._key) | run.row
        return next((row for row in self.rows if all(row[name] == wanted[name] for name in self._key)), None)

    def unedited(self, facts: int) -> Row | None:
        """The row of the unedited model, scored on the first `facts`."""
        return next((row for row in self.rows if row["method"] == UNEDITED and row["facts"] == facts), None)

    def _read(self) -> list[Row]:
        with self.path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames != self._columns:
                raise ArgumentError(f"{self.path} has the columns {reader.fieldnames}, expected {self._columns}")
            try:
                return [
                    {
                        name: cell if name in self._key and _is_word(cell) else _value(name, cell)
                        for name, cell in row.items()
                    }
                    for row in reader
                ]
            except (TypeError, ValueError) as error:
                raise ArgumentError(f"{self.path} is damaged ({error}); correct the row, or delete it") from error

    def _write(self) -> None:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self._columns)
        for row in self.rows:
            writer.writerow([row["method"], *(_cell(row[name]) for name in self._columns[1:])])
        with whole_file(self.path) as unfinished:
            unfinished.write_text(text.getvalue(), encoding="utf-8")


def _is_word(value: Any) -> bool:
    """Whether it is a string that needs no quotes in the file, because it is not a JSON value."""
    return isinstance(value, str) and value.isidentifier() and value not in ("true", "false", "null", "NaN", "Infinity")


def _cell(value: Any) -> str:
    return "" if value is None else str(value) if _is_word(value) else json.dumps(value)


def _value(column: str, cell: str) -> Any:
    """The value of a cell; raises TypeError for None, which the CSV reader gives for a missing cell."""
    return cell if column == "method" else json.loads("null" if cell == "" else cell)


def best(rows: Sequence[Row]) -> list[str]:
    """For each method, a line with its best S on the largest number of facts, and the settings of that run."""
    scored = [row for row in rows if row["method"] != UNEDITED and row["S"] is not None]
    facts = max((row["facts"] for row in scored), default=0)
    lines = []
    for method in dict.fromkeys(row["method"] for row in scored):
        found = [row for row in scored if row["method"] == method and row["facts"] == facts]
        if found:
            row = max(found, key=lambda row: row["S"])
            names = list(row)[1 : list(row).index("facts")]
            settings = [f"{name}={shown(row[name])}" for name in names if row[name] is not None]
            spread = "" if row["S_half_width"] is None else f" ± {row['S_half_width']:.1f}"
            together = row["facts_per_round"]
            with_ = ", ".join([*settings, "each alone" if together == "single" else f"{together} facts a round"])
            lines.append(f"best on {facts} facts: {method}, S {row['S']:.1f}{spread}, with {with_}")
    return lines
