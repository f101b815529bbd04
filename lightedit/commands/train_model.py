"""`lightedit train-model`."""

from pathlib import Path

import lightedit as le
from lightedit.errors import ArgumentError

_SETTINGS = le.TrainingSettings()
_SIZE = le.T5Size()


def train_model(
    examples: Path,
    out: Path,
    encoder: str | None = None,
    size: le.T5Size = _SIZE,
    settings: le.TrainingSettings = _SETTINGS,
    limit: int | None = None,
) -> None:
    """Train a small model to edit: a classifier on an encoder, or without one a T5 that is made from the examples.

    A T5 learns from the start, so give it more epochs and a higher learning rate, such as --settings.epochs 60
    --settings.lr 1e-3.

    Args:
        examples: a file of claims, of texts with labels, or of questions with answers.
        out: a new folder for the model and its tokenizer.
        encoder: the folder or Hub id of an encoder such as BERT; leave it out for a T5.
        size: sizes of the T5.
        settings: how the model is trained.
        limit: use only this many first examples.
    """
    if out.exists():
        raise ArgumentError(f"--out {out} exists already; name a new folder for the model")
    read = le.read_examples(examples, limit)
    if encoder is None:
        lm, fitted = le.train_t5(read, out, size=size, settings=settings)
    else:
        lm, fitted = le.train_classifier(encoder, read, out, settings=settings)
    held_out = "" if fitted.held_out is None else f", {fitted.held_out:.1%} of those held out"
    print(f"{lm!r} gives {fitted.trained:.1%} of the trained answers{held_out}; saved in {out}")
