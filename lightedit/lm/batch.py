"""Rows of token ids padded to a rectangle."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Token ids of several rows.

    Attributes:
        ids: [rows, tokens], padding included.
        mask: [rows, tokens], True at real tokens. With a prefix cache: [rows, prefix + tokens].
        positions: [rows, tokens], position of each token in its row.
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor

    def to(self, device: torch.device) -> "Batch":
        return Batch(self.ids.to(device), self.mask.to(device), self.positions.to(device))


def pad(rows: Sequence[Sequence[int]], pad_id: int, left: bool = False) -> Batch:
    """Pad `rows` with `pad_id` on the right, or on the left. Rows may be empty as long as one is not."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for index, row in enumerate(rows):
        span = slice(width - len(row), width) if left else slice(0, len(row))
        ids[index, span] = torch.tensor(row, dtype=torch.long)
        mask[index, span] = True
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    return Batch(ids, mask, positions)


def by_length(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Group indices of rows by similar length, so that a group's rectangle holds at most `max_tokens` tokens.

    Longest first: memory runs out at the start or not at all, and time left is overestimated rather than under-.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    start = 0
    while start < len(order):
        rows = max(1, max_tokens // max(1, lengths[order[start]]))
        yield order[start : start + rows]
        start += rows
