"""Changes of single columns of a matrix as updates ΔW = D Eᵀ: D holds the changes, and E is one-hot."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightedit.lm.changes import LowRankUpdate


class Columns(NamedTuple):
    """What one fact changes in one matrix.

    Attributes:
        fact: the fact's index.
        neurons: indices of the columns, [n] int64.
        changes: their changes, [d_out, n].
    """

    fact: int
    neurons: Tensor
    changes: Tensor


def written_together(parts: Sequence[Columns], d_in: int, summed: bool) -> LowRankUpdate:
    """One update of the columns of several facts.

    Args:
        parts: what each fact changes, at least one.
        d_in: columns of the matrix.
        summed: whether the changes of one column are added up; else they are equal, and written once.
    """
    neurons, member = torch.cat([part.neurons for part in parts]).unique(return_inverse=True)
    changes = torch.cat([part.changes for part in parts], dim=1)
    left = changes.new_zeros(len(changes), len(neurons))
    member = member.to(changes.device)
    left = left.index_add_(1, member, changes) if summed else left.index_copy_(1, member, changes)
    return LowRankUpdate(left, _one_hot(neurons, d_in, left))


def written_apart(parts: Sequence[Columns], facts: Sequence[int], d_in: int) -> LowRankUpdate:
    """An update of its own for each fact, padded to the largest rank r: left [facts, d_out, r], right [facts, d_in, r].

    Args:
        parts: what each fact changes, at least one; that of other facts is 0.
        facts: the facts' indices.
        d_in: columns of the matrix.
    """
    rank = max(len(part.neurons) for part in parts)
    first = parts[0].changes
    left = first.new_zeros(len(facts), len(first), rank)
    right = first.new_zeros(len(facts), d_in, rank)
    for part in parts:
        edit, n = facts.index(part.fact), len(part.neurons)
        left[edit, :, :n] = part.changes
        right[edit, :, :n] = _one_hot(part.neurons, d_in, part.changes)
    return LowRankUpdate(left, right)


def _one_hot(neurons: Tensor, d_in: int, like: Tensor) -> Tensor:
    """E [d_in, n], with a one in row `neurons[i]` of column i."""
    right = like.new_zeros(d_in, len(neurons))
    right[neurons.to(right.device), torch.arange(len(neurons), device=right.device)] = 1
    return right
