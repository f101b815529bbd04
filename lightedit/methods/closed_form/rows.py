"""The token rows of the value search. Parts that do not depend on δ are run once, the rest at every step.

Tokens before the subject's last one are run once and kept as a KV cache. Blocks up to the edited layer are run once,
and their output is kept; with two δ, the input of the edited block is kept instead. The LM head is applied only
where a target token or the KL term is read. The result is exact.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from lightedit.data.prompts import FactPrompts, Row
from lightedit.lm import LanguageModel, Place
from lightedit.lm.batch import PASS_COST, Batch, pad, rectangles
from lightedit.lm.cache import PrefixCache
from lightedit.lm.hooks import At, stop_after
from lightedit.lm.packed import Span
from lightedit.lm.prefix import prefix_cache


@dataclass(frozen=True)
class Rows:
    """Padded rows of one rectangle, from the subject's last token on, with their KV cache and hidden states.

    Attributes:
        batch: ids and positions [rows, suffix], mask [rows, prefix + suffix].
        cache: keys and values of the prefix tokens; None if there are none.
        hidden: input of the first block that runs again, [rows, suffix, d].
        mlp: the MLP's output at the subject's last token without δ, [rows, d]; None unless δ is added there and a
            norm follows.
        fact: index of each row's fact, [rows].
        context: index of each row's context in its fact, [rows].
        at: (rows, positions) at which the head is read, [n] each: m target tokens, then the KL terms.
        targets: target ids, [m].
        weight: weight of each read in its fact's loss, [n].
    """

    batch: Batch
    cache: PrefixCache | None
    hidden: Tensor
    mlp: Tensor | None
    fact: Tensor
    context: Tensor
    at: At
    targets: Tensor
    weight: Tensor

    @property
    def length(self) -> int:
        """Tokens of each row, padding included."""
        return self.batch.ids.shape[1]

    @property
    def n_tokens(self) -> int:
        """Tokens of all rows, padding included."""
        return self.batch.ids.numel()

    @property
    def reads_target(self) -> Tensor:
        """Whether each row reads tokens of a target, else the KL term, [rows] bool."""
        found = torch.zeros_like(self.fact, dtype=torch.bool)
        found[self.at[0][: len(self.targets)]] = True
        return found

    def keep(self, rows: Tensor) -> "Rows":
        """The rectangle without the rows for which `rows`, [rows] bool, is False."""
        index = rows.nonzero().squeeze(1)
        read = rows[self.at[0]]
        renumber = rows.cumsum(0) - 1

        def kept(tensor: Tensor) -> Tensor:
            return tensor[index.to(tensor.device)]

        return Rows(
            Batch(
                kept(self.batch.ids),
                kept(self.batch.mask),
                kept(self.batch.positions),
                None if self.batch.decoder is None else kept(self.batch.decoder),
            ),
            None if self.cache is None else self.cache.rows(index),
            kept(self.hidden),
            None if self.mlp is None else kept(self.mlp),
            kept(self.fact),
            kept(self.context),
            (renumber[self.at[0][read]], self.at[1][read]),
            self.targets[read[: len(self.targets)].to(self.targets.device)],
            self.weight[read],
        )


@dataclass(frozen=True)
class Reads:
    """The n reads of the head in one pass: m target tokens of all its rows, then their KL terms.

    Attributes:
        targets: target ids, [m].
        fact: index of each read's fact, [n].
        context: index of the context of each target token, [m].
        weight: weight of each read in its fact's loss, [n].
    """

    targets: Tensor
    fact: Tensor
    context: Tensor
    weight: Tensor


def first_block(places: Sequence[Place]) -> int:
    """The first block that runs at every step: the one after the edited block, or with two δ the edited block."""
    return places[0].layer + (len(places) == 1)


@torch.no_grad()
def capture_rows(
    lm: LanguageModel, prompts: Sequence[FactPrompts], places: Sequence[Place], kl_factor: float, max_tokens: int
) -> tuple[list[Rows], Tensor, Tensor]:
    """Run once the computations that all later passes share.

    Args:
        lm: the language model.
        prompts: B facts.
        places: where δ is added, all in one block; a single δ is added at the block's output, several inside it.
        kl_factor: weight of the KL term.
        max_tokens: most suffix tokens of one rectangle.

    Returns:
        The rows of all facts; h0, each fact's activations at the places, averaged over its bare prompts and
        concatenated, [B, len(places) * d], float32 or wider; and the block's output there, averaged likewise, [B, d].
        With several places it is the block's input.
    """
    rows = [
        (index, context, row)
        for index, fact in enumerate(prompts)
        for context, row in enumerate((*fact.rows, fact.subject))
    ]
    captured: list[Rows] = []
    initial: dict[int, Tensor] = {}
    entered: dict[int, Tensor] = {}
    cache, mask = prefix_cache(lm, [row.ids[: row.lookup] for _, _, row in rows])
    pass_cost = (
        0 if lm.architecture.supports_packing else PASS_COST
    )  # packed rectangles share a pass, and need no padding
    for group in rectangles([len(row.ids) - row.lookup for _, _, row in rows], max_tokens, pass_cost):
        members = [rows[i] for i in group]
        facts, contexts, texts = (list(column) for column in zip(*members, strict=True))
        batch, own_cache = _after_prefix(lm, texts, torch.tensor(group), cache, mask)
        hidden, site = _run_once(lm, batch, own_cache, places)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        activations = torch.cat(list(site.values()), dim=1).to(wide)
        device = activations.device  # a block's input may be on the device of the block before it
        norm = lm.mlp_norm(places[0].layer) is not None and [place.name for place in places] == ["mlp"]
        reads, weights = _reads(texts, [len(prompts[fact].rows) for fact in facts], kl_factor)
        read_rows, read_positions = torch.tensor(reads, device=device).T
        captured.append(
            Rows(
                batch,
                None if own_cache is None else own_cache.without(range(first_block(places))),
                hidden.to(device),
                activations if norm else None,
                torch.tensor(facts, device=device),
                torch.tensor(contexts, device=device),
                (read_rows, read_positions),
                torch.tensor([t for row in texts for t in row.targets], dtype=torch.long, device=lm.head.weight.device),
                torch.tensor(weights, dtype=wide, device=device),
            )
        )
        for (index, context, _), *states in zip(members, activations, hidden[:, 0].to(activations), strict=True):
            if context in prompts[index].bare:
                for total, state in zip((initial, entered), states, strict=True):
                    share = state / len(prompts[index].bare)
                    total[index] = total[index] + share if index in total else share
    ordered = range(len(prompts))
    return captured, torch.stack([initial[i] for i in ordered]), torch.stack([entered[i] for i in ordered])


def _after_prefix(
    lm: LanguageModel, texts: Sequence[Row], index: Tensor, cache: PrefixCache | None, mask: Tensor
) -> tuple[Batch, PrefixCache | None]:
    """The rows from the subject's last token on, and their prefix cache; `index` are their rows in `cache`."""
    width = max(row.lookup for row in texts)
    before = mask[index.to(mask.device), mask.shape[1] - width :]
    suffix = pad([row.ids[row.lookup :] for row in texts], lm.pad_id).to(lm.device)
    lengths = torch.tensor([row.lookup for row in texts], device=lm.device)
    batch = replace(suffix, mask=torch.cat([before, suffix.mask], dim=1), positions=suffix.positions + lengths[:, None])
    return batch, None if cache is None or not width else cache.rows(index, width)


