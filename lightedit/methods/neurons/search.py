"""Which neurons express a fact: coarse neurons of each of its prompts, and refined neurons, which its prompts share."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from lightedit.data.prompts import ContextSettings
from lightedit.errors import ArgumentError
from lightedit.lm import LanguageModel
from lightedit.methods.neurons.asking import AskedFact
from lightedit.methods.neurons.attribution import attribute, both_ends, midpoints

Prompts = Literal["contexts", "paraphrases", "prompt"]

FEWEST, MOST = 2, 5
"""Neurons of a fact that `NeuronSearch.adjust` aims at."""
_STEP, _MOVES = 0.05, 6  # of the share p in that search
_SLACK = 1e-9  # of a share of prompts, which is no sum of binary fractions


@dataclass(frozen=True)
class NeuronSearch:
    """How the neurons of a fact are found.

    Attributes:
        points: number of points of the integral, m.
        threshold: t; a neuron is coarse in a prompt if its attribution is at least t times the largest one of all
            layers that are searched.
        share: p; a coarse neuron is refined if it is coarse in at least this share of the fact's prompts. 0 keeps those
            of any prompt.
        adjust: move p by 0.05 at a time, at most 6 times, until a fact has 2 to 5 neurons.
        prompts: the prompts of a fact. contexts: its prompt, alone and after each context. paraphrases: its prompt and
            its paraphrases, on which an edit should then not be scored. prompt: its prompt alone.
        contexts: how the contexts are sampled.
        common: refined neurons that more than this share of the other facts of the same relation have, too, are
            dropped; Dai et al. drop those of more than 0.1. Facts without a relation keep theirs. None keeps all.

    Raises:
        ArgumentError: a value is out of range.
    """

    points: int = 20
    threshold: float = 0.2
    share: float = 0.7
    adjust: bool = False
    prompts: Prompts = "contexts"
    contexts: ContextSettings = field(default_factory=ContextSettings)
    common: float | None = None

    def __post_init__(self) -> None:
        if self.points < 1:
            raise ArgumentError(f"points must be at least 1, got {self.points}")
        if not 0 < self.threshold <= 1:
            raise ArgumentError(f"threshold is a share of the largest attribution, above 0 and at most 1, got "
                                f"{self.threshold}")  # fmt: skip
        if not 0 <= self.share <= 1:
            raise ArgumentError(f"share is a share of a fact's prompts, from 0 to 1, got {self.share}")
        if self.prompts not in get_args(Prompts):
            raise ArgumentError(f"prompts is one of {', '.join(get_args(Prompts))}, got {self.prompts!r}")
        if self.common is not None and not 0 <= self.common < 1:
            raise ArgumentError(f"common is a share of a relation's facts, from 0 to below 1, or None, got "
                                f"{self.common}")  # fmt: skip


@dataclass(frozen=True)
class FoundNeurons:
    """The refined neurons of a fact, in the order of layers.

    Attributes:
        neurons: layer and index of each, [n, 2] int64.
        attributions: the attribution of each, averaged over prompts, [n].
        shares: the share of prompts in which each is coarse, [n].
        activations: the activation of each, averaged over prompts and tokens of the answer, [n]. Behind a gate it may
            be negative.
        share: p, by which they were chosen.
        probability: joint probability of the answer's tokens after the fact's own prompt.
        by_layer: for each layer that was searched, the sum of the attributions of all its neurons, averaged over
            prompts: about what the probability would lose without this layer's key.
    """

    neurons: Tensor
    attributions: Tensor
    shares: Tensor
    activations: Tensor
    share: float
    probability: float
    by_layer: tuple[float, ...]


def find_neurons(
    lm: LanguageModel,
    asked: AskedFact,
    layers: Sequence[int],
    search: NeuronSearch,
    *,
    published: bool = False,
    max_tokens: int = 1024,
) -> FoundNeurons:
    """Find the neurons that express a fact (Dai et al., 2022, sections 3.1 and 3.2).

    The attributions of one prompt are means over the answer's tokens. Each token is attributed at its own position,
    after the prompt and the true tokens before it, so that a neuron is the same entry of the key at each of them.

    Args:
        lm: the language model, with its present weights.
        asked: the fact's prompts and answers.
        layers: the layers that are searched, ascending.
        search: the settings.
        published: points that include 0 and 1, and neurons before the activation, as the code of ROME's KN row.
        max_tokens: tokens of one pass at most; see `attribute`.

    Raises:
        UnsupportedModelError, NumericalError: see `attribute`.
    """
    points = (both_ends if published else midpoints)(search.points)
    found = attribute(lm, asked.queries(published), layers, points, before_activation=published, max_tokens=max_tokens)
    sizes = [len(answer) for answer in asked.answers]
    scores = [_means(part, sizes) for part in found.scores]  # [prompts, d_in] each
    largest = torch.stack([part.amax(1) for part in scores]).amax(0)[:, None]
    # where no attribution is positive, nothing raises the probability; the published code compares by ">"
    coarse = [(part >= search.threshold * largest) & (part > 0) for part in scores]
    counts = [part.sum(0) for part in coarse]
    share = adjusted_share(torch.cat(counts), len(sizes), search.share) if search.adjust else search.share
    chosen = [
        (layer, _refined(count, len(sizes), share).nonzero()[:, 0], part.mean(0), count)
        for layer, count, part in zip(layers, counts, scores, strict=True)
    ]
    active = [_means(part.to(found.p.dtype), sizes).mean(0) for part in found.activations]
    return FoundNeurons(
        torch.cat([torch.stack([torch.full_like(index, layer), index], dim=1) for layer, index, _, _ in chosen]),
        torch.cat([mean[index] for _, index, mean, _ in chosen]),
        torch.cat([count[index] / len(sizes) for _, index, _, count in chosen]),
        torch.cat([part[index] for part, (_, index, _, _) in zip(active, chosen, strict=True)]),
        share,
        float(found.p[: sizes[0]].prod()),
        tuple(float(part.sum(1).mean()) for part in scores),
    )


def _means(scores: Tensor, sizes: Sequence[int]) -> Tensor:
    """The mean over the tokens of each answer: [answers, d_in] from [tokens, d_in]."""
    return torch.stack([part.mean(0) for part in scores.split(list(sizes))])


def _refined(counts: Tensor, prompts: int, share: float) -> Tensor:
    return (counts > 0) & (counts.double() / prompts >= share - _SLACK)


def adjusted_share(counts: Tensor, prompts: int, share: float) -> float:
    """The share p that leaves 2 to 5 neurons, or the last one tried; see `NeuronSearch.adjust`.

    Args:
        counts: in how many prompts each neuron is coarse, [neurons].
        prompts: number of prompts.
        share: the first p.
    """
    for _ in range(_MOVES):
        left = int(_refined(counts, prompts, share).sum())
        if FEWEST <= left <= MOST:
            break
        share = min(1.0, max(0.0, share + (_STEP if left > MOST else -_STEP)))
    return share
