"""Integrated gradients: how much of a token's probability each neuron of each layer accounts for.

Neuron (l, j) is entry j of the key a of layer l: the input of the MLP's second matrix, at the last token of a prompt. A
key is scaled at this token only, so all earlier tokens are run once, as a prefix cache. What is left to run for a layer
and a point α is one token, from the layer's block on. All points of all prompts, and of several layers, form one pass.

Where a norm stands between the MLP and the residual stream, as in Gemma 2, it undoes any scaling of the key. There the
norm's output is scaled, and neurons are given their shares of it with the norm's denominator as it is at α = 1.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from lightedit.errors import NumericalError, UnsupportedModelError
from lightedit.lm import LanguageModel, Place
from lightedit.lm.batch import PASS_COST, Batch
from lightedit.lm.cache import PrefixCache
from lightedit.lm.hooks import At, Port, capture, replace_at
from lightedit.lm.packed import Span
from lightedit.lm.place import Name
from lightedit.lm.prefix import prefix_cache
from lightedit.ops import target_nll_kl


@dataclass(frozen=True)
class Query:
    """A text as token ids, of which there is at least one, and the token whose probability after it is attributed."""

    ids: tuple[int, ...]
    target: int


@dataclass(frozen=True)
class Attributions:
    """The attributions of n queries.

    Attributes:
        scores: for each layer, the attribution of each neuron, [n, d_in], float32 or wider, on the CPU.
        p: the probability of each query's token, [n].
        activations: for each layer, the neurons themselves, [n, d_in], on the CPU.
    """

    scores: tuple[Tensor, ...]
    p: Tensor
    activations: tuple[Tensor, ...]


def midpoints(points: int) -> Tensor:
    """The midpoints of `points` equal parts of [0, 1], at which a sum is the integral with an error of order 1 / m².

    >>> midpoints(2).tolist()
    [0.25, 0.75]
    """
    return (torch.arange(points, dtype=torch.float64) + 0.5) / points


def both_ends(points: int) -> Tensor:
    """`points` equally spaced points from 0 to 1, as the published code has them."""
    return torch.linspace(0, 1, points, dtype=torch.float64)


def attribute(
    lm: LanguageModel,
    queries: Sequence[Query],
    layers: Sequence[int],
    points: Tensor,
    *,
    before_activation: bool = False,
    max_tokens: int = 1024,
) -> Attributions:
    """Attribute the probability of each query's token to the neurons of each layer (Dai et al., 2022, section 3.1).

    With p(α) the probability after the layer's whole key a was scaled by α, the attribution of neuron j is
    a_j / m Σ_k ∂p / ∂a_j at α_k a. With enough points the attributions of a layer sum to p(1) - p(0). Behind a
    norm, see the module's docstring.

    Args:
        lm: the language model, with its present weights.
        queries: n queries.
        layers: the layers, ascending.
        points: α_1 ... α_m, [m].
        before_activation: take what enters the MLP's activation for its neurons, as the published code for GPT-2 does:
            the output of the first matrix, or of the gate's where there is one.
        max_tokens: tokens of one forward and backward pass at most, unless m is larger.

    Raises:
        UnsupportedModelError: the model has no such matrices, or one of them carries an adaptor.
        NumericalError: an attribution is not finite.
    """
    name = _scaled_name(lm, layers, before_activation)
    longest = max(len(query.ids) for query in queries)
    room = max_tokens if lm.architecture.supports_packing else max_tokens // longest  # else each row has its own prefix
    together = max(1, room // len(points))
    order = sorted(range(len(queries)), key=lambda index: len(queries[index].ids))
    scores: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    states: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    p = []
    for start in range(0, len(order), together):
        members = [queries[index] for index in order[start : start + together]]
        clean = _run_clean(lm, members, layers, name)
        p.append(clean.p)
        for layer in layers:
            states[layer].append((clean.keys or clean.outputs)[Place(layer, name)].cpu())
        for group in _layer_groups(layers, lm.n_layers, len(members) * len(points), room):
            for layer, gradient in _gradients(lm, clean, group, points, name).items():
                scores[layer].append(_scores(lm, clean, layer, gradient / len(points), name))
    back = torch.tensor(order).argsort()
    whole, activations = (tuple(torch.cat(of[layer])[back] for layer in layers) for of in (scores, states))
    found = Attributions(whole, torch.cat(p)[back], activations)
    if not all(part.isfinite().all() for part in (found.p, *found.scores)):
        raise NumericalError("an attribution is NaN or infinite; load the model in float32")
    return found


def _scaled_name(lm: LanguageModel, layers: Sequence[int], before_activation: bool) -> Name:
    """The name of the places whose outputs are scaled. Scaling the MLP's key scales its output, but for the bias."""
    if before_activation:
        name = next((name for name in ("mlp_gate", "mlp_in") if name in lm.architecture.names), None)
        if name is None:
            raise UnsupportedModelError(f"{lm.name} has no matrix before the MLP's activation; leave published out")
        return name
    for place in map(Place, layers):
        if lm.weights.adaptors(place):
            raise UnsupportedModelError(
                f"{place} carries an adaptor, to which nothing can be attributed; revert the edit that added it"
            )
    return "mlp"


