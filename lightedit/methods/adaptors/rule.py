"""GRACE's rule: which entry of a codebook is to answer a query, and what becomes of radii and labels."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lightedit.methods.adaptors.codebook import PAD, Codebook

Expand = Literal["coverage", "sum", "average"]

_ROUNDING = 1e-5  # what the published split takes from the radius of the earlier entry


@dataclass(frozen=True)
class Rule:
    """What becomes of a codebook when it is taught one more query.

    Attributes:
        radius: ε_init, in units of the queries.
        expand: how a radius grows to a query of the same label: "coverage" to the query's distance, as in the published
            code; "sum" by ε_init, as in the paper; "average" to its distance, and the key moves half the way there.
        published: compare labels by the mean of their token ids, split the nearest entry only, and set radii to half of
            the distance even if they were smaller.
    """

    radius: float
    expand: Expand
    published: bool

    def teach(self, book: Codebook, query: Tensor, label: tuple[int, ...]) -> tuple[Codebook, int, bool]:
        """Let one entry answer `query` with `label`.

        Args:
            book: the codebook, whose index counts from 0.
            query: [d_in].
            label: the token ids of the target.

        Returns:
            The new codebook, the entry whose value is to be trained, and whether that value starts anew.
        """
        if not len(book):
            return self._added(book, query, label, self.radius), 0, True
        distances = book.distances(query[None])[0].to(book.radii)
        nearest = int(distances.argmin())
        near, radius = float(distances[nearest]), float(book.radii[nearest])
        close = near <= radius + self.radius
        if close and self._same(book.labels[nearest], label):
            return self._expanded(book, query, nearest, near), nearest, False
        if self.published:
            if close:
                radii = book.radii.clone()
                radii[nearest] = near / 2 - _ROUNDING
                return self._added(replace(book, radii=radii), query, label, near / 2), len(book), True
            return self._added(book, query, label, self.radius), len(book), True
        at_key = replace(book, radii=torch.zeros_like(book.radii))
        one = torch.tensor([nearest], device=distances.device)
        if bool(at_key.covers(distances[one], one, query.dtype)):
            return self._renamed(book, nearest, label), nearest, True
        others = torch.tensor([not self._same(own, label) for own in book.labels], device=distances.device)
        hit = others & (distances <= book.radii + self.radius)
        halves = distances / 2
        radii = torch.where(hit, torch.minimum(book.radii, halves), book.radii)
        radius = min([self.radius, *halves[hit].tolist()])
        return self._added(replace(book, radii=radii), query, label, radius), len(book), True

    def _same(self, own: Tensor, label: tuple[int, ...]) -> bool:
        known = own[own != PAD]
        if self.published:
            return bool(known.float().mean() == torch.tensor(label).float().mean().to(known.device))
        return known.tolist() == list(label)

    def _expanded(self, book: Codebook, query: Tensor, entry: int, distance: float) -> Codebook:
        radii, keys = book.radii.clone(), book.keys
        if self.expand == "sum":
            radii[entry] += self.radius
        elif distance > float(radii[entry]):
            radii[entry] = distance
            if self.expand == "average":
                keys = keys.clone()
                keys[entry] = (keys[entry] + query.to(keys)) / 2
        return replace(book, radii=radii, keys=keys)

    def _renamed(self, book: Codebook, entry: int, label: tuple[int, ...]) -> Codebook:
        """The codebook with another label at an entry; its radius, which other labels may have halved, stays."""
        book = _wide_enough(book, label)
        labels = book.labels.clone()
        labels[entry] = _row(book, label)
        return replace(book, labels=labels)

    def _added(self, book: Codebook, query: Tensor, label: tuple[int, ...], radius: float) -> Codebook:
        book = _wide_enough(book, label)
        values = torch.cat([book.values, book.values.new_zeros(1, book.values.shape[1])])
        return replace(
            book,
            keys=torch.cat([book.keys, query.to(book.keys)[None]]),
            values=values,
            radii=torch.cat([book.radii, book.radii.new_tensor([radius])]),
            labels=torch.cat([book.labels, _row(book, label)[None]]),
            index=torch.cat([book.index, book.index.new_tensor([len(book)])]),
        )


def _wide_enough(book: Codebook, label: tuple[int, ...]) -> Codebook:
    more = max(0, len(label) - book.labels.shape[1])
    return replace(book, labels=F.pad(book.labels, (0, more), value=PAD))


def _row(book: Codebook, label: tuple[int, ...]) -> Tensor:
    return book.labels.new_tensor([*label, *[PAD] * (book.labels.shape[1] - len(label))])
