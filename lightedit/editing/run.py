"""Editing in one call: `edit` runs an `EditModule` over rounds of facts with a trainer of its own."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger

from lightedit.data.fact import Fact, served_as
from lightedit.data.modules import FactsDataModule
from lightedit.data.prompts import check_facts_fit
from lightedit.data.words import counted
from lightedit.editing.artefact import Edit
from lightedit.editing.checkpoint import RoundCheckpoint
from lightedit.editing.module import EditModule
from lightedit.editing.observing import Outcomes
from lightedit.editing.settings import RunSettings
from lightedit.editing.tuning import tuned_method
from lightedit.errors import ArgumentError
from lightedit.lm import LanguageModel
from lightedit.lm.arguments import check_model
from lightedit.methods.needs import covariance_for
from lightedit.methods.protocol import Editor, Method, check_model_and_method
from lightedit.progress import Report, progress, quiet_lightning
from lightedit.runs.trainer import own_trainer
from lightedit.statistics.covariance import Covariance


class _Progress(Callback):
    """Reports how much of a fit's work is done; a resumed fit counts only its own work."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self._before = 0.0

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, EditModule)
        self._before = module.fraction_done
        module.editor.watch = lambda: self._show(module)

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        assert isinstance(module, EditModule)
        self._show(module)

    def _show(self, module: EditModule) -> None:
        self.report(module.fraction_done - self._before, 1.0 - self._before)


def rounds_of(facts: Sequence[Fact], method: Method | None, settings: RunSettings) -> FactsDataModule:
    """The facts in rounds of `facts_per_round`; by default one round of all, or of as many as the method allows."""
    size = settings.facts_per_round
    if size is None and method is not None:
        size = method.facts_per_solve
    return FactsDataModule(facts, size, settings.facts_per_chunk)


def prepare(
    lm: LanguageModel,
    facts: Sequence[Fact],
    method: Method,
    *,
    covariance: Covariance | None = None,
    settings: RunSettings | None = None,
    like: Editor | None = None,
) -> Editor:
    """Check an edit before it starts, and compute what it needs: contexts, keys, factors.

    Returns:
        The editor, to pass to `edit` as `prepared`.

    Raises:
        ArgumentError, FactError, CovarianceError, NumericalError: the errors that `edit` raises before its first step.
    """
    check_model_and_method(lm, method)
    settings = settings or RunSettings()
    data = rounds_of(facts, method, settings)
    editor = method.editor(lm, covariance=covariance, settings=settings)
    editor.prepare(data.facts, data.rounds, like)
    return editor


def edit(
    lm: LanguageModel,
    facts: Sequence[Fact],
    method: Method | None = None,
    *,
    covariance: Covariance | None = None,
    settings: RunSettings | None = None,
    checkpoint: str | Path | None = None,
    log: str | Path | None = None,
    callbacks: Sequence[Callback] = (),
    prepared: Editor | None = None,
    chat: bool = False,
) -> Edit:
    """Edit `facts` into `lm` and return the edit, which the model carries afterwards.

        edit = edit(lm, facts)

    `print(edit)` says what became of each fact. A warning names settings to change if a fact does not hold.

    Args:
        lm: the model to edit.
        facts: the facts to write. Those that repeat an earlier one are dropped with a warning.
        method: the method, such as `MEMIT(layers=[4, 5, 6, 7, 8])`; by default MEMIT with the settings that `tune`
            finds for the model, or has found before.
        covariance: second moments at the method's `covariance_places`; by default they are estimated from
            self-generated text and kept in the cache.
        settings: sizes of rounds and chunks, and what to do about colliding facts; see `RunSettings`.
        checkpoint: a folder in which every finished round is stored. After an interruption, the same call resumes from
            it, on the CPU with the same bits. Delete it once the edit is saved. See `RoundCheckpoint`.
        log: a folder of this run only, for metrics.csv, retention.csv and the health.csv of a `Health` callback.
        callbacks: callbacks of the trainer. Some, such as `Health`, may end the run early; `Edit.facts` are the facts
            that were written.
        prepared: the result of `prepare` for the same arguments; the editor is then not prepared again.
        chat: serve all facts through the model's chat template; see `Fact.chat`.

    Raises:
        ArgumentError: an argument is out of range, or `log` is a file.
        FactError: there are no facts, one round holds two answers to one text, two facts collide, or one cannot be
            tokenised or is longer than the model's positions.
        UnsupportedModelError: a fact is served in the chat template, and there is none.
        CovarianceError: the covariance is of another model, lacks a place, or is not positive definite.
        NumericalError: the search or an update gave NaN or infinity. The edit is taken back.
        ResumeError: `checkpoint` holds another run or a damaged file.
    """
    if method is None:
        check_model(lm, what="a run without a method, which takes MEMIT,")
    else:
        check_model_and_method(lm, method)
    settings = settings or RunSettings()
    check_log(log)
    data = rounds_of(served_as(facts, chat=chat), method, settings)
    check_facts_fit(lm, data.facts)
    if method is None:
        method = tuned_method(lm, progress_bar=settings.progress_bar)
    method.check_facts(lm, data.facts, data.rounds, settings)
    if covariance is None and prepared is None:
        covariance = covariance_for(lm, [method], progress_bar=settings.progress_bar)
    module = EditModule(lm, method, covariance=covariance, settings=settings, prepared=prepared)
    with progress(f"editing {counted(len(data.facts))}", settings.progress_bar) as report, quiet_lightning():
        watching = [_Progress(report), *([Outcomes()] if settings.outcomes else []), *callbacks]
        if checkpoint is not None:
            watching.append(RoundCheckpoint(checkpoint))
        trainer = own_trainer(
            max_epochs=len(data.rounds),
            logger=False if log is None else CSVLogger(log, name=None, version=""),
            log_every_n_steps=1,
            enable_checkpointing=checkpoint is not None,
            num_sanity_val_steps=0,
            limit_val_batches=0 if settings.validate_every is None else 1.0,
            check_val_every_n_epoch=settings.validate_every or 1,
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


def check_log(log: str | Path | None) -> None:
    """Raise ArgumentError if `log` is a file, so that no tables can be written into it."""
    if log is not None and Path(log).exists() and not Path(log).is_dir():
        raise ArgumentError(f"log {log} is a file; give a folder")
