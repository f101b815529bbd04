"""Separate edits of one model in one forward pass: each row sees one edit, and no weight is written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from lightedit.lm.changes import Adaptor, DenseUpdate, LowRankUpdate
from lightedit.lm.place import Place
from lightedit.lm.reading import Prompts
from lightedit.ops import rowwise_low_rank

OfEdits = LowRankUpdate | Sequence[DenseUpdate]
"""The updates of n edits at one place: one update of left [n, d_out, r] and right [n, d_in, r], or n dense updates."""


@dataclass(frozen=True)
class RowwiseEdits:
    """Several separate edits of one model, and which of them each row sees.

    Attributes:
        updates: place -> the updates of all edits.
        of_row: index of each row's edit, [rows].
        adaptors: place -> the adaptor of each edit.
    """

    updates: Mapping[Place, OfEdits]
    of_row: Tensor
    adaptors: Mapping[Place, Sequence[Adaptor]] = field(default_factory=dict)

    @classmethod
    def none(cls, rows: int) -> "RowwiseEdits":
        """No edit, for `rows` rows."""
        return cls({}, torch.zeros(rows, dtype=torch.long))

    def rows(self, index: Tensor | Sequence[int]) -> "RowwiseEdits":
        """The edits of the rows `index` [n]."""
        return self.of(self.of_row[torch.as_tensor(index, dtype=torch.long)])

    def of(self, of_row: Tensor) -> "RowwiseEdits":
        """The same edits, for other rows."""
        return RowwiseEdits(self.updates, of_row, self.adaptors)

    def added(self, inputs: Tensor, update: OfEdits, rectangles: Sequence[tuple[int, int]] | None) -> Tensor:
        """The summand ΔW x + Δb of each token's output, [..., d_out].

        Args:
            inputs: the tokens' inputs x, [..., d_in], row after row.
            update: the updates of all edits at one place.
            rectangles: (rows, length) of consecutive groups of rows; None for one group.
        """
        tokens = inputs.reshape(-1, inputs.shape[-1])
        rectangles = rectangles or [(len(self.of_row), len(tokens) // len(self.of_row))]
        edits = self.of_row.split([rows for rows, _ in rectangles])
        parts = tokens.split([rows * length for rows, length in rectangles])
        added = [
            _added(part.unflatten(0, rectangle), update, edit).flatten(0, 1)
            for rectangle, part, edit in zip(rectangles, parts, edits, strict=True)
        ]
        return torch.cat(added).reshape(*inputs.shape[:-1], -1)

    def adapted(self, inputs: Tensor, output: Tensor, place: Place, prompts: Prompts) -> Tensor:
        """The output of `place`, [rows, tokens, d_out], once each row's own adaptor has changed it."""
        for number in self.of_row.unique().tolist():
            own, tokens = prompts.of_rows(self.of_row == number)
            tokens = tokens.to(output.device)
            flat = output.flatten(0, 1)
            adaptor = self.adaptors[place][number]
            changed = adaptor(inputs.flatten(0, 1)[None, tokens], flat[None, tokens], own)
            output = flat.index_put((tokens,), changed.flatten(0, 1)).view_as(output)
        return output


def _added(x: Tensor, update: OfEdits, edit: Tensor) -> Tensor:
    """The summand of rows x [rows, length, d_in] that see the edits `edit` [rows], [rows, length, d_out]."""
    if isinstance(update, LowRankUpdate):
        edit = edit.to(update.left.device)
        return rowwise_low_rank(x, update.left[edit], update.right[edit])
    added: Tensor | None = None
    for number in edit.unique().tolist():  # no row gets a copy of its matrix
        rows = (edit == number).nonzero().flatten().to(x.device)
        of_rows = _dense(x[rows], update[number])
        added = x.new_empty(*x.shape[:-1], of_rows.shape[-1]) if added is None else added
        added[rows] = of_rows
    assert added is not None
    return added


def _dense(x: Tensor, update: DenseUpdate) -> Tensor:
    """ΔW x + Δb in the dtype of x, summed in float32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    bias = None if update.bias is None else update.bias.to(x.device, wide)
    if update.weight is None:
        assert bias is not None
        return bias.expand(*x.shape[:-1], -1).to(x.dtype)
    return F.linear(x.to(wide), update.weight.to(x.device, wide), bias).to(x.dtype)
