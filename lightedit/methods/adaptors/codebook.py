"""GRACE's codebook: keys with radii, and the value that replaces a place's output near each key."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from lightedit.errors import ArgumentError
from lightedit.lm.changes import Adaptor
from lightedit.lm.place import Place
from lightedit.lm.prompt_adaptor import PromptAdaptor, same_device
from lightedit.lm.reading import Positions

PAD = -1
"""Fills up the labels of fewer tokens."""

# How far a query may be outside of a radius, as a share of the key's norm: a batch of another size rounds otherwise
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
_NARROW_TOLERANCE = 1e-2
_ROUGH = 1e-2  # error of a squared distance from a product in bfloat16, as a share of the squared norms
_FEW = 16  # keys of a query that may be nearest; with more, distances to all are computed


@dataclass(frozen=True)
class Codebook(PromptAdaptor):
    """The n entries that one or several rounds wrote.

    A prompt's query is the place's input at its query token. If it is within the radius of its nearest key, by
    Euclidean distance, the key's value replaces the place's output.

    Attributes:
        keys: [n, d_in].
        values: [n, d_out].
        radii: ε, [n].
        labels: token ids of each entry's target, [n, tokens], filled up with `PAD`.
        index: the index of each entry in the codebook of all rounds, [n]. An entry of a later round takes the place of
            an earlier one with its index.
        positions: the tokens whose outputs a value replaces.
        published: search as the published code does: distances from a matrix product, which may be 1e-2 of a vector to
            itself, and no tolerance for rounding.
    """

    keys: Tensor
    values: Tensor
    radii: Tensor
    labels: Tensor
    index: Tensor
    positions: Positions = "last"
    published: bool = False

    kind: ClassVar[str] = "codebook"

    def __len__(self) -> int:
        return len(self.keys)

    @classmethod
    def empty(
        cls, d_in: int, d_out: int, positions: Positions, published: bool = False, dtype: torch.dtype = torch.float32
    ) -> "Codebook":
        """A codebook without entries."""
        keys, values, radii = (torch.zeros(shape, dtype=dtype) for shape in ((0, d_in), (0, d_out), (0,)))
        whole = torch.zeros(0, dtype=torch.long)
        return cls(keys, values, radii, whole[:, None], whole, positions, published)

    def check(self, place: Place, shape: tuple[int, int]) -> None:
        own = (self.values.shape[-1], self.keys.shape[-1])
        if own != tuple(shape):
            raise ArgumentError(f"{place}: a codebook of {own} outputs and inputs does not fit a place of {shape}")

    def nearest(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """The distance of each query [rows, d_in] to its nearest key, and that key's index, [rows] each."""
        if self.published or not len(queries):
            distances, index = self.distances(queries).min(1)
            return distances, index
        keys = self.keys.to(queries.device)
        queries = queries.to(keys.dtype)
        # a product, of whatever precision, finds the keys that may be nearest; the distances to them are exact
        squares = keys.square().sum(1)
        rough = torch.addmm(squares, queries, keys.T, alpha=-2)
        slack = _ROUGH * (queries.square().sum(1) + squares.max())
        row, key = (rough <= (rough.min(1).values + slack)[:, None]).nonzero().T
        if len(row) > _FEW * len(queries):
            distances, index = self.distances(queries).min(1)
            return distances, index
        exact = torch.full_like(rough, torch.inf)
        exact[row, key] = (queries[row] - keys[key]).norm(dim=1)
        distances, index = exact.min(1)
        return distances, index

    def distances(self, queries: Tensor) -> Tensor:
        """Euclidean distances of queries [rows, d_in] to all keys, [rows, n]."""
        keys = self.keys.to(queries.device)
        mode = "use_mm_for_euclid_dist_if_necessary" if self.published else "donot_use_mm_for_euclid_dist"
        return torch.cdist(queries.to(keys.dtype), keys, compute_mode=mode)

    def covers(self, distance: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Whether queries at these distances from the keys `index` [rows] are within their radii, [rows] bool.

        Args:
            distance: [rows].
            index: [rows].
            dtype: the dtype in which the queries were computed.
        """
        radii = self.radii.to(distance)[index]
        if self.published:
            return distance <= radii
        share = _TOLERANCE.get(dtype, _NARROW_TOLERANCE)
        norms = self.keys.to(distance.device)[index].norm(dim=-1).to(distance)
        return distance <= radii + share * norms

    def decide(self, queries: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
        if not len(self):
            return torch.zeros(len(queries), dtype=torch.bool, device=queries.device), outputs
        distance, index = self.nearest(queries)
        return self.covers(distance, index, queries.dtype), self.values.to(queries.device)[index]

    def after(self, earlier: Adaptor) -> "Codebook | None":
        if not isinstance(earlier, Codebook):
            return None
        index = self.index.to(earlier.index.device)
        size = max((int(numbers.max()) + 1 for numbers in (earlier.index, index) if len(numbers)), default=0)
        width = max(earlier.labels.shape[1], self.labels.shape[1])
        mine, theirs = (_widened(each, width) for each in (self, earlier))
        whole = {}
        for name, old in theirs.tensors().items():
            new = mine.tensors()[name].to(old)
            both = old.new_empty(size, *old.shape[1:])
            both[earlier.index], both[index] = old, new
            whole[name] = both
        return Codebook(**whole, positions=self.positions, published=self.published)

    def norm(self) -> float:
        """Frobenius norm of the values."""
        return float(self.values.double().norm())

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Codebook":
        moved = {name: same_device(tensor, device, dtype) for name, tensor in self.tensors().items()}
        return Codebook(**moved, positions=self.positions, published=self.published)

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ("keys", "values", "radii", "labels", "index")}

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "published": self.published}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> "Codebook":
        own = {name: tensors[name] for name in ("keys", "values", "radii", "labels", "index")}
        return cls(**own, positions=settings["positions"], published=settings["published"])


def _widened(book: Codebook, width: int) -> Codebook:
    """The codebook with labels of `width` tokens."""
    labels = F.pad(book.labels, (0, width - book.labels.shape[1]), value=PAD)
    return replace(book, labels=labels)
