"""Trials of settings on one model, and the settings that came out best."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import yaml

from lightedit.data.prompts import ContextSettings
from lightedit.data.words import counted
from lightedit.errors import ArgumentError
from lightedit.methods.closed_form.memit import MEMIT
from lightedit.methods.closed_form.stopping import MostProbable
from lightedit.methods.closed_form.value_settings import ValueSettings

FORMAT = 3
# Most facts are done after about 20 steps; facts about one subject need more
_STEPS = 60
_STOPPING = MostProbable(extra_steps=15)
_FIGURES = ("held", "PS", "NS")


@dataclass(frozen=True)
class TuningSettings:
    """Settings of the search for a method's settings.

    Attributes:
        facts: facts that each trial edits.
        depths: depths at which values are searched, as shares of the model's blocks.
        lr: learning rate, as a share of h0's root mean square.
        clamps: bounds of ||δ|| / ||h0||; the first is tried at every depth, the others at the best one.
        shares: shares of the residuals that a solve writes, all tried at every depth, in one layer and in several.
        seed: seed of the self-generated text on which the covariance is estimated.
    """

    facts: int = 8
    depths: tuple[float, ...] = (0.1, 0.18, 0.29, 0.4)
    lr: float = 0.3
    clamps: tuple[float, ...] = (1.0, 1.5)
    shares: tuple[float, ...] = (0.3, 0.6, 0.9)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.facts < 1:
            raise ArgumentError(f"facts must be at least 1, got {self.facts}")
        if not (self.lr > 0 and self.depths and self.clamps and self.shares):
            raise ArgumentError(f"lr must be positive, and depths, clamps and shares must not be empty, got {self}")
        if not all(0 <= depth < 1 for depth in self.depths) or not all(0 < share < 1 for share in self.shares):
            raise ArgumentError(f"depths are from 0 to 1, and shares between 0 and 1, got {self}")
        if not all(clamp > 0 for clamp in self.clamps):
            raise ArgumentError(f"clamps must be positive, got {self.clamps}")


@dataclass(frozen=True)
class Trial:
    """The figures of one combination of settings, after one pass.

    Attributes:
        layers: the edited layers; values are found at the last.
        clamp: bound of ||δ|| / ||h0||.
        share: share of the residuals that each solve writes.
        held: facts whose whole target is the model's prediction, in percent.
        PS: paraphrase score, in percent.
        NS: neighbourhood score, in percent.
        NS_before: that of the unedited model.
    """

    layers: tuple[int, ...]
    clamp: float
    share: float
    held: float
    PS: float
    NS: float
    NS_before: float

    @property
    def score(self) -> float:
        """Harmonic mean of `held`, PS and 100 minus twice the share of NS that is lost; the best trial has the highest.

        What is lost counts twice: a neighbour that breaks goes unseen, a fact that does not hold is reported.
        """
        lost = max(0.0, 100 - 100 * self.NS / self.NS_before) if self.NS_before else 0.0
        parts = (self.held, self.PS, max(0.0, 100 - 2 * lost))
        return len(parts) / sum(1 / part for part in parts) if all(parts) else 0.0


@dataclass(frozen=True)
class Tuning:
    """The result of `tune`: what was tried, with its figures, and the settings that came out best.

    Attributes:
        model: name of the model.
        fingerprint: fingerprint of its unedited weights.
        settings: settings of the search.
        trials: the trials, in the order in which they were made.
    """

    model: str
    fingerprint: str
    settings: TuningSettings
    trials: tuple[Trial, ...] = field(default_factory=tuple)

    @property
    def best(self) -> Trial:
        """The trial with the highest score; of equal ones, the one that writes least."""
        return max(self.trials, key=lambda trial: (trial.score, -trial.share, -trial.clamp))

    @property
    def method(self) -> MEMIT:
        """MEMIT with the best settings."""
        best = self.best
        return method_with(self.settings, best.layers, best.clamp, best.share)

    @property
    def summary(self) -> str:
        """The best settings in one line."""
        best = self.best
        return (
            f"MEMIT at layers {list(best.layers)}, share {best.share:g}, clamp {best.clamp:g}, "
            f"lr {self.settings.lr:g} of the activations' size"
        )

    def table(self) -> str:
        """The trials as aligned text, best last."""
        head = ("layers", "clamp", "share", *_FIGURES, "score")
        lines = [head] + [
            (
                str(list(trial.layers)),
                f"{trial.clamp:g}",
                f"{trial.share:g}",
                *(f"{getattr(trial, name):.1f}" for name in _FIGURES),
                f"{trial.score:.1f}",
            )
            for trial in sorted(self.trials, key=lambda trial: trial.score)
        ]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)

    def config(self, dtype: str) -> str:
        """The settings as a file for `lightedit edit --config`, with the figures of the best trial as a comment.

        Args:
            dtype: dtype of the model, for the file.
        """
        best, method = self.best, self.method
        figures = ", ".join(f"{name} {getattr(best, name):.1f}" for name in _FIGURES)
        values = {
            "lr": method.values.lr,
            "relative_lr": True,
            "steps": method.values.steps,
            "clamp_norm_factor": best.clamp,
            "kl_factor": method.values.kl_factor,
            "weight_decay": method.values.weight_decay,
            "stopping": {"extra_steps": _STOPPING.extra_steps},
        }
        settings = {
            "layers": list(best.layers),
            "share": best.share,
            "passes": method.passes,
            "contexts": {"separate": True},
            "values": values,
        }
        content = {"lm": self.model, "dtype": dtype, "method": {"class_path": "lightedit.MEMIT", "init_args": settings}}
        head = f"# tuned on {counted(self.settings.facts)}: {figures} (NS {best.NS_before:.1f} before)\n"
        return head + yaml.safe_dump(content, sort_keys=False, default_flow_style=None)

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """Build from what `to_dict` returned, after it went through JSON."""
        settings = {name: _tuples(value) for name, value in content["settings"].items()}
        trials = (Trial(**{name: _tuples(value) for name, value in trial.items()}) for trial in content["trials"])
        return cls(content["model"], content["fingerprint"], TuningSettings(**settings), tuple(trials))


def method_with(settings: TuningSettings, layers: Sequence[int], clamp: float, share: float) -> MEMIT:
    """MEMIT with these settings. Facts that do not hold after one pass get a second one."""
    lr = settings.lr
    values = ValueSettings(lr=lr, relative_lr=True, clamp_norm_factor=clamp, steps=_STEPS, stopping=_STOPPING)
    return MEMIT(tuple(layers), values=values, contexts=ContextSettings(separate=True), share=share, passes=2)


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
