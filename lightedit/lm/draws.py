"""Sampling in which every row draws from a random generator of its own."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor


class SeededDraws(LogitsProcessor):
    """Choose each row's next token among its `top_k` most probable ones, by the row's own random numbers.

    Step t of a row uses the t-th number of the generator with its seed, whatever its batch, its place there and the
    number of steps. The number u in [0, 1) picks the first token, most probable first, up to which the k tokens'
    renormalised probabilities sum to more than u; with one model a little different from another, equal seeds then
    mostly give equal tokens. All other logits become -inf, so that greedy decoding takes that token.

    Args:
        seeds: one for each row, >= 0.
        steps: tokens that will be drawn at most.
        top_k: how many of the most probable tokens can be drawn; 1 is greedy decoding.
    """

    def __init__(self, seeds: Sequence[int], steps: int, top_k: int) -> None:
        numbers = np.stack([np.random.default_rng(seed).random(steps) for seed in seeds])  # [rows, steps]
        self._numbers = torch.from_numpy(numbers)
        self._top_k = top_k
        self._step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits [rows, vocabulary] with all but the drawn token at -inf.

        Raises:
            FloatingPointError: a row's best logits are NaN or infinite.
        """
        best = scores.topk(min(self._top_k, scores.shape[-1]))
        if not best.values.isfinite().all():
            raise FloatingPointError(
                "the logits of the next token are NaN or infinite; an edit may have ruined the model (revert it), "
                "or its dtype is too narrow (load it in float32)"
            )
        sums = best.values.double().softmax(-1).cumsum(-1)  # [rows, k]
        number = self._numbers[:, self._step, None].to(sums.device)
        place = (sums[:, :-1] <= number).sum(-1, keepdim=True)  # the last sum is 1 but for rounding
        self._step += 1
        return torch.full_like(scores, -torch.inf).scatter(1, best.indices.gather(1, place), 0.0)
