"""Memory (as in GRACE's tables): a softmax over learned values behind one place."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import log
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from lightedit.errors import ArgumentError
from lightedit.lm.place import Place
from lightedit.lm.reading import Positions
from lightedit.methods.adaptors.soft import Soft, SoftAdaptor, SoftEditor, uniform

_HALF = 0.5


@dataclass(frozen=True)
class SoftMemory(SoftAdaptor):
    """The output Σ a_i v_i + a_0 f(h), with a = softmax of linear scores of the query, and of a_0's own score.

    After training, a row whose a_0 is above one half keeps f(h).

    Attributes:
        keys: the scores' matrix, [entries, d_in].
        bias: their bias, [entries].
        values: v, [entries, d_out].
        own: the score of f(h), [1]; -infinity if it has none.
        positions: the tokens whose outputs are replaced.
    """

    keys: Tensor
    bias: Tensor
    values: Tensor
    own: Tensor
    positions: Positions = "last"

    kind: ClassVar[str] = "soft_memory"

    def check(self, place: Place, shape: tuple[int, int]) -> None:
        own = (self.values.shape[1], self.keys.shape[1])
        if own != tuple(shape):
            raise ArgumentError(f"{place}: a memory of {own} outputs and inputs does not fit a place of {shape}")

    def _shares(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """a_0 [rows, 1] and the others, [rows, entries]."""
        scores = F.linear(queries.to(self.keys), self.keys, self.bias)
        shares = torch.cat([self.own.expand(len(scores), 1), scores], 1).softmax(1)
        return shares[:, :1], shares[:, 1:]

    def decide(self, queries: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
        memory = self.to(queries.device)
        own, shares = memory._shares(queries)
        return own[:, 0] <= _HALF, shares @ memory.values + own * outputs

    def mixed(self, queries: Tensor, output: Tensor) -> Tensor:
        own, shares = self._shares(queries)
        return (shares @ self.values)[:, None] + own[..., None] * output

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ("keys", "bias", "values", "own")}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> "SoftMemory":
        own = {name: tensors[name] for name in ("keys", "bias", "values", "own")}
        return cls(**own, positions=settings["positions"])


@dataclass(frozen=True)
class Memory(Soft):
    """Train a memory of learned values, whose mean, weighted by a softmax of the place's input, replaces its output.

    It is a baseline of GRACE's tables. The place's own output takes part in the softmax, with one half at the start.

    Attributes:
        entries: number of values.
        published: leave the place's own output out, so that every prompt's output is replaced from the first edit on.
    """

    entries: int = 100
    published: bool = False

    editor_type: ClassVar[type[SoftEditor]] = SoftEditor

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.entries < 1:
            raise ArgumentError(f"entries must be at least 1, got {self.entries}")

    def fresh(self, d_in: int, d_out: int, positions: Positions) -> SoftMemory:
        draws = torch.Generator().manual_seed(self.seed)
        keys, bias = uniform(draws, d_in, self.entries, d_in), uniform(draws, d_in, self.entries)
        values = torch.rand(self.entries, d_out, generator=draws)
        own = -torch.inf if self.published else log(self.entries)
        return SoftMemory(keys, bias, values, torch.tensor([own]), positions)
