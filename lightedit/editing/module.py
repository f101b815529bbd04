"""A run as a Lightning fit: an epoch is a round, a batch is a chunk, a training step is a step of the search."""

import math
import time
from itertools import islice
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor

from lightedit.data.modules import Chunk, FactsDataModule
from lightedit.editing.artefact import Edit, EditError
from lightedit.editing.journal import Round, RoundCallback
from lightedit.editing.retention import FILE, RetentionScores, curves, defined
from lightedit.errors import ArgumentError, ArgumentTypeError
from lightedit.evaluation.scoring import score_facts
from lightedit.lm import LanguageModel
from lightedit.methods.protocol import Editor, EditorSettings, Method, check_model_and_method
from lightedit.metrics import edit_metrics
from lightedit.runs.tables import log_folder, write_table
from lightedit.statistics.covariance import Covariance


class EditModule(LightningModule):
    """Runs any method under a trainer.

    Each training step is one step of the search for a chunk of facts. When the round's last chunk is finished, the
    editor writes the round. Validation then scores the model on the facts of this round and of all earlier ones. The
    language model is not a submodule, so the trainer does not move, wrap or checkpoint it.

        module = EditModule(lm, MEMIT(layers=(4, 5, 6, 7, 8)), covariance=covariance)
        Trainer().fit(module, datamodule=FactsDataModule(facts, facts_per_round=100))

    Args:
        lm: the model to edit.
        method: the method to run.
        covariance: second moments at the method's `covariance_places`, if it has any.
        settings: settings of the run; the data module sets the sizes of rounds and chunks.
        prepared: an unused editor of this method that was prepared for the data module's facts and rounds.

    Attributes:
        editor: the editor of the present fit.
        edit: the edit with all rounds written so far; set when a fit starts.
        retention: for each validation in a fit, a row for each round written so far: "round", the number of rounds
            written; "origin", the round in which the scored facts were written, both counted from 1; "facts", their
            number; and their scores in percent. Also written to retention.csv in the first logger's folder.
        losses: the last loss of each written fact's search, in the order of `edit.facts`; None for a fact without one.
        notes: what each written fact's outcome is to say besides, in the same order; None for nothing.
        fraction_done: share of all facts that are found or written; a fact in progress counts as the share of its
            steps.

    Raises:
        CovarianceError: the method needs a covariance and none was given.
    """

    def __init__(
        self,
        lm: LanguageModel,
        method: Method,
        *,
        covariance: Covariance | None = None,
        settings: EditorSettings | None = None,
        prepared: Editor | None = None,
    ) -> None:
        super().__init__()
        check_model_and_method(lm, method)
        self.automatic_optimization = False
        self.lm = lm
        self.covariance = covariance if prepared is None else prepared.covariance
        self.settings = settings
        self.editor = prepared or method.editor(lm, covariance=covariance, settings=settings)
        self.method = self.editor.method  # which may have been bound to the layers of `lm`
        self.edit: Edit | None = None
        self.retention: list[dict[str, Any]] = []
        self.losses: list[float | None] = []
        self.notes: list[str | None] = []
        self._unscored: FloatingPointError | None = None  # why validation failed after this round
        self._seconds = {"values": 0.0, "update": 0.0}
        self._seconds_before = dict(self._seconds)
        self._rounds: list[list[int]] = []
        self._chunk: Chunk | None = None
        self._metrics = edit_metrics()
        self._by_origin = RetentionScores()

    # Before work starts

    def on_fit_start(self) -> None:
        data = self.data()
        if self.edit is not None:  # an earlier fit has used the editor up
            self.editor = self.method.editor(self.lm, covariance=self.covariance, settings=self.settings)
        if not self.editor.prepared:
            self.editor.prepare(data.facts, data.rounds)
        elif self.editor.facts != data.facts or self.editor.rounds != data.rounds:
            raise ArgumentError("prepared: the editor was prepared for other facts or rounds than the data module's")
        self._rounds = data.rounds
        self.edit = Edit.begin(self.editor)
        self.retention = self.edit.tables.setdefault("retention", [])
        self.losses, self.notes = [], []
        for callback in self._round_callbacks():
            callback.on_prepared(self.trainer, self)
        try:
            for callback in self._round_callbacks():
                for round_ in callback.kept_rounds(self.trainer, self):
                    self._restore(round_, data)
        except BaseException:
            if self.edit.is_applied(self.lm):
                self.edit.revert(self.lm)
            raise

    def data(self) -> FactsDataModule:
        """The facts of the run.

        Raises:
            ArgumentTypeError: the trainer's data module is not a `FactsDataModule`.
        """
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, FactsDataModule):
            raise ArgumentTypeError(
                "EditModule needs its facts from a FactsDataModule: trainer.fit(module, datamodule=...)"
            )
        return data

    def _round_callbacks(self) -> list[RoundCallback]:
        return [callback for callback in self.trainer.callbacks if isinstance(callback, RoundCallback)]  # type: ignore[attr-defined]

    def _restore(self, round_: Round, data: FactsDataModule) -> None:
        """Write a round that an earlier process finished."""
        assert self.edit is not None
        owner = self.edit.owner(len(self.edit.rounds))
        # appended before its changes, so that reverting the edit also undoes a round that fails between two places
        self.lm.weights.made_on[self.edit.id] = self.edit.record.on_top_of
        self.edit.rounds.append({})
        for place, change in round_.changes.items():
            change = change.to(next(self.lm.module(place).parameters()).device)
            self.lm.weights.add(owner, place, change)
            self.edit.rounds[-1][place] = change
        self.edit.facts_in_round.append(round_.facts)
        self.edit.facts = data.facts[: sum(self.edit.facts_in_round)]
        for name, rows in round_.tables.items():
            self.edit.tables.setdefault(name, []).extend(rows)
        self.losses += round_.losses
        self.notes += round_.notes or [None] * round_.facts
        self.edit.values |= round_.values
        self.edit.record.stopped = round_.stopped
        self._seconds = dict(round_.seconds)
        self.edit.record.seconds = dict(self._seconds)
        self.editor.restore(round_.state)

    def configure_optimizers(self) -> torch.optim.Optimizer | None:
        return self.editor.make_optimizer()

    def on_train_epoch_start(self) -> None:
        self._seconds_before = dict(self._seconds)

    # The search

    def training_step(self, chunk: Chunk, batch_idx: int) -> None:
        if chunk.finished:  # the loader prefetches one batch, so a chunk comes once more after its last step
            return
        started = time.perf_counter()
        optimizer: Any = self.optimizers()  # an empty list if there is none
        optimizer = optimizer or None
        if chunk is not self._chunk:
            self._chunk = chunk
            self.editor.start(chunk.indices, optimizer and optimizer.optimizer)
        if not self.editor.done:
            figures = self.editor.step(optimizer)
            self.log_dict(figures, prog_bar=True, batch_size=len(chunk))
            self._seconds["values"] += time.perf_counter() - started
        if self.editor.done:
            chunk.finished = True
            self._chunk = None

    @property
    def fraction_done(self) -> float:
        written = sum(self.edit.facts_in_round) if self.edit else 0
        return (self.editor.facts_found + written) / max(1, sum(map(len, self._rounds)))

    # Writing

    def on_train_batch_end(self, outputs: Any, batch: Chunk, batch_idx: int) -> None:
        if self.trainer.is_last_batch:
            self._write_round(self._rounds[self.current_epoch])

    def _write_round(self, indices: list[int]) -> None:
        """Write one round of facts; if that fails, the round is taken back."""
        assert self.edit is not None
        started = time.perf_counter()
        owner = self.edit.owner(len(self.edit.rounds))
        # results of later rounds come from edited weights, so no other run can take them
        values = {} if self.edit.rounds else self.editor.to_give(indices)
        try:
            changes = self.editor.write(indices, owner)
        except BaseException:
            self.lm.weights.remove([owner])
            raise
        self.edit.values |= {index: compact(value) for index, value in values.items()}
        self.losses += [_finite(self.editor.losses.get(index)) for index in indices]
        self.notes += [self.editor.notes.get(index) for index in indices]
        self.lm.weights.made_on[self.edit.id] = self.edit.record.on_top_of
        self.edit.rounds.append(changes)
        self.edit.facts_in_round.append(len(indices))
        self.edit.facts += [self.editor.facts[index] for index in indices]
        self._seconds["update"] += time.perf_counter() - started
        self.edit.record.seconds = dict(self._seconds)
        for place, change in changes.items():
            self.log(f"update_norm/layer_{place.key}", change.norm(), batch_size=len(indices))
        for step, seconds in self._seconds.items():
            self.log(f"seconds/{step}", seconds - self._seconds_before[step], batch_size=len(indices))

    def roll_back(self) -> None:
        """Take the last round back. The weights are then bit for bit those from before the round.

        The round is also removed from `edit` and `retention`. The editor's own state, such as past keys, still includes
        it, so no further round may be written in this fit: set `trainer.should_stop`.

        Raises:
            EditError: no round is written.
        """
        if self.edit is None or not self.edit.rounds:
            raise EditError("no round is written, so there is none to roll back")
        self.lm.weights.remove([self.edit.owner(len(self.edit.rounds) - 1)])
        self.edit.rounds.pop()
        del self.edit.facts[-self.edit.facts_in_round.pop() :]
        del self.losses[len(self.edit.facts) :], self.notes[len(self.edit.facts) :]
        if not self.edit.rounds:
            self.edit.values.clear()
        self.retention[:] = [row for row in self.retention if row["round"] <= len(self.edit.rounds)]
        self._save_retention()

    @property
    def in_last_round(self) -> bool:
        """Whether this is the fit's last round, unless it is stopped earlier."""
        epochs = self.trainer.max_epochs
        rounds = len(self._rounds) if epochs in (None, -1) else min(len(self._rounds), epochs)
        return self.current_epoch + 1 >= rounds

    def on_train_epoch_end(self) -> None:
        """Finish a round: call `on_round_written`, validate if the fit ends here, call `on_round_end` if it stays."""
        assert self.edit is not None
        written = len(self.edit.rounds)
        for callback in self._round_callbacks():
            callback.on_round_written(self.trainer, self)
        unscored, self._unscored = self._unscored, None
        if unscored is not None and not self.trainer.should_stop:
            raise unscored
        if self.in_last_round:
            self.trainer.should_stop = True
        if self.trainer.should_stop and self.trainer.enable_validation:
            self._validate_the_end()
        if len(self.edit.rounds) == written:
            for callback in self._round_callbacks():
                callback.on_round_end(self.trainer, self, self._last_round())

    def _last_round(self) -> Round:
        assert self.edit is not None
        number = len(self.edit.rounds)
        tables = {
            name: [row for row in rows if row["round"] == number] for name, rows in self.edit.tables.items() if rows
        }
        return Round(
            number,
            self.edit.facts_in_round[-1],
            self.edit.rounds[-1],
            self.editor.state(),
            dict(self._seconds),
            self.edit.record.stopped,
            tables,
            self.losses[-self.edit.facts_in_round[-1] :],
            dict(self.edit.values) if number == 1 else {},
            self.notes[-self.edit.facts_in_round[-1] :],
        )

    def teardown(self, stage: str) -> None:
        if stage == "fit":  # a reference cycle keeps trainer and module in memory until garbage collection
            self.editor.release()

    # Retention

    def validation_step(self, chunk: Chunk, batch_idx: int) -> None:
        try:
            records = score_facts(self.lm, chunk.facts)
        except FloatingPointError as error:
            if self.trainer.state.fn != "fit":
                raise
            self._unscored = error  # raised at the end of the round, unless a callback stops the fit
            return
        self._metrics.update(records)
        self._by_origin.update(chunk.round_ + 1, records)

    def on_validation_epoch_end(self) -> None:
        if self._unscored is not None:
            self._metrics.reset()
            self._by_origin = RetentionScores()
            return
        self.log_dict(defined(self._metrics), prog_bar=True)
        self._metrics.reset()
        scores, self._by_origin = self._by_origin, RetentionScores()
        if self.edit is None or self.trainer.state.fn != "fit" or self.trainer.sanity_checking:
            return
        rows = scores.rows(len(self.edit.rounds))
        self.log_dict(curves(rows))
        self.retention += rows
        self._save_retention()

    def _validate_the_end(self) -> None:
        """Score the facts of all rounds that are kept, unless they were scored after the last round.

        The trainer's own validation runs only every n-th round, and before callbacks can take a round back.
        """
        assert self.edit is not None
        written = len(self.edit.rounds)
        if not written or (self.retention and self.retention[-1]["round"] == written):
            return
        for index, chunk in enumerate(islice(self.data().val_dataloader(), written)):
            self.validation_step(chunk, index)
        self.on_validation_epoch_end()

    def _save_retention(self) -> None:
        folder = log_folder(self.trainer) if self._trainer is not None else None
        if folder is not None and self.retention:
            write_table(folder / FILE, self.retention)


def compact(value: Tensor) -> Tensor:
    """A result on the CPU, in float32 if that holds it exactly."""
    narrow = value.float()
    return (narrow if torch.equal(narrow.to(value), value) else value).cpu()


def _finite(loss: float | None) -> float | None:
    """The loss; None if there is none, or if a search of one step has evaluated none."""
    return loss if loss is not None and math.isfinite(loss) else None
