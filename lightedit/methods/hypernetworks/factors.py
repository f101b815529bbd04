"""The token factors of a loss's gradient, from which hyper-networks compute edits."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightedit.lm import LanguageModel, Place
from lightedit.lm.batch import Batch, pad
from lightedit.lm.hooks import At
from lightedit.lm.rowwise import RowwiseEdits
from lightedit.ops import Head


class Answered(NamedTuple):
    """A text and the answer in it.

    Attributes:
        ids: token ids without the answer's last token, from which nothing is predicted.
        targets: the answer's token ids, predicted at the last `len(targets)` positions.
    """

    ids: list[int]
    targets: list[int]

    @property
    def prompt(self) -> list[int]:
        """The token ids before the answer."""
        return self.ids[: len(self.ids) - len(self.targets) + 1]


@dataclass(frozen=True)
class TokenFactors:
    """The factors of the gradients of separate losses, one a row, with respect to one matrix W [d_out, d_in].

    The gradient of a row's loss is the sum over its tokens of the outer products of `grads` and `inputs`.

    Attributes:
        inputs: what enters the matrix, u [rows, tokens, d_in].
        grads: the gradient of the row's loss by what leaves it, δ [rows, tokens, d_out].
        used: the tokens of a text, padding aside, whose two factors are both not 0, [rows, tokens] bool.
    """

    inputs: Tensor
    grads: Tensor
    used: Tensor

    @classmethod
    def of(cls, inputs: Tensor, grads: Tensor, mask: Tensor) -> "TokenFactors":
        """The factors of tokens of which `mask`, [rows, tokens] bool, says which are of a text."""
        used = mask.to(inputs.device) & (inputs != 0).any(-1) & (grads != 0).any(-1)
        return cls(inputs, grads, used)


class Entered(NamedTuple):
    """Rows of one pass, and the states with which it begins.

    Attributes:
        batch: the rows, padded on the right.
        layer: the first block that runs; None runs the whole model.
        hidden: the input of that block, [rows, tokens, d].
    """

    batch: Batch
    layer: int | None = None
    hidden: Tensor | None = None

    @classmethod
    def whole(cls, lm: LanguageModel, rows: Sequence[Sequence[int]]) -> "Entered":
        """Rows that run through all blocks."""
        return cls(pad(rows, lm.pad_id).to(lm.device))


def answer_positions(rows: Sequence[Answered]) -> At:
    """(rows, positions) at which the tokens of all answers are predicted, row after row."""
    found = [(i, at) for i, row in enumerate(rows) for at in range(len(row.ids) - len(row.targets), len(row.ids))]
    index, positions = torch.tensor(found).T
    return index, positions


def states_at(lm: LanguageModel, entered: Entered, at: At, edits: RowwiseEdits | None = None) -> Tensor:
    """The states that the LM head reads at the tokens `at`, [n, d], of rows that each see an edit of their own."""
    with ExitStack() as stack:
        if edits is not None:
            stack.enter_context(lm.with_edits(edits))
        if entered.hidden is not None:
            assert entered.layer is not None
            stack.enter_context(lm.starting_at(entered.layer, entered.hidden))
        states = stack.enter_context(lm.before_head(len(entered.batch.ids), at))
        lm.forward(entered.batch)
    return states[0]


def log_probs(head: Head, states: Tensor) -> Tensor:
    """Log-probabilities of the next token after states [n, d], [n, vocabulary]; gradients flow into the states."""
    logits = head.product(states.to(head.weight.device))
    logits = head.scale * logits.to(torch.promote_types(logits.dtype, torch.float32))
    if head.softcap is not None:
        logits = head.softcap * (logits / head.softcap).tanh()
    return logits.log_softmax(-1)


@torch.enable_grad()
def token_factors(
    lm: LanguageModel,
    rows: Sequence[Answered],
    places: Sequence[Place],
    dtype: torch.dtype,
    entered: Entered | None = None,
    count: int | None = None,
) -> Mapping[Place, TokenFactors]:
    """The factors of the gradient of each row's loss: the mean NLL of its answer's tokens.

    Zero tensors with a gradient are added at what leaves the matrices, so no weight needs a gradient. Factors carry no
    graph.

    Args:
        lm: the model, with its present weights.
        rows: texts with answers.
        places: places with matrices.
        dtype: dtype of the factors.
        entered: the rows with the states with which the pass begins; by default all blocks run.
        count: what each sum over answer tokens is divided by; by default the number of tokens of the row's own answer.

    Returns:
        Place -> factors, on the model's device.
    """
    entered = entered or Entered.whole(lm, [row.ids for row in rows])
    with lm.probe(places) as probes:
        states = states_at(lm, entered, answer_positions(rows))
    log_p = log_probs(lm.head, states)
    targets = torch.tensor([token for row in rows for token in row.targets], device=log_p.device)
    shares = [1 / (count or len(row.targets)) for row in rows for _ in row.targets]
    (-log_p.gather(1, targets[:, None])[:, 0] * log_p.new_tensor(shares)).sum().backward()
    return {
        place: TokenFactors.of(
            probes[place].inputs.to(lm.device, dtype), probes[place].grads.to(lm.device, dtype), entered.batch.mask
        )
        for place in places
    }
