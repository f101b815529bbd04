"""The training of a model on texts with answers, as a Lightning fit that resumes after its last kept epoch."""

import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedModel

from lightedit.digests import digest
from lightedit.errors import ArgumentError
from lightedit.files import whole_file
from lightedit.lm.batch import pad
from lightedit.lm.fingerprint import fingerprint
from lightedit.progress import Report, progress, quiet_lightning
from lightedit.runs.folder import ResumeError, check_run, locked, start_run, state_file
from lightedit.runs.trainer import own_trainer
from lightedit.training.settings import TrainingSettings

_IGNORED = -100  # label of tokens without loss, in transformers' models
_ROWS = 64  # examples of one pass without gradients


class Item(NamedTuple):
    """One example as the model is trained on it: token ids of the text, and the class or the answer's tokens."""

    ids: list[int]
    answer: list[int]


class Measured(NamedTuple):
    """Mean loss in nats, and share of right answers, of one epoch.

    Attributes:
        loss: mean over batches, with dropout, while the weights changed.
        right: share of trained examples whose whole answer was predicted, counted likewise.
        held_out_loss: mean over held-out examples after the epoch; None without any.
        held_out_right: share of right answers among them.
    """

    loss: float
    right: float
    held_out_loss: float | None
    held_out_right: float | None


class Fitted(NamedTuple):
    """What a training gave.

    Attributes:
        trained: share of the trained examples whose whole answer is predicted at the end.
        held_out: the same of those not trained on; None without any.
        epochs: what was measured in each epoch.
    """

    trained: float
    held_out: float | None
    epochs: list[Measured]


class AnswerModule(LightningModule):
    """Trains a classifier or an encoder-decoder on the NLL of its answers, each token given those before it.

    Args:
        model: a transformers model for sequence classification, or an encoder-decoder.
        settings: how it is trained; without None for `epochs` and `lr`.
        held_out: examples that are measured after each epoch.
        steps: steps in all.
        report: called with (steps taken, steps in all).

    Attributes:
        epochs: what was measured in each finished epoch.
        ended: whether the last one was the last that is needed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        settings: TrainingSettings,
        held_out: Sequence[Item],
        steps: int,
        report: Report,
    ) -> None:
        super().__init__()
        self.model, self.settings, self.steps, self.report = model, settings, steps, report
        self.epochs: list[Measured] = []
        self.ended = False
        self._held_out = held_out
        self._of_epoch: list[Tensor] = []

    def on_train_start(self) -> None:
        if self.ended:
            self.trainer.should_stop = True

    def on_train_epoch_start(self) -> None:
        torch.manual_seed(_seed_of_epoch(self.settings.seed, self.current_epoch))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        output = self.model(**batch)
        loss: Tensor = output.loss
        right = _are_right(output.logits.detach(), batch["labels"])
        self._of_epoch.append(torch.stack([loss.detach() * len(right), right.sum(), right.new_tensor(len(right))]))
        self.report(self.global_step + 1, self.steps)
        return loss

    def on_train_epoch_end(self) -> None:
        loss, right, count = torch.stack(self._of_epoch).sum(0).tolist()
        self._of_epoch = []
        apart = measured(self.model, self._held_out) if self._held_out else (None, None)
        self.epochs.append(Measured(loss / count, right / count, *apart))
        self.ended = _is_last(self.epochs, self.settings)
        if self.ended:
            self.trainer.should_stop = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["epochs"], checkpoint["ended"] = [tuple(epoch) for epoch in self.epochs], self.ended

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.epochs, self.ended = [Measured(*epoch) for epoch in checkpoint["epochs"]], checkpoint["ended"]

    def configure_optimizers(self) -> Any:
        assert self.settings.lr is not None
        optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=self.settings.lr, weight_decay=self.settings.weight_decay
        )
        warm = max(1, self.steps // 10)

        def share(step: int) -> float:
            rest = (self.steps - step) / max(1, self.steps - warm)
            return min((step + 1) / warm, max(0.0, rest))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class _Shuffled(Sampler[int]):
    """The order of the examples in an epoch, which follows from the seed and the epoch. The trainer sets the epoch."""

    def __init__(self, count: int, seed: int) -> None:
        self._count, self._seed, self._epoch = count, seed, 0

    def __len__(self) -> int:
        return self._count

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(_seed_of_epoch(self._seed, self._epoch))
        yield from torch.randperm(self._count, generator=generator).tolist()


def _seed_of_epoch(seed: int, epoch: int) -> int:
    """A seed for the order and the dropout of an epoch, so that a resumed training repeats neither."""
    return random.Random(f"{seed} {epoch}").getrandbits(63)


class _Keeper(Checkpoint):
    """Keeps the state of a training after an epoch, if the last one was kept long enough ago."""

    def __init__(self, file: Path, every: float) -> None:
        self._file, self._every, self._last = file, every, time.monotonic()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.should_stop or time.monotonic() - self._last >= self._every:
            with whole_file(self._file) as unfinished:
                trainer.save_checkpoint(unfinished)
            self._last = time.monotonic()


def fit(model: PreTrainedModel, items: Sequence[Item], settings: TrainingSettings, what: str, run: Path) -> Fitted:
    """Train `model` on the examples, of which a share is held out, and leave it in evaluation mode on the CPU.

    Args:
        model: the model, the same again when a killed training is resumed.
        items: the examples, at least one of which is left for training.
        settings: how it is trained; without None for `epochs` and `lr`.
        what: what is trained, for the progress bar.
        run: a folder of this training alone, from which it resumes; `remove_run` deletes it.

    Raises:
        ArgumentError: no example is left to train on.
        ResumeError: the folder holds another training or a damaged file, or another process uses it.
    """
    assert settings.epochs is not None
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(settings.seed)).tolist()
    apart = int(settings.held_out * len(items))
    held_out, trained = [items[i] for i in order[:apart]], [items[i] for i in order[apart:]]
    if not trained or (settings.patience is not None and not held_out):
        raise ArgumentError(
            f"{len(items)} examples with held_out {settings.held_out} leave {len(trained)} to train on and "
            f"{len(held_out)} to measure; give more examples, or another held_out"
        )
    batches: DataLoader[Item] = DataLoader(
        trained,  # type: ignore[arg-type]
        settings.batch_size,
        sampler=_Shuffled(len(trained), settings.seed),
        generator=torch.Generator(),  # not drawn from; the loader would take a number from torch's own for its workers
        collate_fn=lambda part: _collated(model, part),
    )
    steps = settings.epochs * len(batches)
    with (
        _kept(run, model, items, settings) as kept,
        progress(what, settings.progress_bar) as report,
        quiet_lightning(),
        torch.random.fork_rng(),
    ):
        module = AnswerModule(model.train().requires_grad_(True), settings, held_out, steps, report)
        trainer = own_trainer(
            accelerator="auto",
            max_epochs=settings.epochs,
            logger=False,
            callbacks=[_Keeper(state_file(run), settings.keep_every)],
            gradient_clip_val=1.0,
        )
        trainer.fit(module, batches, ckpt_path=kept)
    torch.nn.Module.to(model, "cpu")
    model.eval().requires_grad_(False)
    return Fitted(measured(model, trained)[1], module.epochs[-1].held_out_right, module.epochs)


@contextmanager
def _kept(
    run: Path, model: PreTrainedModel, items: Sequence[Item], settings: TrainingSettings
) -> Iterator[Path | None]:
    """Hold the lock of a training's folder. Yield the file from which it resumes; None if it starts."""
    inputs: dict[str, Any] = {
        "model": fingerprint(model),
        "examples": digest(json.dumps(items)),
        "settings": {k: v for k, v in asdict(settings).items() if k not in ("progress_bar", "keep_every")},
    }
    run.mkdir(parents=True, exist_ok=True)
    with locked(run):
        file = state_file(run)
        if not file.exists():
            start_run(run, "training", inputs)
            yield None
            return
        check_run(run, inputs)
        try:
            finished = len(torch.load(file, map_location="cpu", mmap=True)["epochs"])
        except Exception as error:  # torch raises whatever its pickle holds
            raise ResumeError(
                f"{file} is damaged ({type(error).__name__}), so the training cannot go on; delete {run} to start anew "
                "(on the command line: --restart)"
            ) from error
        print(f"continuing after epoch {finished} of {settings.epochs}", file=sys.stderr)
        yield file


