"""Separate edits of one model in one forward pass: each row sees one edit, and no weight is written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightedit.lm.changes import LowRankUpdate
from lightedit.lm.place import Place
from lightedit.ops import rowwise_low_rank


@dataclass(frozen=True)
class RowwiseEdits:
    """Several separate edits of one model, and which of them each row sees.

    Attributes:
        updates: place -> the updates of all edits, left [edits, d_out, r] and right [edits, d_in, r].
        of_row: index of each row's edit, [rows].
    """

    updates: Mapping[Place, LowRankUpdate]
    of_row: Tensor

    @classmethod
    def none(cls, rows: int) -> "RowwiseEdits":
        """No edit, for `rows` rows."""
        return cls({}, torch.zeros(rows, dtype=torch.long))

    def rows(self, index: Tensor | Sequence[int]) -> "RowwiseEdits":
        """The edits of the rows `index` [n]."""
        return RowwiseEdits(self.updates, self.of_row[torch.as_tensor(index, dtype=torch.long)])

    def added(self, inputs: Tensor, update: LowRankUpdate, rectangles: Sequence[tuple[int, int]] | None) -> Tensor:
        """The summand ΔW x of each token's output, [..., d_out].

        Args:
            inputs: the tokens' inputs x, [..., d_in], row after row.
            update: the updates of all edits at one place.
            rectangles: (rows, length) of consecutive groups of rows; None for one group.
        """
        tokens = inputs.reshape(-1, inputs.shape[-1])
        rectangles = rectangles or [(len(self.of_row), len(tokens) // len(self.of_row))]
        edits = self.of_row.to(update.left.device).split([rows for rows, _ in rectangles])
        parts = tokens.split([rows * length for rows, length in rectangles])
        added = [
            rowwise_low_rank(part.unflatten(0, rectangle), update.left[edit], update.right[edit]).flatten(0, 1)
            for rectangle, part, edit in zip(rectangles, parts, edits, strict=True)
        ]
        return torch.cat(added).reshape(*inputs.shape[:-1], -1)
