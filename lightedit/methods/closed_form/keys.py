"""Keys and outputs of facts, read at the edited matrices from the first to the last."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightedit.data.prompts import FactPrompts
from lightedit.lm import LanguageModel, Place
from lightedit.lm.batch import Batch, by_length, pad
from lightedit.lm.hooks import At, stop_after
from lightedit.lm.rowwise import RowwiseEdits

_FACTS_AT_ONCE = 256  # facts whose hidden states are in memory in `keys_at`


class KeyWalk:
    """Visits the edited matrices once, in order, and keeps the hidden states at the input of the current layer.

    Only tokens up to the subject's last one are run, since later tokens cannot influence a key. Keys and outputs are
    read under the present weights. `advance` runs the blocks in between with their present weights.

    Args:
        lm: the language model.
        prompts: B facts.
        place: the first edited matrix.
        max_tokens: most tokens of one forward pass.

    Attributes:
        place: the current matrix.
        edits: B edits, one a fact; each fact's rows run with its own, in addition to the weights. Empty at first.
    """

    @torch.no_grad()
    def __init__(
        self,
        lm: LanguageModel,
        prompts: Sequence[FactPrompts],
        place: Place,
        max_tokens: int = 4096,
    ) -> None:
        self.lm, self.count, self.place = lm, len(prompts), place
        self.edits = RowwiseEdits({}, torch.arange(len(prompts)))
        # batch, and for its rows [r]: fact's index, weight in the averaged key, weight among the bare prompts, number
        self._groups: list[tuple[Batch, Tensor, Tensor, Tensor, Tensor]] = []
        self._hidden: list[Tensor] = []
        rows = [
            (i, row, weight, (number in fact.bare) / len(fact.bare))
            for i, fact in enumerate(prompts)
            for number, (row, weight) in enumerate(zip(fact.rows, fact.key_weights, strict=True))
        ]
        numbered = [(*row, number) for number, row in enumerate(rows)]
        bare, others = [row for row in numbered if row[3]], [row for row in numbered if not row[3]]
        for part in (bare, others):
            for group in by_length([row.lookup + 1 for _, row, *_ in part], max_tokens):
                batch = pad([part[j][1].ids[: part[j][1].lookup + 1] for j in group], lm.pad_id)
                facts = torch.tensor([part[j][0] for j in group])
                weights = torch.tensor([part[j][2:] for j in group], dtype=torch.float64)
                numbers = weights[:, 2].long()
                self._groups.append((batch, facts, weights[:, 0], weights[:, 1], numbers))
                block = Place(self.layer, "block")
                with lm.capture([block], len(group), inputs=True) as states, stop_after(lm.module(block)):
                    lm.forward(batch)
                self._hidden.append(states[block])

    @property
    def layer(self) -> int:
        """The layer of the current matrix."""
        return self.place.layer

    def keys(self, bare: bool = False) -> Tensor:
        """K: inputs of the current matrix, averaged over contexts, [d_in, B] float64.

        Args:
            bare: average over the bare prompts only.
        """
        return self._mean(self.place, inputs=True, bare=bare)

    def outputs(self, place: Place) -> Tensor:
        """Outputs of `place`, averaged over the bare prompts, [d, B] float64."""
        return self._mean(place, inputs=False, bare=True)

    @torch.no_grad()
    def separate_keys(self) -> tuple[Tensor, Tensor]:
        """The key of every row by itself, times the root of its weight, and how the rows belong to the facts.

        Returns:
            K [d_in, n], and [B, n] with the root of the row's weight at the row's fact and 0 elsewhere; both float64.
            Rows are in the order of the facts, and in a fact in that of its prompts.
        """
        found = [(self._states(self.place, index, inputs=True), *group[1:]) for index, group in enumerate(self._groups)]
        device = found[0][0].device
        order = torch.cat([numbers for *_, numbers in found]).argsort()
        facts = torch.cat([facts for _, facts, *_ in found])[order]
        roots = torch.cat([weights for _, _, weights, *_ in found])[order].sqrt()
        members = torch.zeros(self.count, len(order), dtype=torch.float64)
        members[facts, torch.arange(len(order))] = roots
        keys = torch.cat([states for states, *_ in found])[order.to(device)]
        return (keys * roots.to(device)[:, None]).T, members.to(device)

    @torch.no_grad()
    def _mean(self, place: Place, inputs: bool, bare: bool) -> Tensor:
        """Each fact's mean input or output of `place` at the subject's last token, [width, B] float64."""
        total: Tensor | None = None
        for index, (_, facts, averaged, of_bare, _) in enumerate(self._groups):
            weights = of_bare if bare else averaged
            if not weights.any():
                continue
            state = self._states(place, index, inputs)
            if total is None:
                total = state.new_zeros(self.count, state.shape[1])
            total.index_add_(0, facts.to(state.device), state * weights.to(state.device)[:, None])
        assert total is not None
        return total.T

    def _states(self, place: Place, index: int, inputs: bool) -> Tensor:
        """Inputs or outputs of `place` at the last token of the rows of one group, [r, width] float64."""
        batch, facts, *_ = self._groups[index]
        with (
            self.lm.with_edits(self.edits.rows(facts)),
            self.lm.capture([place], len(batch.ids), _last(batch), inputs=inputs) as states,
            stop_after(self.lm.module(place)),
            self.lm.starting_at(self.layer, self._hidden[index]),
        ):
            self.lm.forward(batch)
        return states[place].double()

    @torch.no_grad()
    def advance(self, place: Place) -> None:
        """Move on to `place`, running the blocks up to its layer with the present weights."""
        start, self.place = self.layer, place
        if self.layer == start:
            return
        block = Place(self.layer - 1, "block")
        for index, (batch, facts, *_) in enumerate(self._groups):
            with (
                self.lm.with_edits(self.edits.rows(facts)),
                self.lm.capture([block], len(batch.ids)) as states,
                stop_after(self.lm.module(block)),
                self.lm.starting_at(start, self._hidden[index]),
            ):
                self.lm.forward(batch)
            self._hidden[index] = states[block]


def keys_at(lm: LanguageModel, prompts: Sequence[FactPrompts], place: Place) -> Tensor:
    """K at one matrix, [d_in, B] float64, read for 256 facts at a time to bound memory."""
    groups = [prompts[start : start + _FACTS_AT_ONCE] for start in range(0, len(prompts), _FACTS_AT_ONCE)]
    return torch.cat([KeyWalk(lm, group, place).keys() for group in groups], dim=1)


def values_of(lm: LanguageModel, place: Place, keys: Tensor) -> Tensor:
    """W k + b of the matrix at `place` under its present weights, for keys [d_in, B]; [d_out, B] float64."""
    weight, bias = lm.weight(place), lm.bias(place)
    values = weight.double() @ keys.to(weight.device, torch.float64)
    return values if bias is None else values + bias.double()[:, None]


def _last(batch: Batch) -> At:
    """(rows, position of each row's last token)."""
    return torch.arange(len(batch.ids)), batch.mask.sum(1) - 1
