"""Train a hyper-network in one call, with checkpoints from which an interrupted training goes on."""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from lightedit.data.fact import Fact, served_as
from lightedit.data.facts import distinct_facts
from lightedit.data.words import counted
from lightedit.errors import ArgumentError, ArgumentTypeError
from lightedit.files import whole_file
from lightedit.lm import LanguageModel
from lightedit.lm.arguments import check_model
from lightedit.methods.hypernetworks.examples import EditorDataModule, EditorTrainingSettings, examples_of
from lightedit.methods.hypernetworks.method import HyperNetworkMethod
from lightedit.methods.hypernetworks.module import HyperNetworkModule
from lightedit.methods.hypernetworks.saving import save_network
from lightedit.ops.implementations import implementations
from lightedit.progress import Report, progress, quiet_lightning
from lightedit.runs.folder import check_run, locked, remove_run, start_run, state_file
from lightedit.runs.provenance import computing, fingerprint_inputs
from lightedit.runs.trainer import own_trainer

_KIND = "train-editor"
_LAYERS = 3  # last layers that are edited if none are named


def check_training(lm: object, method: object, out: Path, overwrite: bool = False) -> None:
    """Raise what `train_editor` raises for its model, method and folder before its work."""
    check_model(lm)
    trained = trainable(method)
    check_out(out, overwrite)
    assert isinstance(lm, LanguageModel)
    _placed(trained, lm).check_places(lm)
    if lm.weights.owners:
        raise ArgumentError(f"{lm.name} carries edits; an editor is trained on the unedited model, so revert them")


def trainable(method: object) -> HyperNetworkMethod:
    """The method, if its network can be trained.

    Raises:
        ArgumentError: it has a trained network.
        ArgumentTypeError: it is no method with a hyper-network.
    """
    if not isinstance(method, HyperNetworkMethod):
        raise ArgumentTypeError(f"method: expected KE or MEND, got {type(method).__name__}")
    if method.folder is not None:
        raise ArgumentError(f"folder: {method.folder} is a trained network; leave it out to train a new one")
    return method


def _placed(method: HyperNetworkMethod, lm: LanguageModel) -> HyperNetworkMethod:
    """The method with layers: by default the last three."""
    if method.layers is not None:
        return method
    return method.at(range(max(0, lm.n_layers - _LAYERS), lm.n_layers))


def check_out(out: Path, overwrite: bool = False) -> None:
    """Raise ArgumentError if `out` exists, unless it holds a trained network and `overwrite` is given."""
    held = (out / "editor.json").is_file()
    if out.exists() and not (overwrite and held):
        raise ArgumentError(f"{out} exists already; choose another folder" + (", or allow overwriting" if held else ""))


def train_editor(
    lm: LanguageModel,
    facts: Sequence[Fact],
    method: HyperNetworkMethod,
    out: str | Path,
    *,
    settings: EditorTrainingSettings | None = None,
    overwrite: bool = False,
    chat: bool = False,
) -> HyperNetworkMethod:
    """Train the hyper-network of KE or MEND for `lm`, save it in `out`, and return the method that edits with it.

        mend = train_editor(lm, facts, MEND(layers=[27, 28, 29], rank=256), "editors/mend")
        edit(lm, other_facts, mend)

    Each step edits some facts separately, and lowers the loss of their rephrasings and the change at their locality
    texts, which are neighbourhood prompts, or without any the prompts of other facts. The last facts are held out, and
    the network that does best on them is saved. After each validation the training is stored beside `out`, in a folder
    whose name ends in .run, until the network is saved. After an interruption, the same call goes on from there, on the
    CPU with the same bits.

    Args:
        lm: the unedited model.
        facts: facts with rephrasings and neighbourhood prompts. Facts that repeat an earlier one are dropped.
        method: `MEND` or `KE` without a folder.
        out: a new folder for the network.
        settings: settings of the training.
        overwrite: replace an earlier network in `out`.
        chat: serve all facts through the model's chat template; see `Fact.chat`.

    Raises:
        ArgumentError: `out` exists, the method has a trained network, the model carries an edit, or it lacks a layer.
        FactError: there are too few facts, or one cannot be tokenised or is longer than the model's positions.
        UnsupportedModelError: the model lacks an edited matrix, or a fact is served in a chat template that it lacks.
        NumericalError: a gradient is NaN or infinite.
        ResumeError: the .run folder holds another training or a damaged file, or another process uses it.
    """
    out, settings = Path(out), settings or EditorTrainingSettings()
    check_training(lm, method, out, overwrite)
    method = _placed(method, lm)
    chosen = distinct_facts(served_as(facts, chat=chat))
    data = EditorDataModule(examples_of(lm, chosen), settings)
    run = out.with_name(f"{out.name}.run")
    run.mkdir(parents=True, exist_ok=True)
    with locked(run):
        kept = state_file(run)
        inputs = _inputs(lm, chosen, method, settings)
        if kept.is_file():
            check_run(run, inputs)
        else:
            start_run(run, _KIND, inputs)
        with quiet_lightning():
            module, course = _fit(lm, method, data, kept)
        record = {
            "facts": len(data.training),
            "held_out": len(data.validation),
            "steps": course.rows[-1]["step"],
            "best_step": course.best_step,
            "stopped": course.stopped,
            "minutes": round(course.seconds / 60, 2),
            "before": course.rows[0],
            "figures": next(row for row in course.rows if row["step"] == course.best_step),
            "settings": inputs["training"],
        }
        save_network(out, lm, module.network, course.best, method.to_dict(), record, course.rows)
        remove_run(run)
    remove_run(run)  # and the folder, where a lock kept it
    return type(method).load(out)


