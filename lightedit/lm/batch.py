"""Batches: rows of token ids padded to equal length, and rows grouped into batches."""

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
        decoder: [rows, decoder tokens], what the decoder of an encoder-decoder reads; None for other models.
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor
    decoder: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        decoder = None if self.decoder is None else self.decoder.to(device)
        return Batch(self.ids.to(device), self.mask.to(device), self.positions.to(device), decoder)


def pad(rows: Sequence[Sequence[int]], pad_id: int, left: bool = False) -> Batch:
    """Pad `rows` with `pad_id` on the right, or on the left. Rows may be empty, but not all of them."""
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
    """Group the indices of rows by similar length. A group holds at most `max_tokens` tokens, padding included.

    A single row longer than `max_tokens` is a group of its own. The longest rows come first: a lack of memory shows
    at the start, and the time left is not underestimated.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    start = 0
    while start < len(order):
        rows = max(1, max_tokens // max(1, lengths[order[start]]))
        yield order[start : start + rows]
        start += rows


# Fixed cost of a pass (reading all weights, dispatching all operations), in tokens
PASS_COST = 40


def rectangles(lengths: Sequence[int], max_tokens: int, pass_cost: int = PASS_COST) -> list[list[int]]:
    """Partition rows of the given lengths into batches of at most `max_tokens` tokens, at the least total cost.

    The cost of a batch is its number of tokens, padding included, plus `pass_cost`. Rows are sorted by length. Dynamic
    programming over the distinct lengths finds the cuts.

    Args:
        lengths: tokens of each row.
        max_tokens: tokens of a batch at most, padding included, unless a single row is longer.
        pass_cost: fixed cost of a batch, in tokens.

    Returns:
        The indices of each batch's rows.
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    ends = [k + 1 for k in range(len(order)) if k + 1 == len(order) or lengths[order[k]] != lengths[order[k + 1]]]
    best: dict[int, tuple[int, int]] = {0: (0, 0)}  # rows so far -> (cost, start of the last rectangle)
    for end in ends:
        width = lengths[order[end - 1]]
        rows_of_pass = max(1, max_tokens // max(1, width))
        best[end] = min(
            (best[start][0] + (end - start) * width + -(-(end - start) // rows_of_pass) * pass_cost, start)
            for start in best
        )
    groups: list[list[int]] = []
    end = len(order)
    while end:
        start = best[end][1]
        passes = -(-(end - start) // max(1, max_tokens // max(1, lengths[order[end - 1]])))
        size = -(-(end - start) // passes)  # equal passes, not full ones and a remainder
        groups += [order[i : min(i + size, end)] for i in range(start, end, size)]
        end = start
    return groups[::-1]