def _is_last(epochs: Sequence[Measured], settings: TrainingSettings) -> bool:
    """Whether enough answers are right, or the loss of held-out examples has not fallen for long enough."""
    if settings.enough is not None and epochs[-1].right >= settings.enough:
        return True
    losses = [epoch.held_out_loss for epoch in epochs if epoch.held_out_loss is not None]
    if settings.patience is None or len(losses) <= settings.patience:
        return False
    return min(losses[-settings.patience :]) >= min(losses[: -settings.patience])


def _collated(model: PreTrainedModel, items: Sequence[Item]) -> dict[str, Tensor]:
    """The arguments of the model's forward."""
    batch = pad([item.ids for item in items], int(model.config.pad_token_id or 0))
    labels = pad([item.answer for item in items], _IGNORED).ids
    if not model.config.is_encoder_decoder:
        labels = labels[:, 0]
    return {"input_ids": batch.ids, "attention_mask": batch.mask.long(), "labels": labels}


def _are_right(logits: Tensor, labels: Tensor) -> Tensor:
    """1.0 for each example of which every label is the most probable one, given those before it; else 0.0."""
    same = (logits.argmax(-1) == labels) | (labels == _IGNORED)
    return (same.flatten(1).all(1) if same.ndim > 1 else same).float()


@torch.no_grad()
def measured(model: PreTrainedModel, items: Sequence[Item]) -> tuple[float, float]:
    """The mean loss of examples, and the share that is answered right; without dropout."""
    training = model.training
    model.eval()
    loss = right = 0.0
    for start in range(0, len(items), _ROWS):
        batch = {name: part.to(model.device) for name, part in _collated(model, items[start : start + _ROWS]).items()}
        output = model(**batch)
        answered = _are_right(output.logits, batch["labels"])
        loss += float(output.loss) * len(answered)
        right += float(answered.sum())
    model.train(training)
    return loss / len(items), right / len(items)
