"""Tables of numbers as CSV files."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning import Trainer

from lightedit.files import whole_file


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write `rows` as a CSV file, completely or not at all.

    There is one column for each name, in order of first occurrence. A cell is empty if its row lacks the name. Missing
    parent folders of `path` are created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as unfinished, unfinished.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        table.writeheader()
        table.writerows(rows)


def read_table(path: Path, rounds: int) -> list[dict[str, Any]]:
    """Read the rows that `write_table` wrote, up to the "round" `rounds`, as numbers. No file gives an empty list."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        rows = [{name: _number(text) for name, text in row.items() if text} for row in csv.DictReader(file)]
    return [row for row in rows if row["round"] <= rounds]


def _number(text: str) -> float:
    return int(text) if text.isdigit() else float(text)


def log_folder(trainer: Trainer) -> Path | None:
    """The folder of a trainer's first logger. None without a logger, and in all processes but the first."""
    folder = trainer.log_dir if trainer.loggers else None  # without a logger, log_dir is the working directory
    return Path(folder) if folder and trainer.is_global_zero else None
