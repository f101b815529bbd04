"""Many edits of one model in one forward pass: every row sees one of its own, and no weight is written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightedit.lm.changes import LowRankUpdate
from lightedit.lm.place import Place
from lightedit.ops import rowwise_low_rank


@dataclass(frozen=True)
class RowwiseEdits:
    """B separate edits of one model, and which of them each row sees.

    Attributes:
        updates: matrix -> the updates of all edits, left [B, d_out, r] and right [B, d_in, r].
        of_row: index of each row's edit, [rows].
    """

    updates: Mapping[Place, LowRankUpdate]
    of_row: Tensor

    @classmethod
    def none(cls, rows: int) -> "RowwiseEdits":
        """No edit at all, for so many rows."""
        return cls({}, torch.zeros(rows, dtype=torch.long))

    def rows(self, index: Tensor | Sequence[int]) -> "RowwiseEdits":
        """The same edits for the rows of that index, [n]."""
        return RowwiseEdits(self.updates, self.of_row[torch.as_tensor(index, dtype=torch.long)])

    def added(self, inputs: Tensor, update: LowRankUpdate, rectangles: Sequence[tuple[int, int]] | None) -> Tensor:
        """What the updates add to the outputs for `inputs`, [..., d_in], whose tokens stand row after row."""
        tokens = inputs.reshape(-1, inputs.shape[-1])
        rectangles = rectangles or [(len(self.of_row), len(tokens) // len(self.of_row))]
        edits = self.of_row.to(update.left.device).split([rows for rows, _ in rectangles])
        parts = tokens.split([rows * length for rows, length in rectangles])
        added = [
            rowwise_low_rank(part.unflatten(0, rectangle), update.left[edit], update.right[edit]).flatten(0, 1)
            for rectangle, part, edit in zip(rectangles, parts, edits, strict=True)
        ]
        return torch.cat(added).reshape(*inputs.shape[:-1], -1)
