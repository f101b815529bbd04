"""`lightedit train-model`."""

from pathlib import Path

import lightedit as le
from lightedit.commands.shared import remove_runs
from lightedit.errors import ArgumentError
from lightedit.training.models import run_folder

_SETTINGS = le.TrainingSettings()
_SIZE = le.T5Size()


def train_model(
    examples: Path,
    out: Path,
    encoder: str | None = None,
    size: le.T5Size = _SIZE,
    settings: le.TrainingSettings = _SETTINGS,
    limit: int | None = None,
    restart: bool = False,
) -> None:
    """Train a small model to edit: a classifier on an encoder, or without one a T5 that is made from the examples.

    The same command again continues an interrupted training after its last kept epoch.

    Args:
        examples: a file of claims, of texts with labels, or of questions with answers.
        out: a new folder for the model and its tokenizer.
        encoder: the folder or Hub id of an encoder such as BERT; leave it out for a T5.
        size: sizes of the T5.
        settings: how the model is trained.
        limit: use only this many first examples.
        restart: delete what an interrupted training has stored.
    """
    if out.exists():
        raise ArgumentError(f"--out {out} exists already; name a new folder for the model")
    if encoder is not None and size != _SIZE:
        raise ArgumentError(f"--size is that of a new T5, and --encoder {encoder} has its own; leave one out")
    read = le.read_examples(examples, limit)
    if restart:
        remove_runs(run_folder(out))
    if encoder is None:
        lm, fitted = le.train_t5(read, out, size=size, settings=settings)
    else:
        lm, fitted = le.train_classifier(encoder, read, out, settings=settings)
    held_out = "" if fitted.held_out is None else f", {fitted.held_out:.1%} of those held out"
    print(f"{lm!r} gives {fitted.trained:.1%} of the trained answers{held_out}; saved in {out}")
