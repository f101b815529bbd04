"""Edited weight matrices, always materialised from a kept base, so that every edit can be undone exactly."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lightedit.ops import add_low_rank_
from lightedit.ops.add_low_rank import sum_dtype


@dataclass(frozen=True)
class LowRankUpdate:
    """A change of one weight matrix, ΔW = left @ right.T, of rank at most B.

    Attributes:
        left: [d_out, B].
        right: [d_in, B].

    Raises:
        ValueError: the factors are not two matrices of equally many columns.
    """

    left: Tensor
    right: Tensor

    def __post_init__(self) -> None:
        left, right = tuple(self.left.shape), tuple(self.right.shape)
        if len(left) != 2 or len(right) != 2 or left[1] != right[1]:
            raise ValueError(f"an update needs left [d_out, B] and right [d_in, B], got {left} and {right}")

    @property
    def rank(self) -> int:
        """B, the number of columns of both factors: an upper bound of the rank."""
        return self.left.shape[1]

    def dense(self) -> Tensor:
        """ΔW, [d_out, d_in]."""
        return self.left @ self.right.T

    def norm(self) -> float:
        """Frobenius norm of ΔW, from the factors' Gram matrices: ||L Rᵀ||² = <LᵀL, RᵀR>."""
        left, right = self.left.double(), self.right.double()
        return float(((left.T @ left) * (right.T @ right)).sum().clamp(min=0).sqrt())

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "LowRankUpdate":
        return LowRankUpdate(self.left.to(device, dtype), self.right.to(device, dtype))


class EditedWeights:
    """The weight matrices of one model, each as cast(base + sum of its active updates).

    The base is kept in the model's own dtype and the sum in float32 (float64 for a float64 model), so a bfloat16
    model does not drift over many rounds, and a matrix without updates is the base bit for bit. The same updates in
    the same order give the same bits, however they came about.

    Args:
        matrix: layer -> the live weight, as a [d_out, d_in] view that can be written.
    """

    def __init__(self, matrix: Callable[[int], Tensor]) -> None:
        self._matrix = matrix
        self._base: dict[int, Tensor] = {}
        self._sum: dict[int, Tensor] = {}
        self._updates: dict[int, list[tuple[str, LowRankUpdate]]] = {}

    @property
    def owners(self) -> list[str]:
        """Names of the edits that are active, oldest first."""
        return list(dict.fromkeys(owner for updates in self._updates.values() for owner, _ in updates))

    @property
    def layers(self) -> list[int]:
        """The layers whose matrices carry updates."""
        return sorted(self._updates)

    def base(self, layer: int) -> Tensor:
        """The unedited matrix of `layer`, [d_out, d_in]."""
        return self._base.get(layer, self._matrix(layer))

    @torch.no_grad()
    def add(self, owner: str, layer: int, update: LowRankUpdate) -> None:
        """Write `update` into the matrix of `layer` on behalf of the edit `owner`."""
        weight = self._matrix(layer)
        shape = (update.left.shape[0], update.right.shape[0])
        if shape != tuple(weight.shape):
            raise ValueError(
                f"layer {layer}: an update of shape {shape} does not fit a weight of {tuple(weight.shape)}"
            )
        if layer not in self._base:
            self._base[layer] = weight.clone()
        self._updates.setdefault(layer, []).append((owner, update))
        self._accumulate(layer, update)

    @torch.no_grad()
    def remove(self, owners: Collection[str]) -> None:
        """Undo the edits `owners`; other edits stay, in their order."""
        for layer, updates in list(self._updates.items()):
            kept = [(owner, update) for owner, update in updates if owner not in owners]
            if len(kept) == len(updates):
                continue
            self._matrix(layer).copy_(self._base[layer])
            self._sum.pop(layer, None)
            self._updates[layer] = kept
            for _, update in kept:
                self._accumulate(layer, update)
            if not kept:
                del self._base[layer], self._updates[layer]

    @contextmanager
    def unedited(self) -> Iterator[None]:
        """Within the context, all matrices are the unedited ones; afterwards they are as before, bit for bit."""
        edited = {layer: self._matrix(layer).clone() for layer in self._base}
        for layer, base in self._base.items():
            self._matrix(layer).copy_(base)
        try:
            yield
        finally:
            for layer, weight in edited.items():
                self._matrix(layer).copy_(weight)

    def _accumulate(self, layer: int, update: LowRankUpdate) -> None:
        weight = self._matrix(layer)
        if weight.dtype != sum_dtype(weight) and layer not in self._sum:
            self._sum[layer] = self._base[layer].to(sum_dtype(weight))
        left, right = update.left.to(weight.device), update.right.to(weight.device)
        add_low_rank_(weight, left, right, self._sum.get(layer))
