"""The engine of causal tracing: clean and corrupted runs of one prompt, and restorations in the corrupted one.

A restoration replaces, in the corrupted run, states of one token by those of the clean run. It changes nothing but this
token and later ones, in later blocks. So tokens before the subject are run once, as a prefix cache; the corrupted run
is kept; and a restoration starts behind the block that it changes first, at the token that it changes. The result is
that of whole passes.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from lightedit.analysis.prompts import TracedPrompt
from lightedit.lm import LanguageModel, Place
from lightedit.lm.batch import Batch
from lightedit.lm.cache import PrefixCache, RecordingCache
from lightedit.lm.hooks import At, stop_after
from lightedit.lm.packed import Span
from lightedit.lm.place import Name
from lightedit.lm.prefix import prefix_cache

_HEAD_ROWS = 128  # positions whose logits exist at one time


@dataclass(frozen=True)
class Runs:
    """The clean run and the S corrupted runs of one prompt, from the subject's first token on: s tokens.

    Attributes:
        prompt: the prompt.
        clean: place -> its output in the clean run, [1, s, d].
        corrupted: place -> its output in the corrupted runs, [S, s, d].
        p_clean: probability of the answer in the clean run.
        p_corrupted: that in each corrupted run, [S].
        cache: keys and values of all tokens in the corrupted runs if passes can be packed, else those of the tokens
            before the subject, [S, ...]; None if there are none.
        noise: what was added to the subject's embeddings, [S, subject tokens, d].
        replaces: whether it took their place instead.
    """

    prompt: TracedPrompt
    clean: Mapping[Place, Tensor]
    corrupted: Mapping[Place, Tensor]
    p_clean: float
    p_corrupted: Tensor
    cache: PrefixCache | None
    noise: Tensor
    replaces: bool

    @property
    def first(self) -> int:
        """Position of the first of the s tokens."""
        return self.prompt.subject[0]

    @property
    def samples(self) -> int:
        return len(self.noise)


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


@torch.no_grad()
def run_clean_and_corrupted(
    lm: LanguageModel, prompt: TracedPrompt, noise: Tensor, names: Sequence[Name], replace: bool = False
) -> Runs:
    """Run a prompt as it is, and with noise at the subject's embeddings.

    Args:
        lm: the language model.
        prompt: the prompt.
        noise: what is added to the output of the embedding at the subject's tokens, [S, subject tokens, d].
        names: names of the places whose outputs are kept in every layer, besides "block".
        replace: whether the noise takes the place of the embeddings.
    """
    first, samples = prompt.subject[0], len(noise)
    places = [Place(layer, name) for layer in range(lm.n_layers) for name in (*names, "block")]
    prefix, _ = prefix_cache(lm, [prompt.ids[:first]])
    with lm.capture(places, 1) as clean, lm.before_head(1, _reads(prompt, 1)) as read:
        lm.forward(_suffix(prompt, 1), prefix)
    p_clean = answer_probability(lm, read[0], prompt)

    caches = None if prefix is None else prefix.rows(torch.zeros(samples, dtype=torch.long))
    recording = RecordingCache(caches, lm.n_layers) if lm.architecture.supports_packing else None
    with (
        _corrupted(lm, noise, replace),
        lm.capture(places, samples) as corrupted,
        lm.before_head(samples, _reads(prompt, samples)) as read,
    ):
        lm.forward(_suffix(prompt, samples), caches if recording is None else recording)
    p_corrupted = answer_probability(lm, read[0], prompt)
    cache = caches if recording is None else recording.recorded()
    return Runs(prompt, clean, corrupted, float(p_clean), p_corrupted, cache, noise, replace)


def _corrupted(lm: LanguageModel, noise: Tensor, replace: bool) -> AbstractContextManager[None]:
    """Within the context, the embeddings of the first tokens of all rows are corrupted."""
    change = lm.replace_at if replace else lm.add_at
    return change(Place(0, "embedding"), noise.flatten(0, 1), _all_tokens(*noise.shape[:2]))


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
    every = _all_tokens(samples, length)
    blocks = [Place(layer, "block") for layer in range(spans[-1].start + 1)]
    with ExitStack() as stack:
        stack.enter_context(_corrupted(lm, runs.noise, runs.replaces))
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
        lm.forward(_suffix(runs.prompt, samples), prefix)
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
            cache = None if runs.cache is None else runs.cache.rows(rows.sample)
            lm.forward(_suffix(prompt, len(rows.sample)), cache)
    return answer_probability(lm, read[0], prompt)


def _held(branches, together, at, offset) -> Iterator[tuple[Place, Tensor, Tensor]]:  # type: ignore[no-untyped-def]
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


def answer_probability(lm: LanguageModel, hidden: Tensor, prompt: TracedPrompt) -> Tensor:
    """The joint probability of the answer's tokens, [n], from the head's inputs at them, [n * m, d]."""
    head = lm.head
    targets = torch.tensor(prompt.targets, device=head.weight.device).repeat(len(hidden) // len(prompt.targets))
    parts = []
    for states, wanted in zip(hidden.to(head.weight.device).split(_HEAD_ROWS), targets.split(_HEAD_ROWS), strict=True):
        logits = head.logits(states)
        parts.append(logits.gather(1, wanted[:, None])[:, 0] - logits.logsumexp(dim=1))
    return torch.cat(parts).reshape(-1, len(prompt.targets)).sum(dim=1).exp()


def _suffix(prompt: TracedPrompt, rows: int) -> Batch:
    """The prompt from the subject's first token on, `rows` times."""
    first, end = prompt.subject[0], len(prompt.ids)
    return Batch(
        torch.tensor(prompt.ids[first:]).repeat(rows, 1),
        torch.ones(rows, end, dtype=torch.bool),
        torch.arange(first, end).repeat(rows, 1),
    )


def _reads(prompt: TracedPrompt, rows: int) -> At:
    columns = torch.tensor(prompt.reads) - prompt.subject[0]
    return torch.arange(rows).repeat_interleave(len(columns)), columns.repeat(rows)


def _all_tokens(rows: int, tokens: int) -> At:
    """The first `tokens` tokens of every row."""
    return torch.arange(rows).repeat_interleave(tokens), torch.arange(tokens).repeat(rows)
