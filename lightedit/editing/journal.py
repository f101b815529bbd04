"""The journal of a run: its finished rounds, and callbacks that are called at each."""

from dataclasses import dataclass, field
from typing import Any

from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from lightedit.lm import Place
from lightedit.lm.changes import Change


@dataclass(frozen=True)
class Round:
    """One finished round.

    Attributes:
        number: the round's number, from 1.
        facts: number of facts in the round.
        changes: place -> change, in the order in which they were written.
        state: tensors on which later rounds depend; see `Editor.state`.
        seconds: time of the run so far, by step.
        stopped: why the run ended with this round, if a limit ended it.
        tables: this round's rows of the run's tables, by name of the table.
        losses: the last loss of each fact's search, in order; None for a fact without one.
        values: fact's index -> result of its search, if this is the first round; see `Edit.values`.
        notes: what each fact's outcome is to say besides, in order; None for nothing.
    """

    number: int
    facts: int
    changes: dict[Place, Change]
    state: dict[str, Tensor]
    seconds: dict[str, float]
    stopped: str | None = None
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    losses: list[float | None] = field(default_factory=list)
    values: dict[int, Tensor] = field(default_factory=dict)
    notes: list[str | None] = field(default_factory=list)


class RoundCallback(Callback):
    """A callback with hooks for the rounds of an `EditModule`, which run at fixed points of a round."""

    def on_prepared(self, trainer: Trainer, module: LightningModule) -> None:
        """Called once, when the run is prepared and the model does not carry any of its rounds yet."""

    def kept_rounds(self, trainer: Trainer, module: LightningModule) -> list[Round]:
        """The rounds that an earlier process finished; called once, after the run is prepared."""
        return []

    def on_round_written(self, trainer: Trainer, module: LightningModule) -> None:
        """Called after a round was written, and validated if it is one that is validated.

        The hook may take the round back (`EditModule.roll_back`) and end the fit (`trainer.should_stop`).
        """

    def on_round_end(self, trainer: Trainer, module: LightningModule, round_: Round) -> None:
        """Called when a round is finished and was not taken back."""
