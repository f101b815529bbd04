"""The training of a model on texts with answers, as a Lightning fit."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from lightning import LightningModule
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from lightedit.errors import ArgumentError
from lightedit.lm.batch import pad
from lightedit.progress import Report, progress, quiet_lightning
from lightedit.runs.trainer import own_trainer

_IGNORED = -100  # label of tokens without loss, in transformers' models


@dataclass(frozen=True)
class TrainingSettings:
    """How a small model is trained.

    Attributes:
        epochs: passes over the examples.
        lr: AdamW's learning rate at its highest, after a warm-up over a tenth of the steps; it then falls to 0.
        batch_size: examples of one step.
        weight_decay: AdamW's weight decay.
        held_out: share of the examples that are not trained on, but measured after each epoch; 0 for none.
        most_tokens: longest text that is trained on, in tokens; the rest of a longer one is left out.
        seed: seed of initialisation, order of the examples, and dropout.
        progress_bar: show progress and the time left on standard error.

    Raises:
        ArgumentError: a value is out of range.
    """

    epochs: int = 4
    lr: float = 5e-5
    batch_size: int = 32
    weight_decay: float = 0.01
    held_out: float = 0.1
    most_tokens: int = 128
    seed: int = 0
    progress_bar: bool = True

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch_size) < 1 or self.most_tokens < 2 or not self.lr > 0 or self.weight_decay < 0:
            raise ArgumentError(
                "epochs and batch_size must be at least 1, most_tokens at least 2, lr positive and weight_decay not "
                f"negative, got {self.epochs}, {self.batch_size}, {self.most_tokens}, {self.lr} and {self.weight_decay}"
            )
        if not 0 <= self.held_out < 1:
            raise ArgumentError(f"held_out is a share of the examples, from 0 to below 1, got {self.held_out}")


class Item(NamedTuple):
    """One example as the model is trained on it: token ids of the text, and the class or the answer's tokens."""

    ids: list[int]
    answer: list[int]


class Fitted(NamedTuple):
    """What a training gave.

    Attributes:
        trained: share of the trained examples whose whole answer is predicted at the end.
        held_out: the same of those not trained on; None without any.
        losses: mean loss of each epoch, in nats.
    """

    trained: float
    held_out: float | None
    losses: list[float]


class AnswerModule(LightningModule):
    """Trains a classifier or an encoder-decoder on the NLL of its answers, each token given those before it.

    Args:
        model: a transformers model for sequence classification, or an encoder-decoder.
        settings: how it is trained.
        steps: steps in all.
        report: called with (steps taken, steps in all).

    Attributes:
        losses: mean loss of each finished epoch.
    """

    def __init__(self, model: PreTrainedModel, settings: TrainingSettings, steps: int, report: Report) -> None:
        super().__init__()
        self.model, self.settings, self.steps, self.report = model, settings, steps, report
        self.losses: list[float] = []
        self._of_epoch: list[Tensor] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        self._of_epoch.append(loss.detach())
        self.report(self.global_step + 1, self.steps)
        return loss

    def on_train_epoch_end(self) -> None:
        self.losses.append(float(torch.stack(self._of_epoch).mean()))
        self._of_epoch = []

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=self.settings.lr, weight_decay=self.settings.weight_decay
        )
        warm = max(1, self.steps // 10)

        def share(step: int) -> float:
            rest = (self.steps - step) / max(1, self.steps - warm)
            return min((step + 1) / warm, max(0.0, rest))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(model: PreTrainedModel, items: Sequence[Item], settings: TrainingSettings, what: str) -> Fitted:
    """Train `model` on the examples, of which a share is held out, and leave it in evaluation mode on the CPU.

    Args:
        model: the model.
        items: the examples, at least one of which is left for training.
        settings: how it is trained.
        what: what is trained, for the progress bar.
    """
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(settings.seed)).tolist()
    apart = int(settings.held_out * len(items))
    held_out, trained = [items[i] for i in order[:apart]], [items[i] for i in order[apart:]]
    if not trained:
        raise ArgumentError(f"{len(items)} examples leave none to train on; give more, or a smaller held_out")
    pad_id = int(model.config.pad_token_id or 0)
    batches = DataLoader(
        trained,  # type: ignore[arg-type]
        settings.batch_size,
        shuffle=True,
        generator=torch.Generator().manual_seed(settings.seed),
        collate_fn=lambda part: _collated(model, part, pad_id),
    )
    steps = settings.epochs * len(batches)
    with (
        progress(what, settings.progress_bar) as report,
        quiet_lightning(),
        torch.random.fork_rng(),
    ):
        torch.manual_seed(settings.seed)
        module = AnswerModule(model.train().requires_grad_(True), settings, steps, report)
        trainer = own_trainer(
            accelerator="auto",
            max_epochs=settings.epochs,
            logger=False,
            enable_checkpointing=False,
            gradient_clip_val=1.0,
        )
        trainer.fit(module, batches)
    torch.nn.Module.to(model, "cpu")
    model.eval().requires_grad_(False)
    return Fitted(_right(model, trained, pad_id), _right(model, held_out, pad_id) if held_out else None, module.losses)


def _collated(model: PreTrainedModel, items: Sequence[Item], pad_id: int) -> dict[str, Tensor]:
    """The arguments of the model's forward."""
    batch = pad([item.ids for item in items], pad_id)
    labels = pad([item.answer for item in items], _IGNORED).ids
    if not model.config.is_encoder_decoder:
        labels = labels[:, 0]
    return {"input_ids": batch.ids, "attention_mask": batch.mask.long(), "labels": labels}


@torch.no_grad()
def _right(model: PreTrainedModel, items: Sequence[Item], pad_id: int) -> float:
    """The share of examples of which every token of the answer is the most probable one, given those before it."""
    right = 0
    for start in range(0, len(items), 64):
        batch = _collated(model, items[start : start + 64], pad_id)
        said, labels = model(**batch).logits.argmax(-1), batch["labels"]
        same = (said == labels) | (labels == _IGNORED)
        right += int(same.flatten(1).all(1).sum() if same.ndim > 1 else same.sum())
    return right / len(items)
