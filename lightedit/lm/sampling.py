"""Writing on after given tokens: one loop, and the rules by which each next token is drawn."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from lightedit.errors import ArgumentError, NumericalError
from lightedit.lm.batch import Batch

Draw = Callable[[Tensor], Tensor]
"""A rule: next-token logits [rows, vocabulary] float32 -> token ids [rows]."""


@torch.no_grad()
def next_tokens(
    forward: Callable[[Batch, DynamicCache], Tensor], cache: DynamicCache, batch: Batch, draw: Draw
) -> Iterator[Tensor]:
    """Yield the next token of every row, [rows], each step one forward pass, for as long as the caller asks.

    Args:
        forward: (tokens, cache) -> logits [rows, tokens, vocabulary], of which the last token's are read.
        cache: an empty one, which is filled.
        batch: the rows to continue, padded on the left.
        draw: the rule.
    """
    while True:
        tokens = draw(forward(batch, cache)[:, -1].to(batch.ids.device, torch.float32))
        yield tokens
        mask = torch.cat([batch.mask, batch.mask.new_ones(len(tokens), 1)], 1)
        batch = Batch(tokens[:, None], mask, batch.positions[:, -1:] + 1)


def before_end(stream: Iterator[Tensor], steps: int, ends: Sequence[int]) -> list[list[int]]:
    """The first `steps` tokens of each row, cut before an end token. Stops early once every row has ended.

    Args:
        stream: tokens of all rows, [rows], step by step; at least one step.
        steps: at most.
        ends: the tokens that end a row.
    """
    columns: list[Tensor] = []
    ended: Tensor | None = None
    for tokens in islice(stream, steps):
        columns.append(tokens)
        if ends:
            now = torch.isin(tokens, tokens.new_tensor(ends))
            ended = now if ended is None else ended | now
            if ended.all():
                break
    return [list(takewhile(lambda token: token not in ends, row)) for row in torch.stack(columns, 1).tolist()]


def greedy(logits: Tensor) -> Tensor:
    """The most probable token of each row, [rows]; of several the first."""
    return logits.argmax(-1)


@dataclass(frozen=True)
class SharedDraws:
    """Draw among the `top_k` most probable tokens, all rows by the numbers of one generator.

    What a row draws depends on its place and on the other rows.

    Attributes:
        generator: on the device of the logits.
        top_k: how many of the most probable tokens can be drawn.
        whole_vocabulary: draw a number for every token, as `transformers` does, rather than for the `top_k` alone. That
            takes longer, and other tokens come out of the same seed.
    """

    generator: torch.Generator
    top_k: int
    whole_vocabulary: bool = True

    def __call__(self, logits: Tensor) -> Tensor:
        """Draw a token for each row of the logits [rows, vocabulary]."""
        best = logits.topk(min(self.top_k, logits.shape[-1]))
        if not self.whole_vocabulary:
            drawn = torch.multinomial(best.values.softmax(-1), 1, generator=self.generator)
            return best.indices.gather(1, drawn)[:, 0]
        probabilities = logits.masked_fill(logits < best.values[:, -1:], -torch.inf).softmax(-1)
        return torch.multinomial(probabilities, 1, generator=self.generator)[:, 0]


class RowDraws:
    """Draw among the `top_k` most probable tokens, every row by the numbers of a generator of its own.

    Step t of a row uses the t-th number of the generator with its seed, whatever its batch, its place there and the
    number of steps. The number u in [0, 1) picks the first token, most probable first, up to which the k tokens'
    renormalised probabilities sum to more than u. So with one model a little different from another, equal seeds
    mostly give equal tokens.

    Args:
        seeds: one for each row, >= 0.
        steps: tokens that will be drawn at most.
        top_k: how many of the most probable tokens can be drawn; 1 is greedy.
    """

    def __init__(self, seeds: Sequence[int], steps: int, top_k: int) -> None:
        numbers = np.stack([np.random.default_rng(seed).random(steps) for seed in seeds])  # [rows, steps]
        self._numbers = torch.from_numpy(numbers)
        self._top_k = top_k
        self._step = 0

    def __call__(self, logits: Tensor) -> Tensor:
        """Draw the next step's token for each row of the logits [rows, vocabulary].

        Raises:
            NumericalError: a row's best logits are NaN or infinite.
        """
        best = logits.topk(min(self._top_k, logits.shape[-1]))
        if not best.values.isfinite().all():
            raise NumericalError(
                "the logits of the next token are NaN or infinite; an edit may have ruined the model (revert it), "
                "or its dtype is too narrow (load it in float32)"
            )
        sums = best.values.double().softmax(-1).cumsum(-1)  # [rows, k]
        number = self._numbers[:, self._step, None].to(sums.device)
        place = (sums[:, :-1] <= number).sum(-1, keepdim=True)  # the last sum is 1 but for rounding
        self._step += 1
        return best.indices.gather(1, place)[:, 0]


def draw_rule(
    top_k: int | None, seed: int | Sequence[int], rows: int, steps: int, device: torch.device
) -> Callable[[Sequence[int]], Draw]:
    """The rule for each group of rows, given by their indices.

    Args:
        top_k: how many of the most probable tokens can be drawn; None for greedy.
        seed: one of all rows, whose groups then draw from one generator in turn; or one for each row.
        rows: how many there are in all.
        steps: tokens that will be drawn at most.
        device: of the logits.

    Raises:
        ArgumentError: there are not as many seeds as rows.
    """
    if not isinstance(seed, int) and len(seed) != rows:
        raise ArgumentError(f"{len(seed)} seeds for {rows} prompts; give one for each, or a single number")
    if not top_k:
        return lambda _: greedy
    if isinstance(seed, int):
        shared = SharedDraws(torch.Generator(device).manual_seed(seed), top_k)
        return lambda _: shared
    return lambda group: RowDraws([seed[row] for row in group], steps, top_k)
