"""Names of places in a language model, where states are read or changed and matrices are written."""

from dataclasses import dataclass
from functools import total_ordering
from typing import Literal, Self, get_args

from lightedit.errors import ArgumentError

Name = Literal["embedding", "q", "k", "v", "attention_out", "attention", "mlp_gate", "mlp_in", "mlp", "block"]
"""The embedding, and the places of a block in the order in which they run."""

_ORDER = {name: index for index, name in enumerate(get_args(Name))}


@total_ordering
@dataclass(frozen=True, slots=True)
class Place:
    """One place in a model: a layer, and a name that means the same in every architecture.

    | name | its matrix | input | output |
    |---|---|---|---|
    | embedding | token embeddings, W [d, vocabulary]; the layer is 0 | token ids | the tokens' embeddings |
    | q, k, v | the attention's input matrices, or slices of one matrix | what the attention reads | queries, keys, values |
    | attention_out | the attention's output matrix | the heads' outputs | what the attention adds |
    | attention | - | what the attention reads | what the attention adds |
    | mlp_gate | the gate's matrix, where the MLP has a gate | what the MLP reads | the gate before its activation |
    | mlp_in | the MLP's first matrix; with a gate, the one without activation | what the MLP reads | its output |
    | mlp | the MLP's second matrix, which most editors write | the key k | what the MLP adds |
    | block | - | the residual stream before the block | the residual stream after it |

    Places sort in the order in which they run.

    Attributes:
        layer: index of the block.
        name: name of the place in the block.

    Raises:
        ArgumentError: the name is unknown.
    """  # noqa: E501

    layer: int
    name: Name = "mlp"

    def __post_init__(self) -> None:
        if self.name not in _ORDER:
            raise ArgumentError(f"place {self.name!r} is not known; places are {', '.join(_ORDER)}")

    @classmethod
    def from_key(cls, key: str) -> Self:
        """The place that has this `key`.

        Raises:
            ArgumentError: no place has it.
        """
        layer, _, name = key.partition("_")
        if not layer.isdigit() or (name or "mlp") not in _ORDER:
            raise ArgumentError(f"{key!r} names no place; a name is a layer such as '5', or '5_attention_out'")
        return cls(int(layer), name or "mlp")  # type: ignore[arg-type]

    @property
    def has_matrix(self) -> bool:
        """Whether a matrix belongs to it, as it does not to a block or an attention as a whole."""
        return self.name not in ("block", "attention")

    @property
    def key(self) -> str:
        """Name in files and logs, such as "5" for `Place(5, "mlp")` and "5_attention_out"."""
        return str(self.layer) if self.name == "mlp" else f"{self.layer}_{self.name}"

    def __str__(self) -> str:
        return f"layer {self.layer}" if self.name == "mlp" else f"layer {self.layer} {self.name}"

    def __lt__(self, other: "Place") -> bool:
        return (self.layer, _ORDER[self.name]) < (other.layer, _ORDER[other.name])
