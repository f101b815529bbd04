"""Many edits of one model in one forward pass: every row sees one of its own, and no weight is written."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightedit.lm.matrix import Matrix
from lightedit.lm.weights import LowRankUpdate
from lightedit.ops import rowwise_low_rank

if TYPE_CHECKING:
    from lightedit.lm.model import LanguageModel


@dataclass(frozen=True)
class RowwiseEdits:
    """B separate edits of one model, and which of them each row sees.

    Attributes:
        updates: matrix -> the updates of all edits, left [B, d_out, r] and right [B, d_in, r].
        of_row: index of each row's edit, [rows].
    """

    updates: Mapping[Matrix, LowRankUpdate]
    of_row: Tensor

    def rows(self, index: Tensor | Sequence[int]) -> "RowwiseEdits":
        """The same edits for the rows of that index, [n]."""
        return RowwiseEdits(self.updates, self.of_row[torch.as_tensor(index, dtype=torch.long)])

    @contextmanager
    def applied(self, lm: "LanguageModel", rectangles: Sequence[tuple[int, int]] | None = None) -> Iterator[None]:
        """Within the context, forward passes over these rows see their edits.

        Args:
            lm: the model.
            rectangles: (rows, length) of each span of a packed pass; by default the rows are one rectangle.
        """
        with ExitStack() as stack:
            for matrix, update in self.updates.items():
                handle = lm.module(matrix).register_forward_hook(
                    lambda _, inputs, output, update=update: output + self._added(inputs[0], update, rectangles)
                )
                stack.callback(handle.remove)
            yield

    def _added(self, inputs: Tensor, update: LowRankUpdate, rectangles: Sequence[tuple[int, int]] | None) -> Tensor:
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
