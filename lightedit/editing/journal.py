"""The journal of a run: its finished rounds, and the callbacks that are told of each."""

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
        number: of the round, from 1.
        facts: facts in the round.
        changes: place -> what was written, in the order in which it was.
        state: what the round adds to what later rounds depend on; see `Editor.state`.
        seconds: of the run so far, by step.
        stopped: why the run ended with it, if a limit ended it.
        tables: this round's rows of the run's figures, by table.
    """

    number: int
    facts: int
    changes: dict[Place, Change]
    state: dict[str, Tensor]
    seconds: dict[str, float]
    stopped: str | None = None
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


class RoundCallback(Callback):
    """A callback that an `EditModule` tells of its rounds, at moments that no order of callbacks can change."""

    def kept_rounds(self, trainer: Trainer, module: LightningModule) -> list[Round]:
        """The rounds that an earlier process finished; asked once, when everything for the run is prepared."""
        return []

    def on_round_written(self, trainer: Trainer, module: LightningModule) -> None:
        """The last round of the module's edit was written, and validated if it was its turn.

        It may be taken back (`EditModule.roll_back`), and the fit be ended (`trainer.should_stop`).
        """

    def on_round_end(self, trainer: Trainer, module: LightningModule, round_: Round) -> None:
        """A round is finished and stays."""
