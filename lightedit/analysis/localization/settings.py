"""Settings of a localisation study, shared by Python and the command line."""

from dataclasses import dataclass
from typing import Literal, get_args

from lightedit.analysis.settings import TraceSettings
from lightedit.errors import ArgumentError
from lightedit.lm import LanguageModel

Problem = Literal["injection", "reversal", "erasure", "amplification", "forcing"]
"""What an edit is for.

injection: make the model state the new target.
reversal: make it state what it says when the subject is noised.
erasure: lower the probability of the true answer.
amplification: raise the probability of the true answer.
forcing: make it state the true answer when the subject is noised.
"""

Overall = Literal["three", "four"]

_LAYERS = 8  # of a study by default


@dataclass(frozen=True)
class LocalizationSettings:
    """Settings of a localisation study.

    Attributes:
        problems: what the edits are for, some of injection, reversal, erasure, amplification and forcing.
        layers: layers that are edited, each by itself; by default 8 evenly spaced ones, the first and last included.
        windows: numbers of layers whose MLPs are restored together when facts are traced.
        effect_window: the window whose effect is tabled beside the scores, and which the regressions take.
        largest_effect: larger tracing effects are cut to this. Effects are shares of P - P*, which can be tiny, so that
            they have outliers; null leaves them, as published.
        samples: noised runs of each fact, in tracing, reversal and forcing.
        noise: ν, as a multiple of the standard deviation of the embedding's output at the subjects' tokens.
        noise_level: ν itself; by default it follows from `noise`.
        seed: seed of the noise and of the sampled texts.
        same_noise: whether forcing is scored under the noise with which values were searched, rather than under other
            draws.
        min_probability: leave out facts whose true answer is less probable than this.
        continuation_tokens: leave out facts whose greedy continuation of so many tokens lacks the true answer; 0 does
            not ask.
        reversal_tokens: tokens of what the model says under noise, the target of reversal; by default as many as the
            true answer has.
        essence_texts: texts sampled from "{subject} is a" for the essence score.
        essence_tokens: tokens of each of them at most, that prompt included.
        overall: the overall score is the mean of rewrite, paraphrase and neighborhood (three), or of these and essence
            (four).
        facts_per_chunk: facts whose values are searched together, and that are stored together.
        progress_bar: show progress and the time left on standard error.

    Raises:
        ArgumentError: a value is out of range.
    """

    problems: tuple[Problem, ...] = get_args(Problem)
    layers: tuple[int, ...] | None = None
    windows: tuple[int, ...] = (10, 5, 3, 1)
    effect_window: int = 5
    largest_effect: float | None = 1.0
    samples: int = 10
    noise: float = 3.0
    noise_level: float | None = None
    seed: int = 0
    same_noise: bool = False
    min_probability: float = 0.02
    continuation_tokens: int = 36
    reversal_tokens: int | None = None
    essence_texts: int = 5
    essence_tokens: int = 100
    overall: Overall = "three"
    facts_per_chunk: int = 8
    progress_bar: bool = True

    def __post_init__(self) -> None:
        for name in ("problems", "windows"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))
            if not self.layers or list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 0:
                raise ArgumentError(f"layers must be ascending, distinct and not negative, got {list(self.layers)}")
        unknown = [problem for problem in self.problems if problem not in get_args(Problem)]
        if unknown or not self.problems or len(set(self.problems)) < len(self.problems):
            known = ", ".join(get_args(Problem))
            raise ArgumentError(f"problems are some of {known}, each once, got {list(self.problems)}")
        if not self.windows or min(self.windows) < 1 or len(set(self.windows)) < len(self.windows):
            raise ArgumentError(f"windows must be distinct numbers of layers, at least 1, got {list(self.windows)}")
        if self.effect_window not in self.windows:
            raise ArgumentError(f"effect_window: {self.effect_window} is none of the windows {list(self.windows)}")
        if self.largest_effect is not None and not self.largest_effect > 0:
            raise ArgumentError(f"largest_effect must be positive, got {self.largest_effect}")
        for name in ("reversal_tokens", "essence_texts", "facts_per_chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ArgumentError(f"{name} must be at least 1, got {value}")
        if self.continuation_tokens < 0 or self.essence_tokens < 2:
            raise ArgumentError(
                f"continuation_tokens must not be negative and essence_tokens be at least 2, got "
                f"{self.continuation_tokens} and {self.essence_tokens}"
            )
        if not 0 <= self.min_probability < 1:
            raise ArgumentError(f"min_probability is a share, at least 0 and below 1, got {self.min_probability}")
        if self.overall not in get_args(Overall):
            raise ArgumentError(f"overall is one of {', '.join(get_args(Overall))}, got {self.overall!r}")
        self.tracing(self.windows[0])  # checks its own

    def tracing(self, window: int, noise_level: float | None = None, other: bool = False) -> TraceSettings:
        """The settings with which facts are traced with a window of this many layers.

        Args:
            window: number of layers.
            noise_level: ν; by default that of these settings.
            other: whether noise is drawn with another seed.
        """
        return TraceSettings(
            samples=self.samples,
            noise=self.noise,
            noise_level=self.noise_level if noise_level is None else noise_level,
            seed=self.seed + other,
            kinds=("mlp",),
            window=window,
            severed=False,
            answer="joint",
            only_known=False,
            progress_bar=False,
        )

    def layers_of(self, lm: LanguageModel) -> tuple[int, ...]:
        """The layers that are edited.

        Raises:
            ArgumentError: the model lacks one of them, or has fewer layers than a window.
        """
        if max(self.windows) > lm.n_layers:
            raise ArgumentError(
                f"windows: {max(self.windows)} layers, but {lm.name} has {lm.n_layers}; give smaller ones, such as "
                f"windows=(1,) with effect_window=1"
            )
        if self.layers is not None:
            lm.check_layers(self.layers)
            return self.layers
        count = min(_LAYERS, lm.n_layers)
        return tuple(round(i * (lm.n_layers - 1) / max(1, count - 1)) for i in range(count))
