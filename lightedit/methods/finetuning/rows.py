"""The token rows of fine-tuning. What no trained matrix changes is run once.

Blocks below the first trained one are run once. If the only trained matrix of that block is the MLP's second one, the
block is run once, too: its output is then that of the unedited block, plus what ΔW adds at the keys of all tokens.
Unlike δ, ΔW acts at every token, so all tokens run through the blocks above. In models whose blocks end in a norm, such
as BERT, the whole block runs at every step. An encoder-decoder runs as a whole.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightedit.data.prompts import FactPrompts, Row
from lightedit.lm import LanguageModel, Place
from lightedit.lm.batch import PASS_COST, pad, rectangles
from lightedit.lm.hooks import stop_after
from lightedit.methods.closed_form.rows import Rows

_KEPT_BYTES = 2**31  # states that are kept between epochs; those of further facts are computed in each


@dataclass(frozen=True)
class TunedRows(Rows):
    """Rows of one rectangle; those of one fact follow one another, and each fact has as many.

    `hidden` is the input of the first block that runs at every step, without what ΔW adds to it.

    Attributes:
        keys: the inputs of the first trained matrix, [rows, tokens, d_in]; None if its block runs at every step.
        outputs: its outputs without ΔW, [rows, tokens, d], where a norm follows them; else None.
        rows_of_fact: number of rows of each fact.
    """

    keys: Tensor | None
    outputs: Tensor | None
    rows_of_fact: int

    @property
    def facts(self) -> Tensor:
        """The index of each fact, [facts]."""
        return self.fact[:: self.rows_of_fact]

    def keep(self, rows: Tensor) -> "TunedRows":
        """The rectangle without the rows for which `rows`, [rows] bool, is False; a fact stays as a whole or not."""
        kept = super().keep(rows)
        keys, outputs = (
            None if states is None else states[rows.to(states.device)] for states in (self.keys, self.outputs)
        )
        same = {field.name: getattr(kept, field.name) for field in fields(Rows)}
        return TunedRows(**same, keys=keys, outputs=outputs, rows_of_fact=self.rows_of_fact)


class _Text(NamedTuple):
    """One text: its token ids, and the positions at which the target's tokens are predicted."""

    ids: list[int]
    at: list[int]
    targets: list[int]

    @classmethod
    def of(cls, lm: LanguageModel, row: Row, published: bool) -> "_Text":
        count = len(row.targets)
        if lm.answers.apart:
            return cls(row.ids, list(lm.reads(row.ids, row.targets)), row.targets)
        prompt = len(row.ids) - count + 1  # its tokens
        if published:
            return cls(row.ids[:prompt], [prompt - 1] * count, row.targets)
        return cls(row.ids, list(range(prompt - 1, len(row.ids))), row.targets)


class _States(NamedTuple):
    """What `TunedRows` holds of one fact, [rows, tokens, width] each."""

    hidden: Tensor
    keys: Tensor | None
    outputs: Tensor | None


def first_block(lm: LanguageModel, places: Sequence[Place]) -> int:
    """The first block that training changes; 0 if passes cannot start at a later one."""
    return min(places).layer if lm.answers.starts_within else 0


def first_matrix(lm: LanguageModel, places: Sequence[Place]) -> Place | None:
    """The MLP's second matrix of the first trained block, if no other matrix of that block is trained; else None.

    Also None if a block's output is not the sum that the MLP adds to, or if passes cannot start at any block.
    """
    if lm.architecture.block_norm is not None or not lm.answers.starts_within:
        return None
    first = min(places)
    return first if [place.name for place in places if place.layer == first.layer] == ["mlp"] else None


