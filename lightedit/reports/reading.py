"""The runs that a report reads, each from a folder or from the file of an evaluation."""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightedit.analysis.similarities import STATES_FILE, HiddenStates
from lightedit.analysis.trace import FILE, Trace
from lightedit.editing.artefact import Edit
from lightedit.errors import ArgumentError, MissingFileError
from lightedit.evaluation.result import Evaluation
from lightedit.runs.tables import read_table

_WAY_OUT = "give the folder of an edit (lightedit edit --out) or a JSON file of scores (lightedit evaluate --out)"

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class ReportedRun:
    """The known parts of one run; unknown parts are None or empty.

    Attributes:
        name: the run's name in the report, different from those of other runs.
        edit: the edit.
        before: scores of the unedited model.
        after: scores of the edited model, or the only scores that are known.
        retention: rows of retention.csv, see `EditModule`.
        health: rows of health.csv, see `Health`.
        trace: a causal trace.
        hidden_states: a study of hidden states.
    """

    name: str
    edit: Edit | None = None
    before: Evaluation | None = None
    after: Evaluation | None = None
    retention: Sequence[dict[str, Any]] = ()
    health: Sequence[dict[str, Any]] = ()
    trace: Trace | None = None
    hidden_states: HiddenStates | None = None


def read_runs(paths: Sequence[str | Path]) -> list[ReportedRun]:
    """Read runs. Each path is one of these:

    - a folder with an edit (edit.json and edit.safetensors), with evaluations of the model before and after it
      (before.json, after.json), with tables of a log (retention.csv, health.csv), with a causal trace (trace.json), or
      with a study of hidden states (hidden_states.json). Any of these may be missing;
    - the JSON file of one evaluation, which may include the unedited model's;
    - a folder of such JSON files, which stands for all of them.

    Raises:
        MissingFileError: a path does not exist.
        ArgumentError: no path is given, one is given twice, holds no run, or is damaged.
    """
    if not paths:
        raise ArgumentError(f"runs: none given; {_WAY_OUT}")
    places = [place for path in paths for place in _places(Path(path))]
    for place, times in Counter(place.resolve() for place in places).items():
        if times > 1:
            raise ArgumentError(f"{place} is given {times} times; give each run once")
    return [_read(place, name) for place, name in zip(places, _names(places), strict=True)]


def _places(path: Path) -> list[Path]:
    """The path itself, or the JSON files of a folder of evaluations."""
    if not path.exists():
        raise MissingFileError(f"{path}: there is no such run; {_WAY_OUT}")
    known = ("edit.json", "before.json", "after.json", "retention.csv", "health.csv", FILE, STATES_FILE)
    if path.is_file() or any((path / name).is_file() for name in known):
        return [path]
    files = sorted(path.glob("*.json"))
    if not files:
        raise ArgumentError(f"{path} holds no run: none of {', '.join(known)}, and no scores; {_WAY_OUT}")
    return files


def _names(places: Sequence[Path]) -> list[str]:
    """The last part of each path, preceded by as many parts as make the names different."""
    resolved = [place.resolve() for place in places]
    parts = [(place.with_suffix("") if place.is_file() else place).parts for place in resolved]
    for count in range(1, max(map(len, parts))):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(place) for place in places]


def _read(place: Path, name: str) -> ReportedRun:
    if place.is_file():
        after, before = Evaluation.load_with_before(place)
        return ReportedRun(name, before=before, after=after)
    edit = Edit.load(place) if (place / "edit.json").is_file() else None
    return ReportedRun(
        name,
        edit,
        _evaluation(place, "before"),
        _evaluation(place, "after"),
        _table(place / "retention.csv", edit),
        _table(place / "health.csv", edit),
        Trace.load(place) if (place / FILE).is_file() else None,
        HiddenStates.load(place) if (place / STATES_FILE).is_file() else None,
    )


def _evaluation(folder: Path, name: str) -> Evaluation | None:
    file = folder / f"{name}.json"
    return Evaluation.load(file) if file.is_file() else None


def _table(file: Path, edit: Edit | None) -> Rows:
    """The rows of a table, without those of rounds that were rolled back, which are not in the edit."""
    try:
        return read_table(file, sys.maxsize if edit is None else len(edit.rounds))
    except (ValueError, LookupError, AttributeError) as error:
        raise ArgumentError(f"{file} is damaged ({error!r}); correct or delete it") from error
