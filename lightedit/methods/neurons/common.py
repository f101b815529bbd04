"""Neurons that many facts of one relation have, which say more of the relation than of any one fact."""

from collections import Counter
from collections.abc import Sequence

from torch import Tensor

Neuron = tuple[int, int]
"""Layer and index."""


def common_neurons(
    neurons: Sequence[set[Neuron]], relations: Sequence[str | None], largest: float
) -> list[set[Neuron]]:
    """Which neurons of each fact more than a share of the other facts of its relation have, too.

    Args:
        neurons: the neurons of n facts.
        relations: the relation of each; a fact without one has no others.
        largest: the largest share that is not too large, of the other facts of the relation.

    Returns:
        A subset of each fact's neurons.
    """
    sizes = Counter(relations)
    counts = Counter((relation, neuron) for relation, own in zip(relations, neurons, strict=True) for neuron in own)
    return [
        {neuron for neuron in own if counts[relation, neuron] - 1 > largest * (sizes[relation] - 1)}
        if relation is not None
        else set()
        for relation, own in zip(relations, neurons, strict=True)
    ]


def without_common(neurons: Sequence[Tensor], relations: Sequence[str | None], largest: float) -> list[Tensor]:
    """The neurons of each fact, [n, 2 or more], without those rows whose layer and index `common_neurons` names."""
    named = [[(int(layer), int(index)) for layer, index in own[:, :2].tolist()] for own in neurons]
    common = common_neurons([set(own) for own in named], relations, largest)
    return [
        own[[position for position, neuron in enumerate(each) if neuron not in dropped]]
        for own, each, dropped in zip(neurons, named, common, strict=True)
    ]