class Examples:
    """The rows of facts, with the states that training does not change. They are computed when they are first needed.

    Args:
        lm: the language model; its weights must stay as they are.
        prompts: the facts.
        places: the trained places.
        published: predict all of a target's tokens at the prompt's last token.
        max_tokens: most tokens of one rectangle.
    """

    def __init__(
        self,
        lm: LanguageModel,
        prompts: Sequence[FactPrompts],
        places: Sequence[Place],
        published: bool,
        max_tokens: int,
    ) -> None:
        self._lm, self._max_tokens = lm, max_tokens
        self._texts = [[_Text.of(lm, row, published) for row in fact.rows] for fact in prompts]
        self._matrix, self._layer = first_matrix(lm, places), first_block(lm, places)
        self._device = lm.weight(min(places)).device
        self._states: dict[int, _States] = {}
        self._bytes = 0

    def rows(self, facts: Sequence[int]) -> list[TunedRows]:
        """The rows of these facts, in rectangles."""
        states = self._captured(facts)
        packs = self._lm.architecture.supports_packing  # packed rectangles share a pass, and need no padding
        return [
            self._joined(group, [states[fact] for fact in group])
            for group in self._rectangles(facts, 0 if packs else PASS_COST)
        ]

    def _length(self, fact: int) -> int:
        return max(len(text.ids) for text in self._texts[fact])

    def _rectangles(self, facts: Sequence[int], pass_cost: int) -> Iterator[list[int]]:
        """Groups of facts with equally many rows, of similar length."""
        by_rows: dict[int, list[int]] = {}
        for fact in facts:
            by_rows.setdefault(len(self._texts[fact]), []).append(fact)
        for count, members in by_rows.items():
            lengths = [count * self._length(fact) for fact in members]
            for group in rectangles(lengths, self._max_tokens, pass_cost):
                yield [members[i] for i in group]

    def _captured(self, facts: Sequence[int]) -> dict[int, _States]:
        found = {fact: self._states[fact] for fact in facts if fact in self._states}
        for group in self._rectangles([fact for fact in facts if fact not in found], PASS_COST):
            found.update(zip(group, self._run_once(group), strict=True))
            if self._bytes < _KEPT_BYTES:
                self._states |= {fact: found[fact] for fact in group}
                self._bytes += sum(part.nbytes for fact in group for part in found[fact] if part is not None)
        return found

    @torch.no_grad()
    def _run_once(self, facts: Sequence[int]) -> Iterator[_States]:
        """Run the blocks that training does not change, and yield each fact's states."""
        lm, matrix = self._lm, self._matrix
        if not lm.answers.starts_within:  # no state is kept; the widths are of no use
            for fact in facts:
                empty = torch.empty(len(self._texts[fact]), self._length(fact), 0, dtype=lm.dtype, device=self._device)
                yield _States(empty, None, None)
            return
        batch = pad([text.ids for fact in facts for text in self._texts[fact]], lm.pad_id)
        count, block = len(batch.ids), Place(self._layer, "block")
        outputs = [] if matrix is None or lm.mlp_norm(matrix.layer) is None else [matrix]
        with (
            lm.capture([block], count, inputs=matrix is None) as hidden,
            lm.capture([] if matrix is None else [matrix], count, inputs=True) as keys,
            lm.capture(outputs, count) as left,
            stop_after(lm.module(block), before=matrix is None),
        ):
            lm.forward(batch)
        whole = [hidden[block], keys.get(matrix), left.get(matrix)] if matrix else [hidden[block], None, None]
        starts = accumulate((len(self._texts[fact]) for fact in facts), initial=0)
        for fact, start in zip(facts, starts, strict=False):
            rows, length = slice(start, start + len(self._texts[fact])), self._length(fact)
            yield _States(*(None if part is None else part[rows, :length].to(self._device) for part in whole))  # type: ignore[arg-type]

    def _joined(self, facts: Sequence[int], states: Sequence[_States]) -> TunedRows:
        """The rectangle of these facts' rows."""
        texts = [text for fact in facts for text in self._texts[fact]]
        count, device = len(self._texts[facts[0]]), self._device
        batch = self._lm.batch([text.ids for text in texts], [text.targets for text in texts]).to(self._lm.device)
        width = batch.ids.shape[1]
        hidden, keys, outputs = (
            None if parts[0] is None else torch.cat([F.pad(part, (0, 0, 0, width - part.shape[1])) for part in parts])
            for parts in zip(*states, strict=True)
        )
        reads = [(i, position) for i, text in enumerate(texts) for position in text.at]
        rows, positions = torch.tensor(reads, device=device).T
        assert hidden is not None
        return TunedRows(
            batch,
            None,
            hidden,
            None,
            torch.tensor([fact for fact in facts for _ in range(count)], device=device),
            torch.zeros(len(texts), dtype=torch.long, device=device),
            (rows, positions),
            torch.tensor([token for text in texts for token in text.targets], device=self._lm.head.weight.device),
            torch.tensor(
                [1 / (count * len(text.targets)) for text in texts for _ in text.targets],
                dtype=torch.promote_types(hidden.dtype, torch.float32),
                device=device,
            ),
            keys,
            outputs,
            count,
        )
