"""Plain computations, one text at a time, that results are compared with."""

import math

import torch

import lightedit as le

WINDOWS = [[5, 9, 200, 17, 33, 8], [70, 71, 72], [300, 4]]


def distributions(lm: le.LanguageModel, window: list[int]) -> torch.Tensor:
    """Log-probabilities of the next token at each position of one window, by the stock model, [tokens, vocabulary]."""
    with torch.no_grad():
        return lm.model(torch.tensor([window])).logits[0].double().log_softmax(-1)


def perplexity(lm: le.LanguageModel, windows: list[list[int]]) -> float:
    losses = [
        -float(distributions(lm, window)[position, window[position + 1]])
        for window in windows
        for position in range(len(window) - 1)
    ]
    return math.exp(sum(losses) / len(losses))


def plain_terms(text):
    """Runs of two letters, digits or underscores or more, character by character, in lower case."""
    spaced = "".join(char if char.isalnum() or char == "_" else " " for char in text.lower())
    return [word for word in spaced.split() if len(word) > 1]


def plain_frequencies(documents):
    bags = [set(plain_terms(document)) for document in documents]
    return {term: math.log((1 + len(bags)) / (1 + sum(term in bag for bag in bags))) + 1 for term in set().union(*bags)}


def plain_reference_score(text, reference, frequencies):
    """Cosine of dense vectors over the whole vocabulary."""
    terms = sorted(frequencies)
    left, right = ([plain_terms(one).count(term) * frequencies[term] for term in terms] for one in (text, reference))
    lengths = [math.sqrt(sum(value * value for value in vector)) for vector in (left, right)]
    return sum(a * b for a, b in zip(left, right, strict=True)) / (lengths[0] * lengths[1])
