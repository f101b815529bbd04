"""The callback that asks the model about the facts of a run before its first round and after its last."""

import warnings

from lightning import LightningModule, Trainer

from lightedit.editing.journal import RoundCallback
from lightedit.editing.module import EditModule
from lightedit.editing.outcomes import Observed
from lightedit.editing.summary import advice
from lightedit.errors import NumericalError


class Outcomes(RoundCallback):
    """Gives the edit of an `EditModule`'s fit its `outcomes` and `damage`. `le.edit` brings one along.

    Warns if a fact does not hold, and names the settings to change.

        trainer = Trainer(callbacks=[le.Outcomes()])
        trainer.fit(module, datamodule=data)
        print(module.edit)
    """

    def __init__(self) -> None:
        self._observed: Observed | None = None

    def on_prepared(self, trainer: Trainer, module: LightningModule) -> None:
        """Ask the model before the run's first round."""
        assert isinstance(module, EditModule)
        self._observed = Observed(module.lm, module.data().facts, module.method.erases)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask the model again, and warn if facts do not hold."""
        assert isinstance(pl_module, EditModule) and pl_module.edit is not None
        assert self._observed is not None
        edit = pl_module.edit
        try:
            edit.outcomes = self._observed.outcomes(pl_module.losses, pl_module.notes)
            edit.damage = self._observed.damage()
        except NumericalError:
            edit.outcomes, edit.damage = self._observed.unknown(pl_module.losses, pl_module.notes), ()
        self._observed = None
        on_collision = pl_module.editor.settings.on_collision
        if warning := advice(edit.outcomes, edit.record.method, edit.facts_in_round, on_collision):
            warnings.warn(warning, stacklevel=1)
