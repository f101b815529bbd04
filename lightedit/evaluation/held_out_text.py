"""Held-out text: a model's perplexity on it, and its KL from the unedited model."""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lightedit.data.texts import read_texts, token_windows, write_texts
from lightedit.errors import ArgumentError, NumericalError
from lightedit.lm import LanguageModel
from lightedit.lm.arguments import check_model
from lightedit.lm.batch import pad
from lightedit.metrics.functional import bootstrap_interval

_TOKENS, _LENGTH = 2048, 128  # tokens in all, and of one window
_SEED = 1  # of self-generated text; differs from the covariance's seed, so that the text is held out from it
POSITIONS = 256
"""Number of positions at which distributions are compared: 256 × 128k tokens of vocabulary are 131 MB."""
_PASS_TOKENS, _ROWS = 1024, 128  # most tokens of a forward pass, and most positions whose logits exist at one time


def held_out_windows(lm: LanguageModel, texts: Sequence[Sequence[int]] | str | Path | None) -> list[list[int]]:
    """Token windows of held-out text.

    Args:
        lm: the model; its tokenizer splits the text.
        texts: a `.txt` file or a data set (see `read_texts`), of which 2048 tokens are read; or windows, of which
            those with at least two tokens are used. None lets the model, with its present weights, write 2048 tokens.

    Raises:
        FileNotFoundError: the text file does not exist.
        UnsupportedModelError: the model predicts no next tokens.
        ArgumentError: no window has two tokens; or one is longer than the model's positions, or holds a token without a
            row in the embedding.
    """
    check_model(lm, what="held-out text")
    longest = lm.positions or _LENGTH
    if texts is None:
        return write_texts(lm, _TOKENS, min(_LENGTH, longest), _SEED, progress_bar=False)
    if isinstance(texts, str | Path):
        windows = token_windows(lm, read_texts(texts), _TOKENS, min(_LENGTH, longest))
    else:
        windows = [list(window) for window in texts]
        lm.check_rows(windows)
    windows = [window for window in windows if len(window) > 1]  # in a shorter window, no token is predicted
    if not windows:
        raise ArgumentError("the held-out text has no window of two tokens or more; give a longer text")
    return windows


class HeldOutText:
    """Windows of text, and the model's predictions on them when the object is created (the reference).

    Attributes:
        nll: the reference's mean negative log-likelihood per token, given earlier tokens of the window, in nats.
    """

    def __init__(self, lm: LanguageModel, windows: Sequence[Sequence[int]]) -> None:
        self.lm, self.windows = lm, windows
        count = sum(len(window) - 1 for window in windows)
        chosen = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:POSITIONS]
        self._sampled = torch.zeros(count, dtype=torch.bool).index_fill(0, chosen, True)
        self._reference: list[Tensor] = []  # log-probabilities at the sampled positions, part by part, on the CPU
        nll, _, tokens, _ = self._sums(keep=True).sum(0).tolist()
        self.nll = nll / tokens

    def measure(self) -> tuple[float, float]:
        """Mean NLL per token, and mean KL(now || reference) of the next token at sampled positions, both in nats."""
        nll, kl, tokens, sampled = self.sums().sum(0).tolist()
        return nll / tokens, kl / sampled

    def sums(self) -> Tensor:
        """The sums that `measure` averages, for each window: [windows, 4] float64 on the CPU.

        The columns are the sum of NLL, the sum of KL, both in nats, the number of predicted tokens, and the number of
        sampled ones.
        """
        return self._sums(keep=False)

    def perplexity_and_kl(self) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
        """Perplexity, KL(now || reference) in nats per token, and their 95 % intervals, by name.

        Intervals are bootstrapped over windows.

        Raises:
            NumericalError: one of them is NaN or infinite.
        """
        sums = self.sums()
        statistics: dict[str, Callable[[Tensor], Tensor]] = {
            "perplexity": lambda sums: (sums[:, 0] / sums[:, 2]).exp(),
            "kl": lambda sums: sums[:, 1] / sums[:, 3],
        }
        values = {name: statistic(sums.sum(0, keepdim=True)).item() for name, statistic in statistics.items()}
        for name, value in values.items():
            if not math.isfinite(value):
                raise NumericalError(
                    f"{name} on held-out text is {value}; an edit may have ruined the model; revert it, or evaluate "
                    "without held-out text to get the other scores"
                )
        ends = {name: tuple(bootstrap_interval(sums, statistic).tolist()) for name, statistic in statistics.items()}
        return values, {name: (low, high) for name, (low, high) in ends.items()}

    def _sums(self, keep: bool) -> Tensor:
        sums = torch.zeros(len(self.windows), 4, dtype=torch.float64)
        for part, (log_probs, following, sampled, window) in enumerate(self._parts()):
            now = log_probs[sampled]
            if keep:
                self._reference.append(now.cpu())
            now = now.double()
            kl = torch.zeros(len(following), dtype=torch.float64)
            kl[sampled.cpu()] = (now.exp() * (now - self._reference[part].to(now))).sum(1).cpu()
            nll = -log_probs.gather(1, following[:, None]).squeeze(1).double().cpu()
            sums.index_add_(0, window, torch.stack([nll, kl, torch.ones_like(nll), sampled.cpu().double()], 1))
        return sums

    @torch.no_grad()
    def _parts(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Yield (log-probabilities [n, vocabulary], next tokens [n], whether sampled [n], index of the window [n]).

        Indices of windows are on the CPU.
        """
        rows = max(1, _PASS_TOKENS // max(map(len, self.windows)))
        done = 0
        for start in range(0, len(self.windows), rows):
            batch = pad(self.windows[start : start + rows], self.lm.pad_id)
            at_row, at_position = batch.mask[:, 1:].nonzero(as_tuple=True)  # positions with a next token
            with self.lm.before_head(len(batch.ids), (at_row, at_position)) as states:
                self.lm.forward(batch)
            following = batch.ids[at_row, at_position + 1]
            groups = zip(states[0].split(_ROWS), following.split(_ROWS), (at_row + start).split(_ROWS), strict=True)
            for hidden, tokens, window in groups:
                log_probs = self.lm.head.log_probs(hidden)
                sampled = self._sampled[done : done + len(tokens)]
                yield log_probs, tokens.to(log_probs.device), sampled.to(log_probs.device), window.cpu()
                done += len(tokens)
