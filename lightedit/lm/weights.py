"""Edited weight matrices, always materialised from a kept base, so that every edit can be undone exactly."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lightedit.lm.place import Place
from lightedit.ops import add_low_rank_
from lightedit.ops.add_low_rank import sum_dtype


@dataclass(frozen=True)
class LowRankUpdate:
    """A change of one weight matrix, ΔW = left @ right.T, of rank at most B; or several changes, batched.

    Attributes:
        left: [..., d_out, B].
        right: [..., d_in, B].

    Raises:
        ValueError: the factors are not matrices of equally many columns, or not equally many of them.
    """

    left: Tensor
    right: Tensor

    def __post_init__(self) -> None:
        left, right = tuple(self.left.shape), tuple(self.right.shape)
        if min(len(left), len(right)) < 2 or (*left[:-2], left[-1]) != (*right[:-2], right[-1]):
            raise ValueError(f"an update needs left [d_out, B] and right [d_in, B], got {left} and {right}")

    @property
    def rank(self) -> int:
        """B, the number of columns of both factors: an upper bound of the rank."""
        return self.left.shape[-1]

    def dense(self) -> Tensor:
        """ΔW, [..., d_out, d_in]."""
        return self.left @ self.right.mT

    def norm(self) -> float:
        """Frobenius norm of ΔW, of all changes together, from the factors' Gram matrices: ||L Rᵀ||² = <LᵀL, RᵀR>."""
        left, right = self.left.double(), self.right.double()
        return float(((left.mT @ left) * (right.mT @ right)).sum().clamp(min=0).sqrt())

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "LowRankUpdate":
        return LowRankUpdate(self.left.to(device, dtype), self.right.to(device, dtype))


class EditedWeights:
    """The weight matrices of one model, each as cast(base + sum of its active updates).

    The base is kept in the model's own dtype and the sum in float32 (float64 for a float64 model), so a bfloat16
    model does not drift over many rounds, and a matrix without updates is the base bit for bit. The same updates in
    the same order give the same bits, however they came about.

    Args:
        weight: name -> the live weight, as a [d_out, d_in] view that can be written.
    """

    def __init__(self, weight: Callable[[Place], Tensor]) -> None:
        self._weight = weight
        self._base: dict[Place, Tensor] = {}
        self._sum: dict[Place, Tensor] = {}
        self._updates: dict[Place, list[tuple[str, LowRankUpdate]]] = {}

    @property
    def owners(self) -> list[str]:
        """Names of the edits that are active, oldest first."""
        return list(dict.fromkeys(owner for updates in self._updates.values() for owner, _ in updates))

    @property
    def places(self) -> list[Place]:
        """The matrices that carry updates."""
        return sorted(self._updates)

    def base(self, matrix: Place) -> Tensor:
        """The unedited `matrix`, [d_out, d_in]."""
        return self._base.get(matrix, self._weight(matrix))

    def change(self, matrix: Place) -> LowRankUpdate:
        """All active updates of `matrix` as one, float32 or wider, on the CPU.

        Raises:
            KeyError: it carries none.
        """
        updates = [update for _, update in self._updates[matrix]]
        left, right = (
            torch.cat([getattr(update, name).detach().to("cpu") for update in updates], dim=1)
            for name in ("left", "right")
        )
        wide = torch.promote_types(left.dtype, torch.float32)
        return LowRankUpdate(left.to(wide), right.to(wide))

    @torch.no_grad()
    def add(self, owner: str, matrix: Place, update: LowRankUpdate) -> None:
        """Write `update` into `matrix` on behalf of the edit `owner`."""
        weight = self._weight(matrix)
        shape = (*update.left.shape[:-1], update.right.shape[-2])
        if shape != tuple(weight.shape):
            raise ValueError(f"{matrix}: an update of shape {shape} does not fit a weight of {tuple(weight.shape)}")
        if matrix not in self._base:
            self._base[matrix] = weight.clone()
        self._updates.setdefault(matrix, []).append((owner, update))
        self._accumulate(matrix, update)

    @torch.no_grad()
    def remove(self, owners: Collection[str]) -> None:
        """Undo the edits `owners`; other edits stay, in their order."""
        for matrix, updates in list(self._updates.items()):
            kept = [(owner, update) for owner, update in updates if owner not in owners]
            if len(kept) == len(updates):
                continue
            self._weight(matrix).copy_(self._base[matrix])
            self._sum.pop(matrix, None)
            self._updates[matrix] = kept
            for _, update in kept:
                self._accumulate(matrix, update)
            if not kept:
                del self._base[matrix], self._updates[matrix]

    @contextmanager
    def unedited(self) -> Iterator[None]:
        """Within the context, all matrices are the unedited ones; afterwards they are as before, bit for bit."""
        edited = {matrix: self._weight(matrix).clone() for matrix in self._base}
        for matrix, base in self._base.items():
            self._weight(matrix).copy_(base)
        try:
            yield
        finally:
            for matrix, weight in edited.items():
                self._weight(matrix).copy_(weight)

    def _accumulate(self, matrix: Place, update: LowRankUpdate) -> None:
        weight = self._weight(matrix)
        if weight.dtype != sum_dtype(weight) and matrix not in self._sum:
            self._sum[matrix] = self._base[matrix].to(sum_dtype(weight))
        left, right = update.left.to(weight.device), update.right.to(weight.device)
        add_low_rank_(weight, left, right, self._sum.get(matrix))
