"""Settings of causal tracing, shared by Python and the command line."""

from dataclasses import dataclass
from typing import Literal, get_args

from lightedit.errors import ArgumentError, UnsupportedModelError
from lightedit.lm import LanguageModel

Kind = Literal["state", "mlp", "attention"]
"""What is restored: a block's output, or the outputs of the MLPs or of the attentions of a window of layers."""
Part = Literal["mlp", "attention"]

SEVERED: dict[Part, str] = {"mlp": "mlp severed", "attention": "attention severed"}
"""Severed place -> the name, in tables, of the restorations of states past it."""

Answer = Literal["token", "joint"]
Distribution = Literal["normal", "uniform", "student"]
Tokens = Literal["all", "last subject"]


@dataclass(frozen=True)
class TraceSettings:
    """Settings of causal tracing.

    Attributes:
        samples: corrupted runs of each fact, over which probabilities are averaged.
        noise: ν, as a multiple of the standard deviation of the embedding's output at the subjects' tokens.
        noise_level: ν itself; by default it follows from `noise`.
        distribution: noise is ν times a standard normal number, a uniform one from -1 to 1, or one of Student's t with
            3 degrees of freedom.
        replace: the noise takes the place of the embeddings instead of being added to them.
        seed: seed of the noise. Each fact draws from its own generator, whatever the other facts are.
        kinds: what is restored, of state, mlp and attention.
        window: layers whose MLPs or attentions are restored together, around each layer; fewer at the edges.
        severed: also restore states of the last subject token with the outputs of all MLPs, or of all attentions, at
            that token as they are in the corrupted run.
        tokens: restore every token, or the last one of the subject only.
        answer: explain the probability of the answer's first token, or the joint probability of all its tokens.
        only_known: leave out facts whose answer (its first token, with `answer` token) is not what the model says. Else
            the model's own first token is explained in its place; a joint probability is always that of the answer.
        published: what the published code does differently: the same noise for all facts of one shape, drawn by NumPy
            with seed 1; ν from the subjects tokenised alone; averages over tokens rather than facts, in which one token
            can count in two classes.
        tokens_per_pass: most tokens of one forward pass; by default 1024 on a CPU, and on a GPU what its free memory
            allows.
        progress_bar: show progress and the time left on standard error.

    Raises:
        ArgumentError: a value is out of range.
    """

    samples: int = 10
    noise: float = 3.0
    noise_level: float | None = None
    distribution: Distribution = "normal"
    replace: bool = False
    seed: int = 0
    kinds: tuple[Kind, ...] = ("state", "mlp", "attention")
    window: int = 10
    severed: bool = True
    tokens: Tokens = "all"
    answer: Answer = "token"
    only_known: bool = True
    published: bool = False
    tokens_per_pass: int | None = None
    progress_bar: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "kinds", tuple(self.kinds))
        for name in ("samples", "window", "tokens_per_pass"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ArgumentError(f"{name} must be at least 1, got {value}")
        for name in ("noise", "noise_level"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ArgumentError(f"{name} must be a positive number, got {value}")
        unknown = [kind for kind in self.kinds if kind not in get_args(Kind)]
        if unknown or not self.kinds or len(set(self.kinds)) < len(self.kinds):
            raise ArgumentError(f"kinds are some of {', '.join(get_args(Kind))}, each once, got {list(self.kinds)}")
        for name, known in (("distribution", Distribution), ("tokens", Tokens), ("answer", Answer)):
            if getattr(self, name) not in get_args(known):
                raise ArgumentError(f"{name} is one of {', '.join(get_args(known))}, got {getattr(self, name)!r}")

    def check(self, lm: LanguageModel) -> None:
        """Check what the settings ask of a model.

        Raises:
            ArgumentError: the window has more layers than the model.
            UnsupportedModelError: a kind names a place that the architecture does not have in all its blocks.
        """
        if self.window > lm.n_layers and set(self.kinds) != {"state"}:
            raise ArgumentError(f"window: {self.window} layers, but {lm.name} has {lm.n_layers}; give fewer")
        for name in self.places:
            if name not in lm.architecture.names:
                raise UnsupportedModelError(
                    f"{lm.name} has blocks without {name} of their own, so its outputs cannot be restored; leave "
                    f"{name} out of kinds, and set severed to False"
                )

    @property
    def places(self) -> tuple[Part, ...]:
        """The names of the places whose outputs are needed."""
        return tuple(name for name in SEVERED if name in self.kinds or self.severed)
