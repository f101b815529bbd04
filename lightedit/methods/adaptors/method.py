"""The base of the editors that add an adaptor: where it acts, and how it is trained."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self, get_args

from lightedit.errors import ArgumentError
from lightedit.lm import LanguageModel, Place
from lightedit.lm.reading import Positions
from lightedit.methods.protocol import Method

Part = Literal["q", "k", "v", "attention_out", "attention", "mlp_gate", "mlp_in", "mlp", "block"]
Where = Literal["all", "prompt", "last"]


@dataclass(frozen=True)
class Adapting(Method):
    """Base of the methods that add an adaptor at one place.

    Attributes:
        layer: the layer.
        part: name of the place: "mlp" is the MLP's second matrix, "mlp_in" its first one.
        positions: the tokens whose outputs are replaced: "last" is the prompt's last token, by which the adaptor
            decides; "prompt" the whole prompt; "all" generated tokens, too. None is what suits the model: "last" for
            causal models.
        lr: Adam's learning rate.
        steps: training steps of each fact.
        seed: seed of the first values.

    Raises:
        ArgumentError: a value is out of range.
    """

    layer: int
    part: Part = "mlp"
    positions: Where | None = None
    lr: float = 0.1
    steps: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.layer, int) or self.layer < 0:
            raise ArgumentError(f"layer must be a whole number of at least 0, got {self.layer!r}")
        if self.part not in get_args(Part):
            raise ArgumentError(f"part is one of {', '.join(get_args(Part))}, got {self.part!r}")
        if self.positions is not None and self.positions not in get_args(Where):
            raise ArgumentError(f"positions is one of {', '.join(get_args(Where))}, or None, got {self.positions!r}")
        if not (self.lr > 0 and self.steps >= 1):
            raise ArgumentError(f"lr must be positive and steps at least 1, got {self.lr} and {self.steps}")

    @property
    def place(self) -> Place:
        """The place behind which the adaptor acts."""
        return Place(self.layer, self.part)

    @property
    def places(self) -> tuple[Place, ...]:
        return (self.place,)

    def at(self, layers: Sequence[int]) -> Self:
        if len(layers) != 1:
            raise ArgumentError(f"layers: {type(self).__name__} acts at one layer, got {list(layers)}")
        return replace(self, layer=layers[0])

    def check(self, lm: LanguageModel) -> None:
        """Raise ArgumentError for a layer that `lm` lacks, UnsupportedModelError for a place that it lacks."""
        lm.check_layers([self.layer])
        lm.module(self.place)

    def replaced(self, lm: LanguageModel) -> Positions:
        """The tokens whose outputs are replaced in `lm`."""
        return self.positions or lm.reading.positions