def _inputs(
    lm: LanguageModel, facts: Sequence[Fact], method: HyperNetworkMethod, settings: EditorTrainingSettings
) -> dict[str, Any]:
    """Everything that determines what a training saves, as JSON values."""
    training = {name: value for name, value in vars(settings).items() if name not in ("progress_bar", "minutes")}
    inputs = {
        "method": method.to_dict(),
        **computing(lm),
        **fingerprint_inputs(lm, facts, method.places),
        "training": training,
        "threads": torch.get_num_threads(),
        "ops": implementations(),
    }
    return cast(dict[str, Any], json.loads(json.dumps(inputs)))


def _fit(
    lm: LanguageModel, method: HyperNetworkMethod, data: EditorDataModule, kept: Path
) -> tuple[HyperNetworkModule, "_Course"]:
    """Train from the beginning, or from the state in `kept`."""
    module = HyperNetworkModule(lm, method, data.settings.steps)
    course = _Course(data, kept)
    on = (
        {"accelerator": "cpu"} if lm.device.type == "cpu" else {"accelerator": "gpu", "devices": [lm.device.index or 0]}
    )
    trainer = own_trainer(
        max_epochs=data.epochs,
        logger=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        inference_mode=False,
        callbacks=[course],
        **on,
    )
    continued = kept.is_file()
    show = data.settings.progress_bar
    if not continued:
        with progress(f"validation on {counted(len(data.validation))}", show) as course.report:
            trainer.validate(module, datamodule=data, verbose=False)
        course.add(0, module)
    with progress(f"training {type(method).__name__} on {counted(len(data.training))}", show) as course.report:
        trainer.fit(module, datamodule=data, ckpt_path=str(kept) if continued else None, weights_only=False)
    return module, course


def said(row: Mapping[str, float]) -> str:
    """The figures of a validation in words.

    >>> said({"step": 20, "loss": 1.25, "answer_loss": 3.5, "success": 0.4, "locality_loss": 0.0125, "kept": 0.98})
    'step 20: loss 1.25, answers 3.5, success 40.0 %, locality KL 0.0125, predictions kept 98.0 %'
    """
    return (
        f"step {row['step']}: loss {row['loss']:.4g}, answers {row['answer_loss']:.4g}, success {row['success']:.1%}, "
        f"locality KL {row['locality_loss']:.4g}, predictions kept {row['kept']:.1%}"
    ).replace("%", " %")


class _Course(Callback):
    """Keeps the best network, ends the training, and stores it after each validation.

    Attributes:
        rows: the figures of each validation, with "step", the number of steps before it.
        best: the weights of the network with the best validation.
        best_step: the number of steps after which it was.
        stopped: why training ended before the last step, if it did.
        seconds: time of training.
        report: reports progress.
    """

    def __init__(self, data: EditorDataModule, kept: Path) -> None:
        self._data, self._kept = data, kept
        self.report: Report = lambda done, total: None
        self.rows: list[dict[str, Any]] = []
        self.best: dict[str, Tensor] = {}
        self.best_step, self.best_score = 0, float("inf")
        self.stopped: str | None = None
        self.seconds, self._since, self._before = 0.0, time.perf_counter(), 0

    def add(self, step: int, module: HyperNetworkModule) -> None:
        """Take the figures of a validation after so many steps."""
        self.rows.append({"step": step, **module.validation})
        if self._data.settings.progress_bar:
            print(said(self.rows[-1]), file=sys.stderr, flush=True)
        score = module.objective.score(module.validation)
        if score < self.best_score or not self.best:
            self.best = {name: value.detach().cpu().clone() for name, value in module.network.state_dict().items()}
            self.best_step, self.best_score = step, score

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._since, self._before = time.perf_counter(), trainer.global_step
        if self._before:
            print(f"continuing after step {self._before} of {self._data.settings.steps}", file=sys.stderr)
        trainer.should_stop = self.stopped is not None

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        settings = self._data.settings
        done = (trainer.global_step - self._before) / max(1, settings.steps - self._before)
        if settings.minutes is not None:  # whichever ends first
            now = time.perf_counter() - self._since
            done = max(done, min(1.0, now / max(now, 60 * settings.minutes - self.seconds)))
        self.report(done, 1)

    def on_validation_batch_end(self, trainer: Trainer, module: LightningModule, *arguments: Any) -> None:
        if trainer.state.fn == "validate":
            self.report(arguments[2] + 1, -(-len(self._data.validation) // self._data.settings.batch_size))

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.add(trainer.global_step, cast(HyperNetworkModule, module))
        now = time.perf_counter()
        self.seconds, self._since = self.seconds + now - self._since, now
        settings = self._data.settings
        if settings.patience is not None and trainer.global_step - self.best_step >= settings.patience:
            self.stopped = f"no better validation for {trainer.global_step - self.best_step} steps"
        elif settings.minutes is not None and self.seconds >= 60 * settings.minutes:
            self.stopped = f"{settings.minutes:g} minutes had passed"
        trainer.should_stop = self.stopped is not None
        with whole_file(self._kept) as unfinished:
            trainer.save_checkpoint(unfinished)

    def state_dict(self) -> dict[str, Any]:
        names = ("rows", "best", "best_step", "best_score", "stopped", "seconds")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self).update(state_dict)
