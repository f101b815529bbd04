"""Generation: the loop over next tokens, and the rules that draw each token."""

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
    """Yield the next token of each row, [rows]. Each step is one forward pass; the caller ends the loop.

    Args:
        forward: (tokens, cache) -> logits [rows, tokens, vocabulary]; the last token's are read.
        cache: an empty cache, which is filled.
        batch: the rows to continue, padded on the left.
        draw: the rule that draws a token.
    """
    while True:
        tokens = draw(forward(batch, cache)[:, -1].to(batch.ids.device, torch.float32))
        yield tokens
        mask = torch.cat([batch.mask, batch.mask.new_ones(len(tokens), 1)], 1)
        batch = Batch(tokens[:, None], mask, batch.positions[:, -1:] + 1)


def before_end(stream: Iterator[Tensor], steps: int, ends: Sequence[int]) -> list[list[int]]:
    """The first `steps` tokens of each row, cut before an end token. Stops early once every row has ended.

    Args:
        stream: tokens of all rows, [rows], for each step; at least one step.
        steps: number of steps at most.
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
    """The most probable token of each row, [rows]; the first one if several are equally probable."""
    return logits.argmax(-1)


@dataclass(frozen=True)
class SharedDraws:
    """Draw among the `top_k` most probable tokens, with one generator for all rows.

    The draws of a row depend on its index in the batch and on the other rows.

    Attributes:
        generator: a generator on the device of the logits.
        top_k: number of the most probable tokens that can be drawn.
        whole_vocabulary: draw a number for every token, as `transformers` does, not for the `top_k` alone. This takes
            longer, and the same seed gives other tokens.
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
    """Draw among the `top_k` most probable tokens, with one generator for each row.

    Step t of a row uses the t-th number u in [0, 1) of the row's generator. It depends neither on the row's batch, nor
    on its index there, nor on the number of steps. The k probabilities are renormalised, and the drawn token is the
    first, from the most probable on, whose cumulative probability exceeds u. So equal seeds mostly give equal tokens
    on two models that differ little.

    Args:
        seeds: one for each row, >= 0.
        steps: number of steps at most.
        top_k: number of the most probable tokens that can be drawn; 1 is greedy.
    """

    def __init__(self, seeds: Sequence[int], steps: int, top_k: int) -> None:
        numbers = np.stack([np.random.default_rng(seed).random(steps) for seed in seeds])  # [rows, steps]
        self._numbers = torch.from_numpy(numbers)
        self._top_k = top_k
        self._step = 0

    def __call__(self, logits: Tensor) -> Tensor:
        """Draw the token of the next step for each row of the logits [rows, vocabulary].

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
    """A function that gives the drawing rule of a group of rows from their indices.

    Args:
        top_k: number of the most probable tokens that can be drawn; None for greedy.
        seed: one for all rows, whose groups draw from one generator in turn; or one for each row.
        rows: number of rows in all.
        steps: number of steps at most.
        device: device of the logits.

    Raises:
        ArgumentError: the numbers of seeds and rows differ.
    """
    if not isinstance(seed, int) and len(seed) != rows:
        raise ArgumentError(f"{len(seed)} seeds for {rows} prompts; give one for each, or a single number")
    if not top_k:
        return lambda _: greedy
    if isinstance(seed, int):
        shared = SharedDraws(torch.Generator(device).manual_seed(seed), top_k)
        return lambda _: shared
    return lambda group: RowDraws([seed[row] for row in group], steps, top_k)
