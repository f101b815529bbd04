"""Functions that several commands share."""

import sys
from collections.abc import Sequence
from pathlib import Path

import lightedit as le
from lightedit.data.fact import served_as
from lightedit.data.words import counted
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


def say_saved(model: le.LanguageModel, edit: le.Edit, folder: Path, way: str) -> None:
    """Say where an edit is saved, and if its facts were all written as plain text into a model with a chat template.

    Args:
        model: the model.
        edit: the edit.
        folder: where it is saved.
        way: what writes the facts in the template.
    """
    print(f"saved the edit of {counted(len(edit.facts))} in {folder}")
    if model.tokenizer.chat_template and not any(fact.chat for fact in edit.facts):
        print(
            f"note: {model.name} has a chat template, and all facts are written as plain text. Asked in a chat, it may "
            f"not state them; {way} writes them in the template",
            file=sys.stderr,
        )


def covariance_of(model: le.LanguageModel, methods: Sequence[le.Method], folder: Path | None) -> le.Covariance | None:
    """The covariance in `folder`, or without a folder an estimate for `methods`; None if they need none."""
    for method in methods:
        method.check(model)
    if not any(method.covariance_places for method in methods):
        if folder is not None:
            raise le.CovarianceError(f"--covariance {folder}: no method here needs one; leave it out")
        return None
    return covariance_for(model, methods) if folder is None else le.Covariance.load(folder)
