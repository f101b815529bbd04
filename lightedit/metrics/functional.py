"""The arithmetic of the metrics, on tensors.

A *record* is one fact with its prompts. Values are averaged over a record's prompts first, then over records
(Meng et al., 2022, arXiv 2202.05262, section 3.3). NLL is the mean negative log-likelihood per target token,
in nats. The *wanted* answer is the new target on the fact's own prompt and its paraphrases, the true one on its
neighbourhood.
"""

import numpy as np
import torch
from torch import Tensor


def success(nll_wanted: Tensor, nll_other: Tensor) -> Tensor:
    """1 where the wanted answer is strictly the more probable one, else 0; any shape, float64.

    >>> success(torch.tensor([0.5, 2.0]), torch.tensor([1.0, 1.0]))
    tensor([1., 0.], dtype=torch.float64)
    """
    return (nll_wanted < nll_other).double()


def magnitude(nll_wanted: Tensor, nll_other: Tensor) -> Tensor:
    """Difference of the two answers' per-token probabilities (geometric means), in [-1, 1]; any shape."""
    return torch.exp(-nll_wanted) - torch.exp(-nll_other)


def accuracy(token_accuracy: Tensor) -> Tensor:
    """1 where every token of the answer is the most probable one, else 0; any shape, float64.

    Args:
        token_accuracy: share of the answer's tokens that are.
    """
    return (token_accuracy == 1).double()


def harmonic_mean(values: Tensor) -> Tensor:
    """Harmonic mean over the last dimension of values >= 0; 0 if one of them is 0.

    >>> harmonic_mean(torch.tensor([1.0, 0.5, 0.5]))
    tensor(0.6000)
    """
    return values.shape[-1] / (1 / values).sum(dim=-1)


def mean_interval(sums: Tensor) -> Tensor:
    """95 % confidence interval of a mean over records: mean ± 1.96 s / sqrt(n), a normal approximation.

    Args:
        sums: [3]: the sum of the records' values, the sum of their squares, and their number n.

    Returns:
        [2]: lower and upper end; NaN for fewer than two records, whose spread is unknown.
    """
    total, squares, n = sums.unbind()
    variance = (squares - total.square() / n).clamp(min=0) / (n - 1)
    half = torch.where(n > 1, 1.96 * (variance / n).sqrt(), torch.nan)
    return torch.stack([total / n - half, total / n + half])


def edit_score(records: Tensor) -> Tensor:
    """Score S: the harmonic mean of ES, PS and NS, each averaged over the records that have it.

    Args:
        records: [n, 3] in [0, 1]: each record's efficacy, paraphrase and neighbourhood score; NaN where it
            has none.

    Returns:
        A scalar in [0, 1]; NaN if one of the three is missing everywhere.
    """
    return harmonic_mean(records.nanmean(dim=0))


def edit_score_interval(records: Tensor, resamples: int = 1000, seed: int = 0) -> Tensor:
    """95 % confidence interval of score S, by drawing records with replacement (percentile bootstrap).

    Args:
        records: as for `edit_score`; their order does not matter.
        resamples: how many times n records are drawn.
        seed: of the drawing.

    Returns:
        [2]: lower and upper end; NaN for fewer than two records or if S is NaN.
    """
    n = len(records)
    if n < 2 or edit_score(records).isnan():
        return torch.full((2,), torch.nan, dtype=torch.float64)
    present = ~records.isnan()
    outcomes = torch.cat([records.nan_to_num(0.0).double(), present.double()], dim=1)  # [n, 6]
    # sorted, so that the records' order, which differs with the number of processes, has no say
    distinct, repeats = outcomes.cpu().unique(dim=0, return_counts=True)
    shares = (repeats.double() / n).numpy()
    counts = np.random.default_rng(seed).multinomial(n, shares, size=resamples)
    sums = torch.from_numpy(counts).double() @ distinct  # [resamples, 6]
    scores = harmonic_mean(sums[:, :3] / sums[:, 3:])
    return scores.nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
