"""The token rows of facts that teach an adaptor. What comes before its block is run once."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightedit.data.prompts import FactPrompts
from lightedit.lm import LanguageModel, Place
from lightedit.lm.batch import Batch, pad, rectangles
from lightedit.lm.hooks import OutputChange, changed, stop_after
from lightedit.lm.reading import Positions, Prompts
from lightedit.ops import target_nll_kl


@dataclass(frozen=True)
class Rows:
    """The rows of R facts, one a fact, with what training does not change.

    Attributes:
        facts: index of each row's fact, [R].
        batch: token ids, padded on the right.
        ends: the position of each row's query token, [R].
        hidden: the input of the place's block, [R, tokens, d].
        queries: the place's input at the query tokens, [R, d_in].
        outputs: its output there, [R, d_out].
        reads: (rows, positions) at which target tokens are predicted, [n] each.
        targets: their token ids, [n].
    """

    facts: Tensor
    batch: Batch
    ends: Tensor
    hidden: Tensor
    queries: Tensor
    outputs: Tensor
    reads: tuple[Tensor, Tensor]
    targets: Tensor

    def at(self, positions: Positions) -> Tensor:
        """The tokens that `positions` names, [R, tokens] bool."""
        rows, tokens = self.batch.ids.shape
        row = torch.arange(rows).repeat_interleave(tokens)
        query = torch.arange(rows) * tokens + self.ends.cpu()
        found = Prompts(row, self.batch.mask.cpu().flatten(), query, {}).at(positions)
        return found.view(rows, tokens).to(self.hidden.device)

    def of_facts(self, number: Mapping[int, int]) -> "Rows":
        """The rows of the facts that `number` holds, each with its number there; the others are left out."""
        kept = torch.tensor([i for i, fact in enumerate(self.facts.tolist()) if fact in number], dtype=torch.long)
        place = torch.full((len(self.facts),), -1)
        place[kept] = torch.arange(len(kept))
        reads = place[self.reads[0]]
        own = reads >= 0

        def some(tensor: Tensor) -> Tensor:
            return tensor[kept.to(tensor.device)]

        return Rows(
            torch.tensor([number[fact] for fact in some(self.facts).tolist()], dtype=torch.long),
            Batch(some(self.batch.ids), some(self.batch.mask), some(self.batch.positions)),
            some(self.ends),
            some(self.hidden),
            some(self.queries),
            some(self.outputs),
            (reads[own], self.reads[1][own]),
            self.targets[own.to(self.targets.device)],
        )

    def repeated(self, times: int) -> "Rows":
        """Every row `times` times, one after the other."""

        def each(tensor: Tensor) -> Tensor:
            return tensor.repeat_interleave(times, 0)

        number = torch.arange(len(self.facts), device=self.reads[0].device) * times
        rows = torch.cat([number[self.reads[0]] + copy for copy in range(times)])
        return Rows(
            each(self.facts),
            Batch(each(self.batch.ids), each(self.batch.mask), each(self.batch.positions)),
            each(self.ends),
            each(self.hidden),
            each(self.queries),
            each(self.outputs),
            (rows, self.reads[1].repeat(times)),
            self.targets.repeat(times),
        )


@torch.no_grad()
def rows_of(lm: LanguageModel, place: Place, prompts: Sequence[FactPrompts], max_tokens: int) -> Iterator[Rows]:
    """The rows of facts under the model's present weights, in rectangles of at most `max_tokens` tokens.

    Args:
        lm: the model.
        place: the adaptor's place.
        prompts: the facts; each one's first row is read.
        max_tokens: most tokens of a rectangle.
    """
    texts = [fact.rows[0] for fact in prompts]
    block = Place(place.layer, "block")
    for group in rectangles([len(text.ids) for text in texts], max_tokens):
        own = [texts[i] for i in group]
        batch = pad([text.ids for text in own], lm.pad_id).to(lm.device)
        ends = torch.tensor([len(text.ids) - len(text.targets) for text in own])
        at = torch.arange(len(own)), ends
        with (
            lm.reading.prompts_end(ends),
            lm.capture([block], len(own), inputs=True) as hidden,
            lm.capture([place], len(own), at, inputs=True) as queries,
            lm.capture([place], len(own), at) as outputs,
            stop_after(lm.module(block)),
        ):
            lm.forward(batch)
        reads = [(row, int(ends[row]) + i) for row, text in enumerate(own) for i in range(len(text.targets))]
        rows, positions = torch.tensor(reads).T
        targets = torch.tensor([token for text in own for token in text.targets], device=lm.head.weight.device)
        facts = torch.tensor(group)
        yield Rows(facts, batch, ends, hidden[block], queries[place], outputs[place], (rows, positions), targets)


def losses(lm: LanguageModel, place: Place, rows: Rows, change: OutputChange) -> Tensor:
    """The mean NLL of each row's target, [R], if `change` replaces the output of `place`. Gradients flow through it."""
    head = lm.head
    with (
        lm.reading.prompts_end(rows.ends),
        lm.starting_at(place.layer, rows.hidden),
        changed(lm.anatomy.port(place), change),
        lm.before_head(len(rows.ends), rows.reads) as states,
    ):
        lm.forward(rows.batch)
    wide = torch.promote_types(head.weight.dtype, torch.float32)
    no_reference = torch.empty(0, len(head.weight), dtype=wide, device=head.weight.device)
    nll, _ = target_nll_kl(states[0].to(head.weight.device), head, rows.targets, no_reference)
    row = rows.reads[0].to(nll.device)
    counts = torch.bincount(row, minlength=len(rows.ends))
    return nll.new_zeros(len(rows.ends)).index_add(0, row, nll) / counts
