"""The metrics as functions of tensors.

A *record* is one fact with its prompts. Values are averaged over a record's prompts first, then over records
(Meng et al., 2022, arXiv 2202.05262, section 3.3). NLL is the mean negative log-likelihood per target token,
in nats. The *wanted* answer is the new target on the fact's own prompt and on its paraphrases. It is the true target
on its neighbourhood.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

# Combining marks are listed, because NFKD turns é into e and a mark, which \w does not match
_WORD = re.compile(r"[\w\u0300-\u036f]+(?:[-'’.,][\w\u0300-\u036f]+)*|[^\w\s]")
_ARTICLES = ("a", "an", "the")
_TERM = re.compile(r"\b\w\w+\b")


def success(nll_wanted: Tensor, nll_other: Tensor) -> Tensor:
    """1 where the wanted answer is strictly more probable than the other, else 0; any shape, float64.

    >>> success(torch.tensor([0.5, 2.0]), torch.tensor([1.0, 1.0]))
    tensor([1., 0.], dtype=torch.float64)
    """
    return (nll_wanted < nll_other).double()


def magnitude(nll_wanted: Tensor, nll_other: Tensor) -> Tensor:
    """Wanted minus other per-token probability (geometric mean over tokens), in [-1, 1]; any shape."""
    return torch.exp(-nll_wanted) - torch.exp(-nll_other)


def accuracy(token_accuracy: Tensor) -> Tensor:
    """1 where every token of the answer is the most probable one, else 0; any shape, float64.

    Args:
        token_accuracy: share of the answer's tokens that are the most probable ones, any shape.
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
        sums: [3]: the sum of the records' values, the sum of their squares, and the number n of records.

    Returns:
        [2]: lower and upper end; NaN for fewer than two records.
    """
    total, squares, n = sums.unbind()
    variance = (squares - total.square() / n).clamp(min=0) / (n - 1)
    half = torch.where(n > 1, 1.96 * (variance / n).sqrt(), torch.nan)
    return torch.stack([total / n - half, total / n + half])


def edit_score(records: Tensor) -> Tensor:
    """Score S: the harmonic mean of ES, PS and NS, each averaged over the records that have it.

    Args:
        records: [n, 3] in [0, 1]: each record's efficacy, paraphrase and neighbourhood score; NaN for a missing
            score. The order of records does not matter.

    Returns:
        A scalar in [0, 1]; NaN if one of the three scores is missing in all records.
    """
    return harmonic_mean(records.sort(dim=0).values.nanmean(dim=0))


def edit_score_interval(records: Tensor, resamples: int = 1000, seed: int = 0) -> Tensor:
    """95 % confidence interval of score S, by the percentile bootstrap over records.

    Args:
        records: as for `edit_score`; their order does not matter.
        resamples: number of resamples of n records.
        seed: seed of the resampling.

    Returns:
        [2]: lower and upper end; NaN for fewer than two records or if S is NaN.
    """
    if edit_score(records).isnan():
        return torch.full((2,), torch.nan, dtype=torch.float64)
    present = ~records.isnan()
    outcomes = torch.cat([records.nan_to_num(0.0).double(), present.double()], dim=1)  # [n, 6]
    return bootstrap_interval(outcomes, lambda sums: harmonic_mean(sums[:, :3] / sums[:, 3:]), resamples, seed)


def bootstrap_interval(
    records: Tensor, statistic: Callable[[Tensor], Tensor], resamples: int = 1000, seed: int = 0
) -> Tensor:
    """95 % confidence interval of a statistic of sums over records, by the percentile bootstrap over records.

    It serves statistics that are not means over records, such as a harmonic mean or a ratio.

    Args:
        records: [n, k]; their order does not matter.
        statistic: sums over the n records of each resample, [resamples, k] -> [resamples].
        resamples: number of resamples of n records.
        seed: seed of the resampling.

    Returns:
        [2]: lower and upper end; NaN for fewer than two records.
    """
    n = len(records)
    if n < 2:
        return torch.full((2,), torch.nan, dtype=torch.float64)
    # unique sorts the records, so their order, which depends on the number of processes, does not matter
    distinct, repeats = records.double().cpu().unique(dim=0, return_counts=True)
    shares = (repeats.double() / n).numpy()
    counts = np.random.default_rng(seed).multinomial(n, shares, size=resamples)
    found = statistic(torch.from_numpy(counts).double() @ distinct)
    return found.nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64))


def unchanged(predicted: Sequence[Sequence[int]], before: Sequence[Sequence[int]]) -> Tensor:
    """1 where the tokens predicted for an answer are all the same as before the edit, else 0; [n] float64.

    >>> unchanged([[5, 7], [5]], [[5, 7], [6]])
    tensor([1., 0.], dtype=torch.float64)
    """
    same = [list(now) == list(then) for now, then in zip(predicted, before, strict=True)]
    return torch.tensor(same, dtype=torch.float64)


def inverse_document_frequencies(documents: Sequence[str]) -> dict[str, float]:
    """Inverse document frequency of each term: ln((1 + n) / (1 + d)) + 1 for a term in d of n documents.

    A term is a run of at least two letters, digits or underscores, in lower case. This is scikit-learn's
    `TfidfVectorizer` with its default settings. The code published with ROME fits it to all its reference texts.
    """
    found = Counter(term for document in documents for term in set(_terms(document)))
    return {term: math.log((1 + len(documents)) / (1 + count)) + 1 for term, count in found.items()}


def reference_score(
    texts: Sequence[str], references: Sequence[str], frequencies: Mapping[str, float] | None = None
) -> Tensor:
    """RS: cosine of the TF-IDF vectors of each text and its reference (Meng et al., 2022, arXiv 2202.05262).

    The entry of a term is its number of occurrences times its inverse document frequency. Terms without an inverse
    document frequency do not count.

    Args:
        texts: n texts; several generated texts of a record are joined to one.
        references: n texts; several references of a record are joined to one.
        frequencies: term -> inverse document frequency; None computes them from `references`, one document each.

    Returns:
        [n] float64 in [0, 1]; 0 where a text or its reference has no term that counts.

    >>> reference_score(["Rome is old"], ["Rome is in Italy"])  # 2 / sqrt(2 * 4): "old" is in no reference
    tensor([0.7071], dtype=torch.float64)
    """
    weights = inverse_document_frequencies(references) if frequencies is None else frequencies
    found = [_cosine(*(_vector(text, weights) for text in pair)) for pair in zip(texts, references, strict=True)]
    return torch.tensor(found, dtype=torch.float64)


def _terms(text: str) -> list[str]:
    return _TERM.findall(text.lower())


def _vector(text: str, weights: Mapping[str, float]) -> dict[str, float]:
    return {term: count * weights[term] for term, count in Counter(_terms(text)).items() if term in weights}


def _cosine(left: Mapping[str, float], right: Mapping[str, float]) -> float:
    if not left or not right:
        return 0.0
    product = math.fsum(value * right[term] for term, value in left.items() if term in right)
    return product / (math.hypot(*left.values()) * math.hypot(*right.values()))


def generation_entropy(texts: Sequence[str]) -> Tensor:
    """GE: mean of 2/3 H2 and 4/3 H3, the entropies of the word bigrams and trigrams of each text.

    Hn = -Σ p log2 p over the distinct n-grams of the text, where p is the share of an n-gram (Meng et al., 2022,
    arXiv 2202.05262, after Zhang et al., 2018, arXiv 1809.05972). Texts are NFKD-normalised. A word is a run of
    letters, digits and underscores, with single hyphens, apostrophes, full stops and commas inside ("3.5", "don't").
    Every other sign is a word. The published code splits with NLTK: on 400 passages of Wikipedia the means differ by
    0.02 %.

    Returns:
        [n] float64, in bits; 0 for a text of fewer than three words or of one repeated word.

    >>> generation_entropy(["to be or not to be", "no no no no no"])
    tensor([1.9740, 0.0000], dtype=torch.float64)
    """
    words = [_WORD.findall(unicodedata.normalize("NFKD", text)) for text in texts]
    entropies = [(2 / 3 * _ngram_entropy(row, 2) + 4 / 3 * _ngram_entropy(row, 3)) / 2 for row in words]
    return torch.tensor(entropies, dtype=torch.float64)


def _ngram_entropy(words: Sequence[str], n: int) -> float:
    counts = np.array(list(Counter(zip(*(words[i:] for i in range(n)), strict=False)).values()))
    shares = counts / counts.sum()
    return abs(float((shares * np.log2(shares)).sum()))


def answer_f1(said: Sequence[str], answers: Sequence[str]) -> Tensor:
    """F1 of the words of what is said against those of the answer, as SQuAD counts them (1606.05250); [n] float64.

    Letters are in lower case. Punctuation and the articles a, an and the are left out, unless an answer has no other
    words. A word that comes twice is counted twice.

    >>> answer_f1([" the Amazon River", "Rhine"], ["Amazon", "the Rhine"])
    tensor([0.6667, 1.0000], dtype=torch.float64)
    """
    return torch.tensor([_f1(_words(text), _words(answer)) for text, answer in zip(said, answers, strict=True)],
                        dtype=torch.float64)  # fmt: skip


def _words(text: str) -> list[str]:
    words = "".join(c for c in text.lower() if not unicodedata.category(c).startswith("P")).split()
    return [word for word in words if word not in _ARTICLES] or words or text.split()


def _f1(said: Sequence[str], answer: Sequence[str]) -> float:
    common = sum((Counter(said) & Counter(answer)).values())
    return 2 * common / (len(said) + len(answer)) if common else 0.0


def generation_success(continuations: Sequence[str], targets: Sequence[str]) -> Tensor:
    """1 where a continuation begins with its target, ignoring white space before it, else 0; [n] float64.

    The comparison is case-sensitive. Text after the target is ignored, so "Romeo" counts as "Rome".

    >>> generation_success([" Rome, the city", "The city of Rome"], ["Rome", "Rome"])
    tensor([1., 0.], dtype=torch.float64)
    """
    stated = [text.lstrip().startswith(target) for text, target in zip(continuations, targets, strict=True)]
    return torch.tensor(stated, dtype=torch.float64)