@dataclass(frozen=True)
class _Clean:
    """What one run of n queries leaves: their prefixes, and the states of their last tokens.

    Attributes:
        queries: the queries.
        prefix: keys and values of the tokens before the last ones; None if there are none.
        mask: the real ones of these tokens, [n, prefix].
        blocks: the outputs of blocks, [n, d].
        scaled: for each layer, what is scaled, [n, width].
        outputs: the outputs of the places whose neurons they are, [n, width].
        keys: the inputs of the MLPs' second matrices, [n, d_in]; empty if other places are scaled.
        p: the probability of each query's token, [n].
    """

    queries: Sequence[Query]
    prefix: PrefixCache | None
    mask: Tensor
    blocks: Mapping[Place, Tensor]
    scaled: Mapping[int, Tensor]
    outputs: Mapping[Place, Tensor]
    keys: Mapping[Place, Tensor]
    p: Tensor


@torch.no_grad()
def _run_clean(lm: LanguageModel, queries: Sequence[Query], layers: Sequence[int], name: Name) -> _Clean:
    n = len(queries)
    prefix, mask = prefix_cache(lm, [query.ids[:-1] for query in queries])
    mask = mask.bool()  # that of empty prefixes is not
    at = (torch.arange(n), torch.zeros(n, dtype=torch.long))
    places = [Place(layer, name) for layer in layers]
    norms = {layer: _port(lm, Place(layer, name)).exit for layer in layers if _normed(lm, layer, name)}
    with (
        lm.capture([Place(layer - 1, "block") for layer in layers if layer], n, at) as blocks,
        lm.capture(places, n, at) as outputs,
        capture(norms, n, at) as normed,
        lm.capture(places if name == "mlp" else [], n, at, inputs=True) as keys,
        lm.before_head(n, at) as read,
    ):
        lm.forward(_last_tokens(queries, mask), prefix)
    nll = _nll(lm, read[0], torch.tensor([query.target for query in queries]))
    scaled = {place.layer: state for place, state in outputs.items()} | normed
    return _Clean(queries, prefix, mask, blocks, scaled, outputs, keys, nll.neg().exp().cpu())


def _normed(lm: LanguageModel, layer: int, name: Name) -> bool:
    """Whether the place is the MLP's second matrix, and a norm follows it."""
    return name == "mlp" and lm.mlp_norm(layer) is not None


def _port(lm: LanguageModel, place: Place) -> Port:
    """The modules whose output is scaled: those of the place, or the norm behind the MLP."""
    norm = lm.mlp_norm(place.layer) if place.name == "mlp" else None
    return lm.anatomy.port(place) if norm is None else Port(norm, norm, lm.blocks[place.layer])


def _last_tokens(queries: Sequence[Query], mask: Tensor) -> Batch:
    """The last token of each query, behind its prefix."""
    ids = torch.tensor([[query.ids[-1]] for query in queries], device=mask.device)
    positions = torch.tensor([[len(query.ids) - 1] for query in queries], device=mask.device)
    return Batch(ids, torch.cat([mask, torch.ones_like(ids, dtype=torch.bool)], dim=1), positions)


