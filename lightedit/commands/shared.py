"""Functions that several commands share."""

from collections.abc import Sequence
from pathlib import Path

import lightedit as le
from lightedit.data.fact import served_as
from lightedit.methods.needs import covariance_for
from lightedit.runs.folder import locked, remove_run


def remove_runs(run: Path) -> None:
    """Delete what a command has stored in its .run folder: rounds or scores, and scores before and after."""
    for folder in (run / "before", run / "after", run):
        if folder.is_dir():
            with locked(folder):  # another process may use it
                remove_run(folder)
            remove_run(folder)  # and the folder, where a lock kept it


def read_served(
    path: Path,
    limit: int | None = None,
    format: str | None = None,
    *,
    chat: bool,
    end_turn: bool,
    separator: str | None,
) -> list[le.Fact]:
    """The facts of a file, served as the options --chat, --end_turn and --separator say."""
    return served_as(le.read_facts(path, limit, format), chat=chat, end_turn=end_turn, separator=separator)


def covariance_of(model: le.LanguageModel, methods: Sequence[le.Method], folder: Path | None) -> le.Covariance | None:
    """The covariance in `folder`, or without a folder an estimate for `methods`; None if they need none."""
    for method in methods:
        method.check(model)
    if not any(method.covariance_places for method in methods):
        if folder is not None:
            raise le.CovarianceError(f"--covariance {folder}: no method here needs one; leave it out")
        return None
    return covariance_for(model, methods) if folder is None else le.Covariance.load(folder)
