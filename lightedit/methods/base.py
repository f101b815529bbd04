"""What a locate-then-edit method has to say: where values are found, what is preserved, how residuals are spread."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from lightedit.data.prompts import ContextSettings
from lightedit.update import Preservation
from lightedit.values import Site, ValueSettings


@dataclass(frozen=True)
class Method(ABC):
    """Base of the methods: a frozen description that the engine reads.

    Attributes:
        layers: the edited layers, ascending; values are found at the last of them.
        values: settings of the value optimisation.
        contexts: how the contexts of keys and values are sampled.
        site: where δ is added: the block's output or its MLP's.
        gamma: γ of the closed form; 0 writes residuals exactly.
        facts_per_solve: the most facts that one solve takes; None for any number.
    """

    layers: tuple[int, ...]
    values: ValueSettings = field(default_factory=ValueSettings)
    contexts: ContextSettings = field(default_factory=ContextSettings)

    site: ClassVar[Site] = "block"
    gamma: ClassVar[float] = 1.0
    facts_per_solve: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", _as_layers(self.layers))

    @property
    def value_layer(self) -> int:
        """The last edited layer, where the values are found."""
        return self.layers[-1]

    @abstractmethod
    def preservation(self, covariance: Tensor) -> Preservation:
        """The preservation term A from one layer's mean second moment C0, [d_in, d_in]."""

    def spread(self, layer: int) -> float:
        """The share of the residual still standing that `layer` takes: 1 / (L - l + 1), counted in edited layers."""
        return 1 / (len(self.layers) - self.layers.index(layer))

    def to_dict(self) -> dict[str, Any]:
        """Name and settings, for provenance."""
        return {"name": type(self).__name__, **asdict(self)}


def _as_layers(layers: Sequence[int] | int) -> tuple[int, ...]:
    result = (layers,) if isinstance(layers, int) else tuple(int(layer) for layer in layers)
    if not result or list(result) != sorted(set(result)) or result[0] < 0:
        raise ValueError(f"layers must be ascending, distinct and not negative, got {layers!r}")
    return result
