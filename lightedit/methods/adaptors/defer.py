"""Defer (Mitchell et al., 2022, as in GRACE's tables): a gate and a linear predictor behind one place."""

from collections.abc import Mapping
from dataclasses import dataclass
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
class GatedPrediction(SoftAdaptor):
    """The output s v(q) + (1 - s) f(h), with s = σ(gate q + bias) and v linear. After training s counts as 0 or 1.

    Attributes:
        gate: [d_in].
        gate_bias: [1].
        weight: the predictor's matrix, [d_out, d_in].
        bias: its bias, [d_out].
        positions: the tokens whose outputs are replaced.
    """

    gate: Tensor
    gate_bias: Tensor
    weight: Tensor
    bias: Tensor
    positions: Positions = "last"

    kind: ClassVar[str] = "gated_prediction"

    def check(self, place: Place, shape: tuple[int, int]) -> None:
        if tuple(self.weight.shape) != tuple(shape):
            raise ArgumentError(f"{place}: a predictor of {tuple(self.weight.shape)} does not fit a place of {shape}")

    def _share(self, queries: Tensor) -> Tensor:
        """s of each row, [rows]."""
        return (queries.to(self.gate) @ self.gate + self.gate_bias).sigmoid()

    def _predicted(self, queries: Tensor) -> Tensor:
        return F.linear(queries.to(self.weight), self.weight, self.bias)

    def decide(self, queries: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
        own = self.to(queries.device)
        return own._share(queries) >= _HALF, own._predicted(queries)

    def mixed(self, queries: Tensor, output: Tensor) -> Tensor:
        share = self._share(queries)[:, None, None]
        return share * self._predicted(queries)[:, None] + (1 - share) * output

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ("gate", "gate_bias", "weight", "bias")}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> "GatedPrediction":
        own = {name: tensors[name] for name in ("gate", "gate_bias", "weight", "bias")}
        return cls(**own, positions=settings["positions"])


@dataclass(frozen=True)
class Defer(Soft):
    """Train a gate that decides, from a place's input, whether a linear predictor replaces its output.

    It is SERAC's idea behind one place, a baseline of GRACE's tables. Nothing teaches the gate not to act on other
    prompts, so it mostly acts on all of them after some edits.
    """

    editor_type: ClassVar[type[SoftEditor]] = SoftEditor

    def fresh(self, d_in: int, d_out: int, positions: Positions) -> GatedPrediction:
        draws = torch.Generator().manual_seed(self.seed)
        gate, gate_bias = uniform(draws, d_in, d_in), uniform(draws, d_in, 1)
        weight, bias = uniform(draws, d_in, d_out, d_in), uniform(draws, d_in, d_out)
        return GatedPrediction(gate, gate_bias, weight, bias, positions)
