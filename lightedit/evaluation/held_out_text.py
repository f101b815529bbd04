"""Held-out text: how well a model still predicts it, and how far it strays from the unedited model there."""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lightedit.data.texts import read_texts, token_windows, write_texts
from lightedit.errors import ArgumentError, NumericalError
from lightedit.lm import LanguageModel
from lightedit.lm.batch import pad
from lightedit.metrics.functional import bootstrap_interval

_TOKENS, _LENGTH = 2048, 128  # of text in all, and of one window
_SEED = 1  # of self-generated text; another than that of the covariance, so that this text is held out from it
POSITIONS = 256
"""Where distributions are compared: 256 x 128k tokens of vocabulary are 131 MB."""
_PASS_TOKENS, _ROWS = 1024, 128  # tokens of a forward pass, and positions whose logits exist at one time, at most


def held_out_windows(lm: LanguageModel, texts: Sequence[Sequence[int]] | str | Path | None) -> list[list[int]]:
    """Token windows of held-out text.

    Args:
        lm: whose tokenizer is used.
        texts: windows, of which those of two tokens or more are taken; or a `.txt` file or a data set (see
            `read_texts`), of which 2048 tokens are taken; None lets the model, as it is now, write as many.

    Raises:
        FileNotFoundError: there is no such text file.
        ArgumentError: no window has two tokens.
    """
    longest = getattr(lm.model.config.get_text_config(), "max_position_embeddings", None) or _LENGTH
    if texts is None:
        return write_texts(lm, _TOKENS, min(_LENGTH, longest), _SEED, progress_bar=False)
    if isinstance(texts, str | Path):
        windows = token_windows(lm, read_texts(texts), _TOKENS, min(_LENGTH, longest))
    else:
        windows = [list(window) for window in texts]
    windows = [window for window in windows if len(window) > 1]  # nothing follows a single token
    if not windows:
        raise ArgumentError("the held-out text has no window of two tokens or more; give a longer text")
    return windows


class HeldOutText:
    """Windows of text, and what the model says about them when this is made.

    Attributes:
        nll: mean negative log-likelihood of each token given those before it in its window, in nats.
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
        """Mean NLL per token, and KL(now || then) of the next token at the sampled positions, both in nats."""
        nll, kl, tokens, sampled = self.sums().sum(0).tolist()
        return nll / tokens, kl / sampled

    def sums(self) -> Tensor:
        """What `measure` averages, for each window: [windows, 4] float64 on the CPU.

        The sum of NLL and that of KL, in nats, the number of tokens that are predicted, and of the sampled ones.
        """
        return self._sums(keep=False)

    def perplexity_and_kl(self) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
        """Perplexity, and KL(now || then) in nats per token; and their 95 % intervals, bootstrapped over windows.

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
                    f"{name} on held-out text is {value}; an edit may have ruined the model (revert it; without that "
                    "text the other scores are to be had)"
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
        """(log-probabilities [n, vocabulary], tokens that follow [n], whether sampled [n], window [n]), part by part.

        The windows' numbers are on the CPU.
        """
        rows = max(1, _PASS_TOKENS // max(map(len, self.windows)))
        done = 0
        for start in range(0, len(self.windows), rows):
            batch = pad(self.windows[start : start + rows], self.lm.pad_id)
            at_row, at_position = batch.mask[:, 1:].nonzero(as_tuple=True)  # where another token follows
            with self.lm.before_head(len(batch.ids), (at_row, at_position)) as states:
                self.lm.forward(batch)
            following = batch.ids[at_row, at_position + 1]
            groups = zip(states[0].split(_ROWS), following.split(_ROWS), (at_row + start).split(_ROWS), strict=True)
            for hidden, tokens, window in groups:
                log_probs = self.lm.head.log_probs(hidden)
                sampled = self._sampled[done : done + len(tokens)]
                yield log_probs, tokens.to(log_probs.device), sampled.to(log_probs.device), window.cpu()
                done += len(tokens)
