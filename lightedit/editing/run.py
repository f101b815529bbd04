"""Editing in one call: the trainer that runs an `EditModule` over rounds of facts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from lightedit.data.facts import Fact
from lightedit.data.modules import FactsDataModule
from lightedit.editing.artefact import Edit
from lightedit.editing.checkpoint import RoundCheckpoint
from lightedit.editing.module import EditModule, OnCollision
from lightedit.editing.retention import check_validation
from lightedit.lm import LanguageModel
from lightedit.methods import Method
from lightedit.progress import progress, quiet_lightning
from lightedit.runs.trainer import own_trainer
from lightedit.statistics.covariance import Covariance


class _Progress(Callback):
    """Reports how much of a fit's work is done; a fit that goes on after a kill counts its own work only."""

    def __init__(self, report: Any) -> None:
        self.report = report
        self._before: float | None = None

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, EditModule)
        if self._before is None:  # a checkpoint has restored its rounds by now
            self._before = module.fraction_done

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        assert isinstance(module, EditModule)
        assert self._before is not None
        self.report(module.fraction_done - self._before, 1.0 - self._before)


def check_edit(
    lm: LanguageModel,
    facts: Sequence[Fact],
    method: Method,
    covariance: Covariance,
    facts_per_round: int | None = None,
    facts_per_chunk: int = 32,
    on_collision: OnCollision = "error",
) -> None:
    """Raise what `edit` would raise for these arguments before its first step; takes seconds."""
    with quiet_lightning():
        trainer = own_trainer(max_epochs=0, logger=False, enable_checkpointing=False, limit_val_batches=0)
        data = rounds_of(facts, method, facts_per_round, facts_per_chunk)
        trainer.fit(EditModule(lm, method, covariance, on_collision), datamodule=data)


def rounds_of(
    facts: Sequence[Fact], method: Method, facts_per_round: int | None = None, facts_per_chunk: int = 32
) -> FactsDataModule:
    """The facts in rounds of that size; by default all in one, or as many as the method takes in one solve."""
    size = method.facts_per_solve if facts_per_round is None else facts_per_round
    return FactsDataModule(facts, size, facts_per_chunk)


def edit(
    lm: LanguageModel,
    facts: Sequence[Fact],
    method: Method,
    covariance: Covariance,
    facts_per_round: int | None = None,
    facts_per_chunk: int = 32,
    on_collision: OnCollision = "error",
    progress_bar: bool = True,
    checkpoint: str | Path | None = None,
    validate_every: int | None = None,
    log: str | Path | None = None,
    callbacks: Sequence[Callback] = (),
    targets: Mapping[int, Tensor] | None = None,
) -> Edit:
    """Edit `facts` into `lm` and return what was written; the model carries the edit afterwards.

    Args:
        lm: the model to edit.
        facts: what to write.
        method: such as `MEMIT(layers=[4, 5, 6, 7, 8])`.
        covariance: second moments at the method's matrices, from `estimate_covariance`.
        facts_per_round: facts written together; default: all, or as many as the method takes in one solve.
        facts_per_chunk: facts whose values are optimised together; more is faster and takes more memory.
        on_collision: see `EditModule`.
        progress_bar: show progress and the time left on standard error.
        checkpoint: a folder that keeps every finished round, so that the same call goes on from there after the
            process was killed, on the CPU to the same bits; delete it once the edit is saved. See `RoundCheckpoint`.
        validate_every: rounds between validations, which score the facts of all rounds so far; the last round is
            always validated. None: never.
        log: a folder of this run's own for metrics.csv, retention.csv and the health.csv of a `Health` callback.
        callbacks: for the trainer, such as `Health`, which may stop the run: `Edit.facts` are those written.
        targets: values known from before; see `EditModule`.

    Raises:
        ValueError: an argument is out of range, or `log` is a file.
        FactError: facts that cannot be edited: none, twice the same, or colliding.
        CovarianceError: a covariance of another model or other matrices, or one that cannot be solved with.
        FloatingPointError: the value optimisation or an update gave NaN or infinity. The model is left unedited.
        ResumeError: `checkpoint` holds another run, or a damaged file.
    """
    check_validation(validate_every, None if log is None else Path(log))
    data = rounds_of(facts, method, facts_per_round, facts_per_chunk)
    module = EditModule(lm, method, covariance, on_collision=on_collision, targets=targets)
    with progress(f"editing {len(data.facts)} facts", progress_bar) as report, quiet_lightning():
        watching = [_Progress(report), *callbacks]
        if checkpoint is not None:
            watching.append(RoundCheckpoint(checkpoint))
        trainer = own_trainer(
            max_epochs=len(data.rounds),
            logger=False if log is None else CSVLogger(log, name=None, version=""),
            log_every_n_steps=1,
            enable_checkpointing=checkpoint is not None,
            num_sanity_val_steps=0,
            limit_val_batches=0 if validate_every is None else 1.0,
            check_val_every_n_epoch=validate_every or 1,
            callbacks=watching,
        )
        try:
            trainer.fit(module, datamodule=data)
        except BaseException:
            if module.edit is not None and module.edit.is_applied(lm):
                module.edit.revert(lm)
            raise
    assert module.edit is not None
    return module.edit
