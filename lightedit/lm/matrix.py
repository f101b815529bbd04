"""The name of a matrix that edits write: its layer, and whether it is the MLP's or the attention's."""

from typing import Literal, NamedTuple, Self

Part = Literal["mlp", "attention"]


class Matrix(NamedTuple):
    """The output matrix of the MLP, or of the attention, in one block.

    The MLP's is what a layer's number alone means: `Matrix(5) == 5`, with one hash, so that `edit.rounds[0][5]` finds
    it in a dictionary of matrices. In a layer the attention's sorts first, as it runs and is written first.

    Attributes:
        layer: index of the block.
        part: the module inside of it.
    """

    layer: int
    part: Part = "mlp"

    @classmethod
    def of(cls, matrix: "int | Matrix") -> "Matrix":
        """`matrix` itself, or the MLP's of a layer."""
        return matrix if isinstance(matrix, Matrix) else cls(matrix)

    @classmethod
    def from_key(cls, key: str) -> Self:
        """The matrix of that `key`.

        Raises:
            ValueError: there is none.
        """
        layer, _, part = key.partition("_")
        if part not in ("", "attention"):
            raise ValueError(f"{key!r} names no matrix; a name is a layer such as '5', or '5_attention'")
        return cls(int(layer), "attention" if part else "mlp")

    @property
    def key(self) -> str:
        """Its name in files and logs: "5" for the MLP's, "5_attention" for the attention's."""
        return str(self.layer) if self.part == "mlp" else f"{self.layer}_{self.part}"

    def __str__(self) -> str:
        return f"layer {self.layer}" if self.part == "mlp" else f"layer {self.layer} {self.part}"

    def __eq__(self, other: object) -> bool:
        if isinstance(other, int):
            return self.part == "mlp" and self.layer == other
        return isinstance(other, Matrix) and tuple.__eq__(self, other)

    def __ne__(self, other: object) -> bool:  # a tuple has one of its own
        return not self == other

    def __hash__(self) -> int:
        return hash(self.layer) if self.part == "mlp" else tuple.__hash__(self)