def _nll(lm: LanguageModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """-log p of the targets [n] from the head's inputs [n, d]; differentiable."""
    head = lm.head
    none = head.weight.new_empty(0, len(head.weight), dtype=torch.promote_types(head.weight.dtype, torch.float32))
    return target_nll_kl(hidden, head, targets.to(head.weight.device), none)[0]


def _layer_groups(layers: Sequence[int], n_layers: int, rows: int, room: int) -> Iterator[Sequence[int]]:
    """Divide the layers into passes.

    A pass runs from the block of its first layer on, also for rows of its later layers, which costs rows; but fewer
    passes read the weights fewer times. The size with the least cost is taken, a pass costing as much as `PASS_COST`
    rows.

    Args:
        layers: the layers, ascending.
        n_layers: number of layers of the model.
        rows: rows of one layer.
        room: rows of a pass at most, unless one layer has more.
    """

    def groups(size: int) -> list[Sequence[int]]:
        return [layers[start : start + size] for start in range(0, len(layers), size)]

    def cost(size: int) -> int:
        return sum((n_layers - group[0]) * (len(group) * rows + PASS_COST) for group in groups(size))

    yield from groups(min(range(1, max(1, min(len(layers), room // rows)) + 1), key=cost))


def _gradients(
    lm: LanguageModel, clean: _Clean, layers: Sequence[int], points: Tensor, name: Name
) -> dict[int, Tensor]:
    """For each layer, Σ_k ∂p / ∂u at α_k, u what is scaled, [n, width].

    Rows are ordered by query, layer and point. p varies by orders of magnitude, so that log p is differentiated, which
    does not underflow in half precision.
    """
    n, m = len(clean.queries), len(points)
    index = torch.arange(n * len(layers) * m).view(n, len(layers), m)
    packed = lm.architecture.supports_packing

    def at(rows: Tensor) -> At:
        return (torch.zeros_like(rows), rows) if packed else (rows, torch.zeros_like(rows))

    states: dict[int, Tensor] = {}
    with torch.enable_grad():
        with ExitStack() as stack:
            for number, layer in enumerate(layers):
                place = Place(layer, name)
                states[layer] = _along(lm, clean.scaled[layer], place, points).requires_grad_()
                tokens = at(index[:, number].flatten())
                stack.enter_context(replace_at(_port(lm, place), states[layer].flatten(0, 1), tokens))
            read = stack.enter_context(lm.before_head(1 if packed else index.numel(), at(index.flatten())))
            _forward(lm, clean, layers[0], len(layers) * m)
        targets = torch.tensor([query.target for query in clean.queries]).repeat_interleave(len(layers) * m)
        nll = _nll(lm, read[0], targets)
        found = torch.autograd.grad(-nll.sum(), list(states.values()))
    p = nll.detach().neg().exp().view(n, len(layers), m)
    return {
        layer: (gradient.to(p.dtype) * p[:, number, :, None].to(gradient.device)).sum(1)
        for number, (layer, gradient) in enumerate(zip(layers, found, strict=True))
    }


def _along(lm: LanguageModel, state: Tensor, place: Place, points: Tensor) -> Tensor:
    """What is scaled [n, width], scaled by each point, [n, m, width].

    With u = W a + b, scaling the key a gives b + α (u - b).
    """
    bias = lm.bias(place) if place.name == "mlp" and not _normed(lm, place.layer, place.name) else None
    alpha = points.to(state.device, state.dtype)[:, None]
    fixed = torch.zeros_like(state[0]) if bias is None else bias.to(state.device, state.dtype)
    return fixed + alpha * (state - fixed)[:, None]


@torch.no_grad()
def _scores(lm: LanguageModel, clean: _Clean, layer: int, gradient: Tensor, name: Name) -> Tensor:
    """The attributions of one layer, [n, d_in], on the CPU, from the mean of ∂p / ∂u over points, [n, width]."""
    place = Place(layer, name)
    scaled, output = (state.to(gradient) for state in (clean.scaled[layer], clean.outputs[place]))
    if name != "mlp":
        return (scaled * gradient).cpu()
    if _normed(lm, layer, name):  # the norm's output is its input times a factor
        gradient = torch.where(output == 0, 0.0, gradient * scaled / output)
    weight = lm.weight(place)  # ∂p / ∂a = Wᵀ ∂p / ∂u
    return (clean.keys[place].to(gradient) * (gradient.to(weight.device) @ weight.to(gradient.dtype))).cpu()


def _forward(lm: LanguageModel, clean: _Clean, first: int, copies: int) -> None:
    """Run `copies` rows of each query's last token, from block `first` on."""
    n = len(clean.queries)
    last = _last_tokens(clean.queries, clean.mask)
    prefix = None if clean.prefix is None else clean.prefix.without(range(first))
    hidden = clean.blocks[Place(first - 1, "block")].repeat_interleave(copies, dim=0) if first else None
    dtype = lm.dtype if hidden is None else hidden.dtype
    copied = torch.arange(n, device=clean.mask.device).repeat_interleave(copies)
    with ExitStack() as stack:
        if lm.architecture.supports_packing:
            if hidden is not None:
                stack.enter_context(lm.starting_at(first, hidden[None]))
            span = Span.of_alternatives(clean.mask, copies, prefix, dtype)
            lm.forward_packed(last.ids[copied, 0], last.positions[copied, 0], [span])
        else:
            if hidden is not None:
                stack.enter_context(lm.starting_at(first, hidden[:, None]))
            rows = Batch(last.ids[copied], last.mask[copied], last.positions[copied])
            lm.forward(rows, None if prefix is None else prefix.rows(copied))
