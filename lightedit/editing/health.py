"""Health of a model that is edited round after round: how far it drifts from the unedited one, and when to stop."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import Callback, LightningModule, Trainer

from lightedit.data.texts import read_texts
from lightedit.editing.module import EditModule
from lightedit.evaluation.held_out_text import HeldOutText, held_out_windows
from lightedit.runs.tables import log_folder, write_table

OnLimit = Literal["stop", "roll_back"]

_FILE = "health.csv"


class Health(Callback):
    """Watches a model while rounds of facts are written into it, and ends the fit when a limit is passed.

        health = Health("wiki.txt", max_kl=0.1, on_limit="roll_back")
        edit = lightedit.edit(lm, facts, method, covariance, facts_per_round=100, callbacks=[health])

    Args:
        texts: held-out text: token windows, a `.txt` file, or a data set (see `read_texts`), of which 2048 tokens are
            taken; None lets the unedited model write them.
        max_kl: limit of KL(edited || unedited) of the next token, in nats per token.
        max_perplexity_ratio: limit of the perplexity on the text over that of the unedited model.
        max_update_norm: limit of the Frobenius norm of one round's ΔW, for each edited matrix.
        on_limit: once a limit is passed, "stop" ends the fit after this round and keeps it; "roll_back" takes it back
            too, so that the weights are bit for bit those before the round.
        every: rounds between looks at the model; the last round is always looked at.
        folder: where health.csv goes; default: the folder of the trainer's first logger, if there is one.

    Attributes:
        records: one for each look: "round", counted from 1; "facts" written so far; "kl"; "perplexity";
            "perplexity_ratio"; "drift", the Frobenius norm of W - W0 over all edited matrices; and of each
            "weight_norm/layer_i" and "update_norm/layer_i" of this round; an attention's are "layer_i_attention_out".
            A round that is rolled back has a record too.
        reason: which limit was passed, by what value and in which round; None while all is well.

    Raises:
        ValueError: a limit that is not positive, `every` below 1, an unknown `on_limit`.
        FileNotFoundError: there is no such text file.
    """

    def __init__(
        self,
        texts: Sequence[Sequence[int]] | str | Path | None = None,
        max_kl: float | None = None,
        max_perplexity_ratio: float | None = None,
        max_update_norm: float | None = None,
        on_limit: OnLimit = "stop",
        every: int = 1,
        folder: str | Path | None = None,
    ) -> None:
        self._limits = {
            "max_kl": max_kl,
            "max_perplexity_ratio": max_perplexity_ratio,
            "max_update_norm": max_update_norm,
        }
        for name, limit in self._limits.items():
            if limit is not None and not limit > 0:
                raise ValueError(f"{name} must be positive, or None for no limit, got {limit}")
        if on_limit not in ("stop", "roll_back"):
            raise ValueError(f"on_limit is 'stop' or 'roll_back', got {on_limit!r}")
        if every < 1:
            raise ValueError(f"every must be at least 1 round, got {every}")
        if isinstance(texts, str | Path):
            read_texts(texts)  # what is missing is found out now, not when a model is loaded and facts are scored
        self.texts, self.on_limit, self.every = texts, on_limit, every
        self.folder = None if folder is None else Path(folder)
        self.records: list[dict[str, Any]] = []
        self.reason: str | None = None
        self._text: HeldOutText | None = None
        self._resumed = False

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if not isinstance(module, EditModule):
            raise TypeError(f"Health watches an EditModule, got {type(module).__name__}")
        self._resumed, self.records, self.reason = False, [], None
        with module.lm.weights.unedited():
            self._text = HeldOutText(module.lm, held_out_windows(module.lm, self.texts))

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        if not self._resumed:
            self._resume(module)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        if not self._resumed:  # no epoch was left to do
            self._resume(module)

    def _resume(self, module: LightningModule) -> None:
        # after a checkpoint's hook: what an earlier process found of the rounds that it kept
        assert isinstance(module, EditModule) and module.edit is not None
        self.records = list(module.edit.tables.get("health", []))
        module.edit.tables["health"] = self.records
        self.reason = module.edit.provenance.get("stopped")
        self._resumed = True

    def _folder(self, trainer: Trainer) -> Path | None:
        return self.folder if self.folder is not None and trainer.is_global_zero else log_folder(trainer)

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        # before the module's own hook, which then validates what stays
        assert isinstance(module, EditModule) and module.edit is not None
        if len(module.edit.rounds) % self.every and not module.in_last_round:
            return
        record = self._look(module)
        self.records.append(record)
        module.log_dict({f"health/{name}": float(value) for name, value in record.items() if name != "round"})
        folder = self._folder(trainer)
        if folder is not None:
            write_table(folder / _FILE, self.records)
        if passed := self._passed(record):
            self._end(trainer, module, passed)

    @torch.no_grad()
    def _look(self, module: EditModule) -> dict[str, Any]:
        assert module.edit is not None and self._text is not None
        lm = module.lm
        nll, kl = self._text.measure()
        dtype = torch.promote_types(lm.dtype, torch.float32)
        drift = [
            (lm.weight(matrix).to(dtype) - lm.weights.base(matrix).to(dtype)).norm().item()
            for matrix in module.method.places
        ]
        return {
            "round": len(module.edit.rounds),
            "facts": len(module.edit.facts),
            "kl": kl,
            "perplexity": _exp(nll),
            "perplexity_ratio": _exp(nll - self._text.nll),
            "drift": sum(norm**2 for norm in drift) ** 0.5,
            **{f"weight_norm/layer_{m.key}": lm.weight(m).to(dtype).norm().item() for m in module.method.places},
            **{f"update_norm/layer_{m.key}": update.norm() for m, update in module.edit.rounds[-1].items()},
        }

    def _passed(self, record: dict[str, Any]) -> str | None:
        """Which limit `record` passes, if any."""
        for name, limit in self._limits.items():
            measured = name.removeprefix("max_")
            for key, value in record.items():
                # not "value > limit", because a ruined model's NaN is past any limit
                if limit is not None and key.split("/")[0] == measured and not value <= limit:
                    return f"{key} is {value:.4g}, past {name}={limit:g}"
        return None

    def _end(self, trainer: Trainer, module: EditModule, passed: str) -> None:
        assert module.edit is not None
        round_ = len(module.edit.rounds)
        if self.on_limit == "roll_back":
            # past keys that the method keeps still hold this round's, which is of no effect: none is written after it
            module.roll_back()
        trainer.should_stop = True
        kept = "was rolled back" if self.on_limit == "roll_back" else "is kept"
        self.reason = f"stopped in round {round_}, which {kept}: {passed}; {len(module.edit.facts)} facts are written"
        module.edit.provenance["stopped"] = self.reason
        warnings.warn(self.reason, stacklevel=1)


def _exp(value: float) -> float:
    """e to the power of `value`; infinity, not an error, where that is too large."""
    return torch.tensor(value, dtype=torch.float64).exp().item()
