"""What a localisation study finds: the scores of every edit, and the regressions over them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

from lightedit.analysis.averages import Mean, mean_of
from lightedit.analysis.localization.facts import StudiedFact
from lightedit.analysis.localization.regressions import Regression, regression
from lightedit.analysis.localization.scores import Measured, Scores, scores
from lightedit.analysis.localization.settings import LocalizationSettings, Problem
from lightedit.analysis.saved import read_record, write_record
from lightedit.data.words import counted
from lightedit.runs.tables import write_table

Score = Literal["rewrite", "paraphrase", "neighborhood", "essence", "overall"]

_FORMAT = 1
FILE, TABLE, EFFECTS = "localization.json", "localization.csv", "effects.csv"


@dataclass(frozen=True)
class Cell:
    """One edit of one fact.

    Attributes:
        fact: index of the fact in the study.
        problem: what the edit is for.
        method: name of the method.
        layer: the central layer.
        before: what was measured of the fact before the edit.
        after: that after it.
    """

    fact: int
    problem: Problem
    method: str
    layer: int
    before: Measured
    after: Measured

    def to_dict(self) -> dict[str, Any]:
        """All fields by name, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        """Build it from what `to_dict` returns, also after a file."""
        return cls(**{**record, "before": Measured(**record["before"]), "after": Measured(**record["after"])})


@dataclass(frozen=True)
class LocalizationStudy:
    """Facts that were traced and edited at several layers of one model.

    Attributes:
        model: the model's name.
        n_layers: its number of layers.
        noise_level: ν.
        settings: the settings.
        layers: the edited layers.
        methods: name -> the method's settings, as JSON values.
        facts: the facts.
        cells: the edits.
        left_out: texts of the facts that the model does not know, which were not studied.
    """

    model: str
    n_layers: int
    noise_level: float
    settings: LocalizationSettings
    layers: tuple[int, ...]
    methods: Mapping[str, Any]
    facts: tuple[StudiedFact, ...]
    cells: tuple[Cell, ...]
    left_out: tuple[str, ...] = ()

    def scores(self, cell: Cell) -> Scores:
        """The scores of one edit."""
        return scores(cell.problem, cell.before, cell.after, self.settings.overall)

    def effect(self, cell: Cell) -> float:
        """The tracing effect of an edit's fact at its layer, with the settings' window."""
        return self.facts[cell.fact].effects[self.settings.effect_window][cell.layer]

    def of(self, problem: Problem, method: str) -> list[Cell]:
        """The edits for one problem with one method."""
        return [cell for cell in self.cells if (cell.problem, cell.method) == (problem, method)]

    def by_layer(self, problem: Problem, method: str, score: Score = "rewrite") -> dict[int, Mean]:
        """Layer -> the mean score of its edits over the facts that have it, with its 95 % interval."""
        found: dict[int, list[float]] = {layer: [] for layer in self.layers}
        for cell in self.of(problem, method):
            if (value := getattr(self.scores(cell), score)) is not None:
                found[cell.layer].append(value)
        return {layer: mean_of(values) for layer, values in found.items()}

    def effects_by_layer(self, window: int) -> list[Mean]:
        """The mean tracing effect of each layer of the model over facts, with its 95 % interval."""
        return [mean_of(column) for column in zip(*(fact.effects[window] for fact in self.facts), strict=True)]

    def regressions(self, score: Score = "rewrite") -> list[Regression]:
        """The regressions of a score by layer, tracing effect, and both, one for each problem and method.

        Raises:
            MissingPackageError: statsmodels is not installed.
        """
        found = []
        for problem in self.settings.problems:
            for method in self.methods:
                have = [(cell, value) for cell in self.of(problem, method)
                        if (value := getattr(self.scores(cell), score)) is not None]  # fmt: skip
                found.append(
                    regression(
                        problem,
                        method,
                        score,
                        [value for _, value in have],
                        [cell.layer for cell, _ in have],
                        [self.effect(cell) for cell, _ in have],
                        [cell.fact for cell, _ in have],
                    )
                )
        return found

    def __str__(self) -> str:
        left = f", {len(self.left_out)} that the model does not know left out" if self.left_out else ""
        means = self.effects_by_layer(self.settings.effect_window)
        peak = max(range(len(means)), key=lambda layer: means[layer].value)
        lines = [
            f"{counted(len(self.facts))} studied{left}, {counted(len(self.cells), 'edit')} at layers "
            f"{', '.join(map(str, self.layers))}; tracing effect largest at layer {peak}, {means[peak]}"
        ]
        for problem in self.settings.problems:
            for method in self.methods:
                by_layer = self.by_layer(problem, method)
                best = max(by_layer, key=lambda layer: by_layer[layer].value)
                lines.append(f"{problem}, {method}: rewrite score largest at layer {best}, {by_layer[best]}")
        return "\n".join(lines)

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows of localization.csv. A cell is empty where a fact has no text for a score."""
        for cell in self.cells:
            yield {
                "fact": self.facts[cell.fact].fact,
                "problem": cell.problem,
                "method": cell.method,
                "layer": cell.layer,
                **asdict(self.scores(cell)),
                "tracing_effect": self.effect(cell),
            }

    def effect_rows(self) -> Iterator[dict[str, Any]]:
        """The rows of effects.csv."""
        for fact in self.facts:
            for window, by_layer in fact.effects.items():
                for layer, effect in enumerate(by_layer):
                    yield {"fact": fact.fact, "window": window, "layer": layer, "tracing_effect": effect}

    def save(self, folder: str | Path) -> Path:
        """Write localization.json, which `load` reads, localization.csv, one row an edit, and effects.csv.

        Returns:
            The folder.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_table(folder / TABLE, list(self.rows()))
        write_table(folder / EFFECTS, list(self.effect_rows()))
        write_record(folder / FILE, _FORMAT, asdict(self))
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            MissingFileError: the folder holds no localization.json.
            ArgumentError: the file is damaged or of another version.
        """
        with read_record(Path(folder) / FILE, _FORMAT, "localization", "repeat the study") as record:
            read = {
                "settings": LocalizationSettings(**record["settings"]),
                "facts": tuple(StudiedFact.from_dict(fact) for fact in record["facts"]),
                "cells": tuple(Cell.from_dict(cell) for cell in record["cells"]),
                "layers": tuple(record["layers"]),
                "left_out": tuple(record["left_out"]),
            }
            return cls(**{**record, **read})


SCORES: Sequence[Score] = get_args(Score)
"""The scores of an edit."""
