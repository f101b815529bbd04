"""Step 2: for each matrix in turn, read keys and residuals, solve for the update, and write it."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lightedit.data.facts import FactError
from lightedit.data.prompts import FactPrompts
from lightedit.errors import ArgumentError, NumericalError
from lightedit.lm import LanguageModel, Place
from lightedit.lm.changes import Change, LowRankUpdate
from lightedit.lm.rowwise import RowwiseEdits
from lightedit.lm.weights import Owner
from lightedit.methods.closed_form.keys import KeyWalk, keys_at
from lightedit.methods.closed_form.method import ClosedForm
from lightedit.methods.closed_form.preservation import Preservation, low_rank_update


@torch.no_grad()
def write_facts(
    lm: LanguageModel,
    method: ClosedForm,
    preservation: Mapping[Place, Preservation],
    prompts: Sequence[FactPrompts],
    targets: Tensor,
    owner: Owner,
) -> Iterator[tuple[Place, Change, Tensor]]:
    """Step 2 for the facts of one round: solve for and write one matrix after another.

    Keys and residuals of a matrix are read after all earlier matrices were written. If a layer's attention is edited
    too, it is written before its MLP is read, as in the published code of PMET.

    Args:
        lm: the model; its weights are written on behalf of `owner`.
        method: the method.
        preservation: A of each edited matrix, factored.
        prompts: B facts.
        targets: v at the method's site in its value layer, [d, B] float64; [2 d, B] for two sites.
        owner: name of the round's updates in the model's weights.

    Yields:
        (place, change, keys of `written_keys`) right after the change was written.

    Raises:
        NumericalError: an update holds NaN or infinity; it is not written.
    """
    walk = KeyWalk(lm, prompts, method.places[0])
    for matrix in method.places:
        walk.advance(matrix)
        keys, members = written_keys(method, walk)
        residuals = method.residuals(walk, keys, targets)
        # dense where the round has so many facts that factors would be larger
        change = _as_written(_solve(method, preservation[matrix], keys, members, residuals, walk), walk).compact()
        lm.weights.add(owner, matrix, change)
        yield matrix, change, keys


@torch.no_grad()
def separate_updates(
    lm: LanguageModel,
    method: ClosedForm,
    preservation: Mapping[Place, Preservation],
    prompts: Sequence[FactPrompts],
    targets: Tensor,
) -> RowwiseEdits:
    """Step 2 for facts that are each edited alone, starting from the present weights, which stay unchanged.

    One factor of A serves all solves. At later matrices, each fact's rows run with the fact's own earlier updates.

    Args:
        lm: the model.
        method: the method.
        preservation: A of each edited matrix, factored.
        prompts: B facts.
        targets: as for `write_facts`.

    Returns:
        B edits, one a fact.

    Raises:
        NumericalError: an update holds NaN or infinity.
    """
    walk = KeyWalk(lm, prompts, method.places[0])
    for matrix in method.places:
        walk.advance(matrix)
        keys, members = written_keys(method, walk)
        residuals = method.residuals(walk, keys, targets)
        keys = keys.T.unflatten(0, (walk.count, -1)).mT  # [B, d_in, rows of a fact]
        if members is not None:
            members = members.sum(0).unflatten(0, (walk.count, 1, -1))
        update = _as_written(_solve(method, preservation[matrix], keys, members, residuals.T.unsqueeze(-1), walk), walk)
        walk.edits = RowwiseEdits({**walk.edits.updates, matrix: update}, walk.edits.of_row)
    return walk.edits


def written_keys(method: ClosedForm, walk: KeyWalk) -> tuple[Tensor, Tensor | None]:
    """The keys at which the walk's matrix is written, [d_in, n] float64, and how they belong to the facts, [B, n].

    One key a fact, and None; or with `separate` contexts, those of `KeyWalk.separate_keys`.
    """
    return walk.separate_keys() if method.contexts.separate else (method.keys(walk), None)


def _solve(
    method: ClosedForm,
    preservation: Preservation,
    keys: Tensor,
    members: Tensor | None,
    residuals: Tensor,
    walk: KeyWalk,
) -> LowRankUpdate:
    """The update of the walk's matrix, float64.

    With M the members, it minimises ||ΔW K - R M||²: each row's error counts with its weight. The update of n columns,
    R M rightᵀ, has the factors R and right Mᵀ.

    Args:
        method: the method.
        preservation: A, factored.
        keys: K, [..., d_in, n].
        members: M, [..., B, n]; None for one key a fact.
        residuals: R, [..., d_out, B].
        walk: a walk at the matrix.
    """
    _check_finite(walk.place, keys, residuals)
    if members is None:
        update = method.update(preservation, keys, residuals, walk)
    else:
        right = method.update(preservation, keys, residuals @ members, walk).right
        update = LowRankUpdate(residuals.to(right), right @ members.mT)
    _check_finite(walk.place, update.left, update.right)
    return update


def _as_written(update: LowRankUpdate, walk: KeyWalk) -> LowRankUpdate:
    """The update in the dtype in which the model sums updates: its own, or float32 if wider."""
    return update.to(walk.lm.weight(walk.place).device, torch.promote_types(walk.lm.dtype, torch.float32))


def check_independence(
    lm: LanguageModel,
    method: ClosedForm,
    preservation: Mapping[Place, Preservation],
    rounds: Sequence[Sequence[FactPrompts]],
) -> None:
    """Refuse rounds that no update can write exactly, if the method writes exactly (γ = 0).

    Raises:
        FactError: the keys of a round's facts depend on one another.
    """
    first = method.places[0]
    for number, prompts in enumerate(rounds):
        if len(prompts) < 2 or method.gamma(len(prompts)) > 0:
            continue
        keys = (
            KeyWalk(lm, prompts, first).separate_keys()[0] if method.contexts.separate else keys_at(lm, prompts, first)
        )
        try:
            low_rank_update(preservation[first], keys, keys[:1], 0.0)
        except ArgumentError as error:
            raise FactError(
                f"round {number + 1} of {len(rounds)}: {error}, fewer at a time (facts_per_round), or give "
                "up exactness (EMMET: mu above 0)"
            ) from error


@torch.no_grad()
def read_keys(lm: LanguageModel, method: ClosedForm, prompts: Sequence[FactPrompts]) -> dict[Place, Tensor]:
    """The keys of every edited matrix under the present weights, as `written_keys` gives them."""
    walk = KeyWalk(lm, prompts, method.places[0])
    keys = {}
    for matrix in method.places:
        walk.advance(matrix)
        keys[matrix] = written_keys(method, walk)[0]
    return keys


@torch.no_grad()
def shares_written(
    lm: LanguageModel, method: ClosedForm, preservation: Mapping[Place, Preservation], prompts: Sequence[FactPrompts]
) -> Tensor:
    """What the MLPs' solves of one round write, [B, B] float64: asked for δ [d, B], they deliver δ times this.

    With K the keys of the bare prompts, at which residuals are read, layer l writes R H_l, H_l = rightᵀ K. R is its
    spread s_l of what is left, so that all layers deliver I - (I - s_1 H_1)(I - s_2 H_2)... The keys are those of the
    present weights; what earlier layers change in later keys is left out.

    Args:
        lm: the model.
        method: the method.
        preservation: A of each edited matrix, factored.
        prompts: B facts, all of the round.
    """
    walk = KeyWalk(lm, prompts, method.places[0])
    left = one = torch.eye(len(prompts), dtype=torch.float64)
    for place in method.places:
        walk.advance(place)
        if place.name == method.value_place.name:
            keys, members = written_keys(method, walk)
            right = _solve(method, preservation[place], keys, members, one.to(keys.device), walk).right
            left = left @ (one - method.spread(place.layer) * (right.T @ walk.keys(bare=True)).cpu())
    return one - left


def _check_finite(matrix: Place, *tensors: Tensor) -> None:
    if not all(torch.isfinite(tensor).all() for tensor in tensors):
        raise NumericalError(f"the update of {matrix} holds NaN or infinity; load the model in float32")
