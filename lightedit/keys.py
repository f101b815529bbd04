"""Keys and present values of facts, read while walking the edited layers from first to last."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightedit.data.prompts import FactPrompts
from lightedit.lm import LanguageModel
from lightedit.lm.batch import Batch, by_length, pad
from lightedit.lm.hooks import capture, stop_after
from lightedit.values import Site


class KeyWalk:
    """Walks the edited layers once, keeping the hidden states at the present layer's input.

    Only tokens up to the subject's last are run, since nothing after it can reach a key. After a layer's matrix was
    written, `advance` finishes that block with the new weights.

    Args:
        lm: the language model, under its weights of the moment.
        prompts: B facts.
        key_weights: the weight of each context in a fact's averaged key.
        layer: the first edited layer.
        max_tokens: tokens of one forward pass at most.
    """

    @torch.no_grad()
    def __init__(
        self,
        lm: LanguageModel,
        prompts: Sequence[FactPrompts],
        key_weights: Sequence[float],
        layer: int,
        max_tokens: int = 4096,
    ) -> None:
        self.lm, self.count, self.layer = lm, len(prompts), layer
        self._groups: list[tuple[Batch, Tensor, Tensor, bool]] = []  # batch, fact index [r], key weight [r], bare?
        self._hidden: list[Tensor] = []
        bare = [(i, fact.rows[0], key_weights[0]) for i, fact in enumerate(prompts)]
        others = [
            (i, row, weight)
            for i, fact in enumerate(prompts)
            for row, weight in zip(fact.rows[1:], key_weights[1:], strict=True)
        ]
        for rows in (bare, others):
            for group in by_length([row.lookup + 1 for _, row, _ in rows], max_tokens):
                batch = pad([rows[j][1].ids[: rows[j][1].lookup + 1] for j in group], lm.pad_id)
                facts = torch.tensor([rows[j][0] for j in group])
                weights = torch.tensor([rows[j][2] for j in group], dtype=torch.float64)
                self._groups.append((batch, facts, weights, rows is bare))
                with capture({0: lm.blocks[layer]}, len(group), inputs=True) as states, stop_after(lm.blocks[layer]):
                    lm.forward(batch)
                self._hidden.append(states[0])

    @torch.no_grad()
    def keys(self) -> Tensor:
        """K: the averaged inputs of the present layer's MLP output matrix, [d_in, B] float64."""
        module = self.lm.mlp_output(self.layer)
        total: Tensor | None = None
        for (batch, facts, weights, _), hidden in zip(self._groups, self._hidden, strict=True):
            with (
                capture({0: module}, len(batch.ids), _last(batch), inputs=True) as states,
                stop_after(module),
                self.lm.starting_at(self.layer, hidden),
            ):
                self.lm.forward(batch)
            states_ = states[0].double()
            if total is None:
                total = states_.new_zeros(self.count, states_.shape[1])
            total.index_add_(0, facts.to(states_.device), states_ * weights.to(states_.device)[:, None])
        assert total is not None
        return total.T

    @torch.no_grad()
    def present(self, layer: int, site: Site = "block") -> Tensor:
        """The site's activation at `layer` on the bare prompts, under the weights of the moment, [d, B] float64."""
        module = self.lm.blocks[layer] if site == "block" else self.lm.mlp_output(layer)
        result: Tensor | None = None
        for (batch, facts, _, bare), hidden in zip(self._groups, self._hidden, strict=True):
            if not bare:
                continue
            with (
                capture({0: module}, len(batch.ids), _last(batch)) as states,
                stop_after(module),
                self.lm.starting_at(self.layer, hidden),
            ):
                self.lm.forward(batch)
            state = states[0].double()
            if result is None:
                result = state.new_empty(self.count, state.shape[1])
            result[facts.to(state.device)] = state
        assert result is not None
        return result.T

    @torch.no_grad()
    def advance(self, layer: int) -> None:
        """Move on to the input of `layer`, running the blocks in between with the weights of the moment."""
        block = self.lm.blocks[layer - 1]
        for index, (batch, *_) in enumerate(self._groups):
            with (
                capture({0: block}, len(batch.ids)) as states,
                stop_after(block),
                self.lm.starting_at(self.layer, self._hidden[index]),
            ):
                self.lm.forward(batch)
            self._hidden[index] = states[0]
        self.layer = layer


def _last(batch: Batch) -> tuple[Tensor, Tensor]:
    """(rows, position of each row's last token)."""
    return torch.arange(len(batch.ids)), batch.mask.sum(1) - 1
