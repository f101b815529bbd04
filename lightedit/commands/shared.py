"""What several commands do."""

from collections.abc import Sequence
from pathlib import Path

import lightedit as le
from lightedit.runs.folder import locked, remove_run


def remove_runs(run: Path) -> None:
    """Delete what a command has kept in its folder: rounds or scores, and scores before and after."""
    for folder in (run / "before", run / "after", run):
        if folder.is_dir():
            with locked(folder):  # another process may be at work there
                remove_run(folder)


def covariance_of(model: le.LanguageModel, methods: Sequence[le.Method], folder: Path | None) -> le.Covariance:
    """What `folder` holds, or without one an estimate of all that `methods` need."""
    matrices = {matrix for method in methods for matrix in method.places}
    model.check_layers(sorted({matrix.layer for matrix in matrices}))
    if folder is not None:
        return le.Covariance.load(folder)
    return le.estimate_covariance(model, sorted(matrices), cache=True)
