"""The base of hyper-networks: from token factors to a low-rank edit of each matrix."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from lightedit.lm import Place
from lightedit.lm.changes import LowRankUpdate
from lightedit.methods.hypernetworks.factors import TokenFactors


class Matrix(NamedTuple):
    """A matrix that a hyper-network edits.

    Attributes:
        place: its place.
        d_out: width of what leaves it.
        d_in: width of what enters it.
        transposed: whether the model stores it as [d_in, d_out], as GPT-2 does.
    """

    place: Place
    d_out: int
    d_in: int
    transposed: bool = False


class HyperNetwork(nn.Module, ABC):
    """A network that computes edits. It holds no part of the language model's weights that it edits.

    Args:
        matrices: the edited matrices.

    Attributes:
        conditioned: whether an edit also depends on a text about the fact, as token ids.
    """

    conditioned = False

    def __init__(self, matrices: Sequence[Matrix]) -> None:
        super().__init__()
        self.matrices = tuple(matrices)

    @abstractmethod
    def forward(
        self, factors: Mapping[Place, TokenFactors], conditions: Sequence[Sequence[int]] | None = None
    ) -> dict[Place, LowRankUpdate]:
        """The edit of each row by itself, through which gradients flow into the network.

        Args:
            factors: place -> the factors of n rows, of one fact each.
            conditions: token ids of each row's condition text, n; only for networks that are `conditioned`.

        Returns:
            Place -> the n updates, left [n, d_out, r] and right [n, d_in, r].
        """

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which it computes."""
        return next(self.parameters()).dtype

    @property
    def fresh(self) -> bool:
        """Whether it needs to see token factors before its first edit."""
        return False

    def observe(self, factors: Mapping[Place, TokenFactors]) -> None:
        """Take statistics of token factors, where the network keeps any."""
        return None


def joined(updates: LowRankUpdate) -> LowRankUpdate:
    """The sum of n updates of one matrix, left [n, d_out, r] and right [n, d_in, r], with the columns of all.

    Columns of tokens that are not used are 0, and left out.
    """
    left, right = (part.transpose(1, 2).flatten(0, 1) for part in (updates.left, updates.right))
    some = (left != 0).any(1) & (right != 0).any(1)
    if not some.any():
        some[:1] = True
    return LowRankUpdate(left[some].T.contiguous(), right[some].T.contiguous())
