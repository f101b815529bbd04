"""The settings of a training."""

from dataclasses import dataclass, replace

from lightedit.errors import ArgumentError


@dataclass(frozen=True)
class TrainingSettings:
    """How a small model is trained.

    Attributes:
        epochs: most passes over the examples; None for 4 of a classifier and 60 of a T5, which learns from the start.
        lr: AdamW's learning rate at its highest, after a warm-up over a tenth of the steps; it then falls to 0. None
            for 5e-5 of a classifier and 1e-3 of a T5.
        batch_size: examples of one step.
        weight_decay: AdamW's weight decay.
        held_out: share of the examples that are not trained on, but measured after each epoch; 0 for none.
        enough: training ends after an epoch in which at least this share of the trained answers was right; None for
            all epochs.
        patience: training ends after this many epochs in which the loss of the held-out examples was no lower than
            before; None for all epochs.
        most_tokens: longest text that is trained on, in tokens; the rest of a longer one is left out.
        keep_every: seconds between two copies on disk from which a killed training resumes, made after an epoch.
        seed: seed of initialisation, order of the examples, and dropout.
        progress_bar: show progress and the time left on standard error.

    Raises:
        ArgumentError: a value is out of range.
    """

    epochs: int | None = None
    lr: float | None = None
    batch_size: int = 32
    weight_decay: float = 0.01
    held_out: float = 0.1
    enough: float | None = None
    patience: int | None = None
    most_tokens: int = 128
    keep_every: float = 60.0
    seed: int = 0
    progress_bar: bool = True

    def __post_init__(self) -> None:
        if (self.epochs is not None and self.epochs < 1) or self.batch_size < 1 or self.most_tokens < 2:
            raise ArgumentError(
                "epochs and batch_size must be at least 1 and most_tokens at least 2, got "
                f"{self.epochs}, {self.batch_size} and {self.most_tokens}"
            )
        if (self.lr is not None and not 0 < self.lr < float("inf")) or not 0 <= self.weight_decay < float("inf"):
            raise ArgumentError(
                f"lr must be positive and weight_decay at least 0, got {self.lr} and {self.weight_decay}"
            )
        if not 0 <= self.held_out < 1:
            raise ArgumentError(f"held_out is a share of the examples, from 0 to below 1, got {self.held_out}")
        if self.enough is not None and not 0 < self.enough <= 1:
            raise ArgumentError(f"enough is a share of the answers, above 0 and at most 1, got {self.enough}")
        if self.patience is not None and (self.patience < 1 or self.held_out == 0):
            raise ArgumentError(
                f"patience counts epochs, at least 1, in which held-out examples are measured; got {self.patience} "
                f"with held_out {self.held_out}"
            )

    def filled(self, epochs: int, lr: float) -> "TrainingSettings":
        """The settings with these values where they are None."""
        return replace(
            self, epochs=epochs if self.epochs is None else self.epochs, lr=lr if self.lr is None else self.lr
        )
