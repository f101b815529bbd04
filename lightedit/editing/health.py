"""Health of a model during a run: KL, perplexity and drift after rounds, and limits that end the run."""

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningModule, Trainer

from lightedit.data.texts import read_texts
from lightedit.editing.journal import RoundCallback
from lightedit.editing.module import EditModule
from lightedit.errors import ArgumentError, ArgumentTypeError
from lightedit.evaluation.held_out_text import HeldOutText, held_out_windows
from lightedit.lm import LanguageModel, Place
from lightedit.runs.tables import log_folder, write_table

OnLimit = Literal["stop", "roll_back"]

_FILE = "health.csv"


@dataclass(frozen=True)
class HealthLimits:
    """Limits on how far a run may change a model.

    Attributes:
        max_kl: limit of KL(edited || unedited) of the next token on text, in nats per token.
        max_perplexity_ratio: limit of the perplexity on the text, divided by that of the unedited model.
        max_update_norm: limit of the Frobenius norm of one round's ΔW, for each edited matrix.
        on_limit: what to do if a round passes a limit. stop ends the run after the round and keeps it. roll_back ends
            the run and takes the round back; the weights are then bit for bit those from before it.
        every: rounds between measurements; the last round is always measured.

    Raises:
        ArgumentError: a limit is not positive, `every` is below 1, or `on_limit` is unknown.
    """

    max_kl: float | None = None
    max_perplexity_ratio: float | None = None
    max_update_norm: float | None = None
    on_limit: OnLimit = "stop"
    every: int = 1

    def __post_init__(self) -> None:
        for name, limit in self.limits().items():
            if not limit > 0:
                raise ArgumentError(f"{name} must be positive, or None for no limit, got {limit}")
        if self.on_limit not in ("stop", "roll_back"):
            raise ArgumentError(f"on_limit is 'stop' or 'roll_back', got {self.on_limit!r}")
        if self.every < 1:
            raise ArgumentError(f"every must be at least 1 round, got {self.every}")

    def limits(self) -> dict[str, float]:
        """The limits that are set, by name."""
        return {name: value for name, value in asdict(self).items() if name.startswith("max_") and value is not None}

    def passed(self, record: dict[str, Any]) -> str | None:
        """A message that names the limit which a record of `Health` passes; None if it passes none."""
        for name, limit in self.limits().items():
            measured = name.removeprefix("max_")
            for key, value in record.items():
                # not "value > limit", because NaN, from a ruined model, must count as past any limit
                if key.split("/")[0] == measured and not value <= limit:
                    return f"{key} is {value:.4g}, past {name}={limit:g}"
        return None


class Health(RoundCallback):
    """Measures a model after rounds of a fit, and ends the fit if a limit is passed.

        health = Health("wiki.txt", limits=HealthLimits(max_kl=0.1, on_limit="roll_back"))
        edit = lightedit.edit(lm, facts, method, covariance=covariance, callbacks=[health])

    Args:
        texts: held-out text: token windows, a `.txt` file, or a data set (see `read_texts`), of which 2048 tokens are
            read; None lets the unedited model write the text.
        limits: the limits that end the fit; by default there are none.
        folder: folder for health.csv; by default that of the trainer's first logger, if there is one.

    Attributes:
        records: one for each measurement: "round", counted from 1; "facts" written so far; "kl"; "perplexity";
            "perplexity_ratio"; "drift", the Frobenius norm of W - W0 over all edited matrices; and for each edited
            matrix "weight_norm/layer_i" and this round's "update_norm/layer_i", with "layer_i_attention_out" for an
            attention's output matrix. A round that is rolled back has a record too.
        reason: the limit that was passed, with the value and the round; None if none was passed.

    Raises:
        FileNotFoundError: the text file does not exist.
    """

    def __init__(
        self,
        texts: Sequence[Sequence[int]] | str | Path | None = None,
        *,
        limits: HealthLimits | None = None,
        folder: str | Path | None = None,
    ) -> None:
        if isinstance(texts, str | Path):
            read_texts(texts)  # a missing file is reported here, before a model is loaded and facts are scored
        self.texts, self.limits = texts, limits or HealthLimits()
        self.folder = None if folder is None else Path(folder)
        self.records: list[dict[str, Any]] = []
        self.reason: str | None = None
        self._text: HeldOutText | None = None

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Measure the unedited model on the text, and take over records of rounds that an earlier process finished."""
        if not isinstance(module, EditModule):
            raise ArgumentTypeError(f"Health watches an EditModule, got {type(module).__name__}")
        assert module.edit is not None
        with module.lm.weights.unedited():
            self._text = HeldOutText(module.lm, held_out_windows(module.lm, self.texts))
        self.records = list(module.edit.tables.get("health", []))
        module.edit.tables["health"] = self.records
        self.reason = module.edit.record.stopped

    def on_round_written(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, EditModule) and module.edit is not None
        if len(module.edit.rounds) % self.limits.every and not module.in_last_round:
            return
        record = self._look(module)
        self.records.append(record)
        module.log_dict({f"health/{name}": float(value) for name, value in record.items() if name != "round"})
        folder = self.folder if self.folder is not None and trainer.is_global_zero else log_folder(trainer)
        if folder is not None:
            write_table(folder / _FILE, self.records)
        if passed := self.limits.passed(record):
            self._end(trainer, module, passed)

    @torch.no_grad()
    def _look(self, module: EditModule) -> dict[str, Any]:
        assert module.edit is not None and self._text is not None
        lm = module.lm
        nll, kl = self._text.measure()
        changes = module.edit.rounds[-1]
        places = [place for place in module.method.places if place.has_matrix]
        drift = [_norm(lm, place, lm.weights.base(place)) for place in places]
        return {
            "round": len(module.edit.rounds),
            "facts": len(module.edit.facts),
            "kl": kl,
            "perplexity": _exp(nll),
            "perplexity_ratio": _exp(nll - self._text.nll),
            "drift": sum(norm**2 for norm in drift) ** 0.5,
            **{f"weight_norm/layer_{place.key}": _norm(lm, place) for place in places},
            **{f"update_norm/layer_{place.key}": change.norm() for place, change in changes.items()},
        }

    def _end(self, trainer: Trainer, module: EditModule, passed: str) -> None:
        assert module.edit is not None
        round_ = len(module.edit.rounds)
        rolled_back = self.limits.on_limit == "roll_back"
        if rolled_back:
            # past keys still include this round's, which has no effect because no round follows
            module.roll_back()
        trainer.should_stop = True
        kept = "was rolled back" if rolled_back else "is kept"
        self.reason = f"stopped in round {round_}, which {kept}: {passed}; {len(module.edit.facts)} facts are written"
        module.edit.record.stopped = self.reason
        warnings.warn(self.reason, stacklevel=1)


def _norm(lm: LanguageModel, place: Place, base: torch.Tensor | None = None) -> float:
    """Frobenius norm of a weight, or of its difference from `base`, in float32 or wider."""
    dtype = torch.promote_types(lm.dtype, torch.float32)
    weight = lm.weight(place).to(dtype)
    return float((weight if base is None else weight - base.to(dtype)).norm())


def _exp(value: float) -> float:
    """e to the power of `value`; infinity, instead of an error, on overflow."""
    return torch.tensor(value, dtype=torch.float64).exp().item()