def _run_once(
    lm: LanguageModel, batch: Batch, cache: PrefixCache | None, places: Sequence[Place]
) -> tuple[Tensor, dict[Place, Tensor]]:
    """Run the edited block and those before it.

    Returns:
        The input of the first block that runs at every step, [rows, suffix, d], and the outputs of the places at the
        first token, [rows, d] each.
    """
    block, rows = Place(places[0].layer, "block"), len(batch.ids)
    first = (torch.arange(rows), torch.zeros(rows, dtype=torch.long))
    with (
        lm.capture([block], rows, inputs=len(places) > 1) as hidden,
        lm.capture(places, rows, first) as site,
        stop_after(lm.module(block)),
    ):
        lm.forward(batch, cache)
    return hidden[block], {place: site[place] for place in places}


def _reads(
    texts: Sequence[Row], rows_of_fact: Sequence[int], kl_factor: float
) -> tuple[list[tuple[int, int]], list[float]]:
    """(row, position) of every read, target tokens before KL terms, and the weight of each in its fact's loss."""
    reads: list[tuple[int, int]] = []
    weights: list[float] = []
    for kl in (False, True):
        for i, row in enumerate(texts):
            if kl == (not row.targets):
                count = len(row.targets) or 1
                last = len(row.ids) - row.lookup
                reads += [(i, position) for position in range(last - count, last)]
                weights += [kl_factor if kl else 1 / (count * rows_of_fact[i])] * count
    return reads, weights


