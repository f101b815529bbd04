"""Attention and MLP of each block as sublayers of the residual stream: what enters them, and what they add to it."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightedit.errors import UnsupportedModelError
from lightedit.lm.batch import pad
from lightedit.lm.finder import is_norm, probe_tokens
from lightedit.lm.hooks import capture
from lightedit.lm.model import LanguageModel
from lightedit.lm.place import Name, Place

_LOOSE = 1e-3  # share of a state that may be missed by the sum that must give it
_FLOOR = 8  # roundings of a block's output that a difference from it may show


@dataclass(frozen=True)
class Sublayer:
    """The attention or the MLP of one block.

    Attributes:
        entry: the module whose input is the residual stream that the sublayer reads: the norm before it, or without one
            its own first module.
        matrix: the module whose output is the sublayer's: its last matrix.
        norm: the norm between that output and the residual stream; None without one.
    """

    entry: nn.Module
    matrix: nn.Module
    norm: nn.Module | None

    @property
    def exit(self) -> nn.Module:
        """The module whose output is added to the residual stream, but for a constant factor."""
        return self.matrix if self.norm is None else self.norm


@dataclass(frozen=True)
class Sublayers:
    """The sublayers of a model, first block to last.

    Attributes:
        attention: attention by layer.
        mlp: MLP by layer.
        parallel: whether each MLP reads the block's input h, as the attention does. In sequential blocks it reads
            h + a, the residual stream behind the attention.
    """

    attention: tuple[Sublayer, ...]
    mlp: tuple[Sublayer, ...]
    parallel: bool


@torch.no_grad()
def find_sublayers(lm: LanguageModel) -> Sublayers:
    """Find where the residual stream enters each attention and MLP, and the norms behind them, by a forward pass.

    A norm stands before the MLP if the MLP reads its output, and behind the attention if it reads the attention's
    output. What enters the MLP must be the block's input, or what the MLP's output is added to.

    Raises:
        UnsupportedModelError: a block lacks one of the places `attention_out` and `mlp_in`; or what enters an MLP is
            neither of both.
    """
    for name in ("attention_out", "mlp_in"):
        if name not in lm.architecture.names:
            raise UnsupportedModelError(
                f"{lm.name} has blocks without {name}, so what enters and leaves attention and MLP is not known; its "
                f"places are {', '.join(lm.architecture.names)}"
            )
    probe = _Probe(lm)
    mlp = tuple(probe.mlp(layer) for layer in range(lm.n_layers))
    attention = tuple(probe.attention(layer) for layer in range(lm.n_layers))
    return Sublayers(attention, mlp, all(map(probe.is_parallel, range(lm.n_layers))))


class _Probe:
    """What enters and leaves the norms, attention, MLP and block of every layer in one short pass."""

    def __init__(self, lm: LanguageModel) -> None:
        self.lm = lm
        self.norms: list[Mapping[str, nn.Module]] = [
            {path: part for path, part in block.named_modules() if is_norm(part)} for block in lm.blocks
        ]
        places: tuple[Name, ...] = ("attention_out", "mlp_in", "mlp", "block")
        modules = {f"{layer} {name}": lm.module(Place(layer, name)) for layer in range(lm.n_layers) for name in places}
        for layer, norms in enumerate(self.norms):
            modules |= {f"{layer} norm {path}": norm for path, norm in norms.items()}
        batch = pad([probe_tokens(lm.model, 3).tolist()], lm.pad_id)
        with capture(modules, 1, inputs=True) as self.entering, capture(modules, 1) as self.leaving:
            lm.forward(batch, keep=1)

    def attention(self, layer: int) -> Sublayer:
        """The attention of a block. What enters it is the block's input."""
        made = self.leaving[f"{layer} attention_out"]
        behind = [n for p, n in self.norms[layer].items() if _same(self.entering.get(f"{layer} norm {p}"), made)]
        matrix = self.lm.module(Place(layer, "attention_out"))
        return Sublayer(self.lm.blocks[layer], matrix, behind[0] if behind else None)

    def mlp(self, layer: int) -> Sublayer:
        """The MLP of a block, proven to read the block's input or what its output is added to."""
        entry = self._norm_before_mlp(layer)
        norm = self.lm.mlp_norm(layer)
        if not self.is_parallel(layer) and not self._follows(layer):
            raise UnsupportedModelError(
                f"{self.lm.name}: what enters the MLP of layer {layer} is neither the block's input nor what the MLP's "
                "output is added to; expected one of both, behind at most one norm"
            )
        first = self.lm.module(Place(layer, "mlp_in"))
        return Sublayer(first if entry is None else self.norms[layer][entry], self.lm.module(Place(layer)), norm)

    def is_parallel(self, layer: int) -> bool:
        """Whether the MLP reads the block's input."""
        return _same(self._entering_mlp(layer), self.entering[f"{layer} block"])

    def _norm_before_mlp(self, layer: int) -> str | None:
        read = self.entering[f"{layer} mlp_in"]
        before = [path for path in self.norms[layer] if _same(self.leaving.get(f"{layer} norm {path}"), read)]
        return before[0] if before else None

    def _entering_mlp(self, layer: int) -> Tensor:
        before = self._norm_before_mlp(layer)
        return self.entering[f"{layer} mlp_in" if before is None else f"{layer} norm {before}"]

    def _follows(self, layer: int) -> bool:
        """Whether the block's output, less what the MLP adds, is proportional to what enters the MLP."""
        path = self.lm.architecture.mlp_norm
        added = f"{layer} mlp" if self.lm.mlp_norm(layer) is None else f"{layer} norm {path}"
        device = self.leaving[f"{layer} block"].device
        left, made, entered = (
            state.to(device).double().flatten()
            for state in (self.leaving[f"{layer} block"], self.leaving[added], self._entering_mlp(layer))
        )
        rest = left - self.lm.anatomy.mlp_scale(layer) * made
        share = float(rest @ entered / (entered @ entered).clamp(min=1e-30))  # not 1 where the whole sum is scaled
        floor = _FLOOR * torch.finfo(self.lm.dtype).eps * (left.norm() + made.norm())
        return bool((rest - share * entered).norm() <= _LOOSE * rest.norm() + floor)


def _same(one: Tensor | None, other: Tensor) -> bool:
    """Whether two captured states are the same numbers, in whatever shape, once both have the dtype of `other`."""
    if one is None or one.numel() != other.numel():
        return False
    return torch.equal(one.flatten().to(other), other.flatten())
