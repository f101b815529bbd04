"""Restorations in the corrupted runs of one prompt.

A restoration replaces, in the corrupted run, states of one token by those of the clean run. It changes nothing but this
token and later ones, in later blocks. So tokens before the subject are run once, as a prefix cache; the corrupted run
is kept; and a restoration starts behind the block that it changes first, at the token that it changes. The result is
that of whole passes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from lightedit.analysis.clean_and_corrupted import (
    Runs,
    all_tokens,
    answer_probability,
    corrupted_embeddings,
    suffix_batch,
)
from lightedit.lm import LanguageModel, Place
from lightedit.lm.hooks import stop_after
from lightedit.lm.packed import Span
from lightedit.lm.place import Name


@dataclass(frozen=True)
class Branch:
    """A change of the corrupted runs at one token, whichever it is.

    Attributes:
        layer: the first block whose output at the token changes.
        joined: this output, [S or 1, s, d], for each token that may be the one.
        held: places in later blocks -> their output at the token, which stays fixed, [S or 1, s, d].
    """

    layer: int
    joined: Tensor
    held: Mapping[Place, Tensor]


def state_branches(runs: Runs, n_layers: int, severed: Name | None = None) -> list[Branch]:
    """One branch a layer, which restores the block's output at a token.

    Args:
        runs: the runs, with the outputs of `severed`.
        n_layers: number of layers.
        severed: name of the places whose outputs at that token stay as they are in the corrupted run, in all layers.
    """
    return [
        Branch(
            layer,
            runs.clean[Place(layer, "block")],
            {}
            if severed is None
            else {(place := Place(later, severed)): runs.corrupted[place] for later in range(layer + 1, n_layers)},
        )
        for layer in range(n_layers)
    ]


@torch.no_grad()
def window_branches(lm: LanguageModel, runs: Runs, name: Name, window: int) -> list[Branch]:
    """One branch a layer, which restores the outputs of the places `name` in a window of layers around it.

    In the window's first block, restoring a token's output changes only that token. One pass with the outputs of all
    tokens restored therefore gives the block's output for each of them, with every block's input as in the corrupted
    runs.

    Args:
        lm: the language model.
        runs: the runs, with the outputs of `name`.
        name: "mlp" or "attention".
        window: number of layers; fewer at the edges, see `window_around`.
    """
    spans = [window_around(layer, window, lm.n_layers) for layer in range(lm.n_layers)]
    samples, length = runs.corrupted[Place(0, "block")].shape[:2]
    every = all_tokens(samples, length)
    blocks = [Place(layer, "block") for layer in range(spans[-1].start + 1)]
    with ExitStack() as stack:
        stack.enter_context(corrupted_embeddings(lm, runs.noise, runs.replaces))
        for block in blocks:
            restored = runs.clean[Place(block.layer, name)].expand(samples, -1, -1)
            stack.enter_context(lm.replace_at(Place(block.layer, name), restored.flatten(0, 1), every))
        joined = stack.enter_context(lm.capture(blocks, samples))
        for block in blocks:
            stack.enter_context(lm.replace_at(block, runs.corrupted[block].flatten(0, 1), every))
        prefix = runs.cache
        if lm.architecture.supports_packing:
            prefix = runs.cache.before(runs.first) if runs.cache is not None and runs.first else None
        stack.enter_context(stop_after(lm.blocks[spans[-1].start]))
        lm.forward(suffix_batch(runs.prompt, samples), prefix)
    return [
        Branch(
            span.start,
            joined[Place(span.start, "block")],
            {(place := Place(later, name)): runs.clean[place] for later in span[1:]},
        )
        for span in spans
    ]


def window_around(layer: int, window: int, n_layers: int) -> range:
    """The layers of a window around `layer`, of which half lie before it; cut at the model's first and last layer.

    >>> window_around(7, 10, 30), window_around(2, 10, 30), window_around(7, 3, 30)
    (range(2, 12), range(0, 7), range(6, 9))
    """
    return range(max(0, layer - window // 2), min(n_layers, layer + (window + 1) // 2))


@dataclass(frozen=True)
class _Rows:
    """Rows of one length: those of a branch, a token and a sample each.

    Attributes:
        first: position of their first token.
        branch: index of each row's branch, [n].
        position: position of each row's restored token, [n].
        sample: index of each row's sample, [n].
    """

    first: int
    branch: Tensor
    position: Tensor
    sample: Tensor

    def split(self, size: int) -> Iterator["_Rows"]:
        parts = (tensor.split(size) for tensor in (self.branch, self.position, self.sample))
        for branch, position, sample in zip(*parts, strict=True):
            yield _Rows(self.first, branch, position, sample)


@torch.no_grad()
def restored(
    lm: LanguageModel, runs: Runs, branches: Sequence[Branch], positions: Sequence[int], max_tokens: int
) -> Tensor:
    """The probability of the answer in every branch at every position, in every sample.

    Args:
        lm: the language model.
        runs: the runs.
        branches: B branches.
        positions: n positions of tokens, from the subject's first one on.
        max_tokens: tokens of one pass at most.

    Returns:
        [B, n, S].
    """
    found = torch.empty(len(branches), len(positions), runs.samples, dtype=runs.p_corrupted.dtype)
    index = {position: i for i, position in enumerate(positions)}
    for layer in sorted({branch.layer for branch in branches}):
        own = [i for i, branch in enumerate(branches) if branch.layer == layer]
        for together in _passes(lm, runs, len(own), positions, max_tokens):
            p = _run(lm, runs, [branches[i] for i in own], together).cpu()
            branch, position, sample = (
                torch.cat([getattr(rows, name) for rows in together]) for name in ("branch", "position", "sample")
            )
            place = torch.tensor([index[int(i)] for i in position])
            found[torch.tensor(own)[branch], place, sample] = p
    return found


def _passes(
    lm: LanguageModel, runs: Runs, n_branches: int, positions: Sequence[int], max_tokens: int
) -> Iterator[list[_Rows]]:
    """The rows of each pass. Packed rows begin at their restored token, others at the subject's first token."""
    packed = lm.architecture.supports_packing
    end = len(runs.prompt.ids)
    pieces: list[_Rows] = []
    for group in [[position] for position in positions] if packed else [list(positions)]:
        axes = (torch.arange(n_branches), torch.tensor(group), torch.arange(runs.samples))
        branch, position, sample = torch.cartesian_prod(*axes).T
        first = group[0] if packed else runs.first
        pieces += _Rows(first, branch, position, sample).split(max(1, max_tokens // (end - first)))
    together: list[_Rows] = []
    room = 0
    for piece in pieces:
        size = len(piece.branch) * (end - piece.first)
        if together and (not packed or size > room):
            yield together
            together = []
        room = (room if together else max_tokens) - size
        together.append(piece)
    yield together


def _run(lm: LanguageModel, runs: Runs, branches: Sequence[Branch], together: Sequence[_Rows]) -> Tensor:
    """The probability of the answer in each row of one pass, [rows]; all branches have one layer."""
    prompt, layer, offset = runs.prompt, branches[0].layer, runs.first
    end = len(prompt.ids)
    samples = torch.arange(runs.samples)
    joined = torch.stack([branch.joined.expand(len(samples), -1, -1) for branch in branches])
    hidden = []
    for rows in together:
        states = runs.corrupted[Place(layer, "block")][rows.sample, rows.first - offset :]
        new = joined[rows.branch, rows.sample, rows.position - offset]
        states[torch.arange(len(states)), rows.position - rows.first] = new
        hidden.append(states)
    counts = [len(rows.sample) for rows in together]
    # a token of a packed pass is the first of its row, whose length differs, plus its place in the row
    starts = list(accumulate((n * (end - r.first) for n, r in zip(counts, together, strict=True)), initial=0))
    packed = lm.architecture.supports_packing

    def at(number: int, row: Tensor, column: Tensor) -> Tensor:
        """(row, position) of tokens of the rows `number` in the pass, [2, n]."""
        if not packed:
            return torch.stack([row, column])
        flat = starts[number] + row * (end - together[number].first) + column
        return torch.stack([torch.zeros_like(flat), flat])

    reads = torch.tensor(prompt.reads)
    read_at = torch.cat(
        [
            at(i, torch.arange(n).repeat_interleave(len(reads)), (reads - rows.first).repeat(n))
            for i, (n, rows) in enumerate(zip(counts, together, strict=True))
        ],
        dim=1,
    )
    with ExitStack() as stack:
        for place, states, tokens in _held(branches, together, at, offset):
            stack.enter_context(lm.replace_at(place, states, (tokens[0], tokens[1])))
        whole = torch.cat([states.flatten(0, 1) for states in hidden])[None] if packed else hidden[0]
        stack.enter_context(lm.starting_at(layer + 1, whole))
        read = stack.enter_context(lm.before_head(len(whole), (read_at[0], read_at[1])))
        if packed:
            _forward_packed(lm, runs, together, layer, whole.dtype)
        else:
            (rows,) = together
            cache = None if runs.cache is None else runs.cache.without(range(layer + 1)).rows(rows.sample)
            lm.forward(suffix_batch(prompt, len(rows.sample)), cache)
    return answer_probability(lm, read[0], prompt)


def _held(
    branches: Sequence[Branch], together: Sequence[_Rows], at: Callable[[int, Tensor, Tensor], Tensor], offset: int
) -> Iterator[tuple[Place, Tensor, Tensor]]:
    """(place, its fixed outputs [n, d], the tokens at which they stand [2, n]) of the rows of one pass."""
    for place in sorted({place for branch in branches for place in branch.held}):
        states, tokens = [], []
        for number, rows in enumerate(together):
            for index, branch in enumerate(branches):
                chosen = (rows.branch == index).nonzero().squeeze(1)
                if place in branch.held and len(chosen):
                    outputs = branch.held[place]
                    sample = rows.sample[chosen] % len(outputs)
                    states.append(outputs[sample, rows.position[chosen] - offset])
                    tokens.append(at(number, chosen, rows.position[chosen] - rows.first))
        if states:
            yield place, torch.cat(states), torch.cat(tokens, dim=1)


def _forward_packed(lm: LanguageModel, runs: Runs, together: Sequence[_Rows], layer: int, dtype: torch.dtype) -> None:
    """Run the rows end to end, each with the corrupted run's keys and values of the tokens before its own."""
    prompt = runs.prompt
    end = len(prompt.ids)
    assert runs.cache is not None
    above = runs.cache.without(range(layer + 1))
    ids, positions, spans = [], [], []
    for rows in together:
        n, length = len(rows.sample), end - rows.first
        cache = above.before(rows.first).rows(rows.sample) if rows.first else None
        spans.append(Span.of(torch.ones(n, end, dtype=torch.bool, device=lm.device), length, cache, dtype))
        ids.append(torch.tensor(prompt.ids[rows.first :]).repeat(n))
        positions.append(torch.arange(rows.first, end).repeat(n))
    lm.forward_packed(torch.cat(ids), torch.cat(positions), spans)