class _Counted(Protocol):
    @property
    def n_tokens(self) -> int: ...


_Rectangle = TypeVar("_Rectangle", bound=_Counted)


def passes(lm: LanguageModel, rows: Sequence[_Rectangle], max_tokens: int) -> list[list[_Rectangle]]:
    """The rectangles of each forward and backward pass: as many as fit if they can be packed, otherwise one."""
    result: list[list[_Rectangle]] = []
    room = 0
    for each in rows:
        if not lm.architecture.supports_packing or each.n_tokens > room:
            result.append([])
            room = max_tokens
        result[-1].append(each)
        room -= each.n_tokens
    return result


def head_states(
    lm: LanguageModel, together: Sequence[Rows], hidden: Sequence[Tensor], layer: int, shifts: Mapping[Place, Tensor]
) -> tuple[Tensor, Reads]:
    """One pass over the rows of `together`, from block `layer` to the LM head.

    Args:
        lm: the language model.
        together: rectangles of one pass.
        hidden: for each rectangle, the input of block `layer`, [rows, suffix, d].
        layer: the first block that runs.
        shifts: place -> what is added to its output at the subjects' last tokens, [rows of all rectangles, d].

    Returns:
        The states at which the head is read, [n, d], and the description of these reads.
    """
    reads = Reads(
        torch.cat([rows.targets for rows in together]),
        _joined([rows.fact[rows.at[0]] for rows in together], together),
        torch.cat([rows.context[rows.at[0][: len(rows.targets)]] for rows in together]),
        _joined([rows.weight for rows in together], together),
    )
    if not lm.architecture.supports_packing:
        (rows,) = together
        count = len(rows.batch.ids)
        lookups = (torch.arange(count), torch.zeros(count, dtype=torch.long))
        with _shifted(lm, shifts, lookups), lm.starting_at(layer, hidden[0]), lm.before_head(count, rows.at) as states:
            lm.forward(rows.batch, rows.cache)
        return states[0], reads
    # rows are laid end to end: a token's index is that of its row's first token plus its position in the row
    starts = accumulate((rows.n_tokens for rows in together), initial=0)
    firsts = [
        start + rows.length * torch.arange(len(rows.batch.ids), device=rows.fact.device)
        for rows, start in zip(together, starts, strict=False)
    ]
    at = _joined([first[r.at[0]] + r.at[1] for r, first in zip(together, firsts, strict=True)], together)
    flat = torch.cat([states.flatten(0, 1) for states in hidden])
    first = torch.cat(firsts)
    with (
        _shifted(lm, shifts, (torch.zeros_like(first), first)),
        lm.starting_at(layer, flat[None]),
        lm.before_head(1, (torch.zeros_like(at), at)) as states,
    ):
        lm.forward_packed(
            torch.cat([rows.batch.ids.flatten() for rows in together]),
            torch.cat([rows.batch.positions.flatten() for rows in together]),
            [Span.of(rows.batch.mask, rows.length, rows.cache, flat.dtype) for rows in together],
        )
    return states[0], reads


def _joined(each: Sequence[Tensor], together: Sequence[Rows]) -> Tensor:
    """Concatenate one value per read of all rectangles: target tokens of all, then KL terms of all."""
    counts = [len(rows.targets) for rows in together]
    targets = [values[:count] for values, count in zip(each, counts, strict=True)]
    return torch.cat(targets + [values[count:] for values, count in zip(each, counts, strict=True)])


@contextmanager
def _shifted(lm: LanguageModel, shifts: Mapping[Place, Tensor], at: At) -> Iterator[None]:
    with ExitStack() as stack:
        for place, shift in shifts.items():
            stack.enter_context(lm.add_at(place, shift, at))
        yield
