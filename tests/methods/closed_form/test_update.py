"""Step 2: the closed form against the d x d systems it replaces, and whole rounds against the published procedures."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks.published import Request, published_memit, published_rome
from lightedit.data.facts import Fact
from lightedit.data.prompts import Contexts, FactPrompts, tokenize_facts
from lightedit.errors import ArgumentError
from lightedit.lm import LanguageModel, Place
from lightedit.lm.changes import LowRankUpdate
from lightedit.methods import MEMIT, ROME, Method
from lightedit.methods.closed_form.behind_norm import before_norm
from lightedit.methods.closed_form.keys import KeyWalk, values_of
from lightedit.methods.closed_form.preservation import (
    Preservation,
    gamma_for_share,
    key_similarity,
    low_rank_update,
)
from lightedit.methods.closed_form.writing import write_facts
from tests.models import ARCHITECTURES, tiny_model, tiny_tokenizer

D_OUT, D_IN, FACT_COUNT = 12, 30, 5

POST_NORM = ["gemma2", "gemma3", "olmo2"]  # a norm follows the MLP, which the published procedure does not know
PRE_NORM = [architecture for architecture in ARCHITECTURES if architecture not in POST_NORM]

TEMPLATES = ("{}", "The river rises in the hills. {}", "I think so. {}")
BY_TYPE = Contexts(TEMPLATES, (0.5, 0.25, 0.25))
PLAIN = Contexts(TEMPLATES, (1 / 3, 1 / 3, 1 / 3))
FACTS = [
    Fact("The capital of {} is", "France", "Rome"),
    Fact("{} is owned by", "The old tower", "Berlin"),
    Fact("It is said that the mother tongue of {} is", "Zoë Müller", "Spanish"),
]
REQUESTS = [Request(fact.prompt, fact.subject, fact.target_new) for fact in FACTS]


def second_moment(width: int = D_IN) -> Tensor:
    keys = torch.randn(width, 3 * width, dtype=torch.float64)
    return keys @ keys.T / (3 * width)


def problem() -> tuple[Tensor, Tensor, Tensor]:
    """A [d_in, d_in], K [d_in, B] and R [d_out, B]."""
    keys = torch.randn(D_IN, FACT_COUNT, dtype=torch.float64)
    return second_moment(), keys, torch.randn(D_OUT, FACT_COUNT, dtype=torch.float64)


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


# The closed form


@pytest.mark.parametrize("gamma", [1.0, 0.1])
def test_the_update_equals_the_system_in_all_dimensions(gamma: float) -> None:
    matrix, keys, residuals = problem()
    update = low_rank_update(Preservation(matrix), keys, residuals, gamma)
    expected = residuals @ keys.T @ torch.linalg.inv(gamma * matrix + keys @ keys.T)
    assert update.rank == FACT_COUNT
    assert relative(update.dense(), expected) < 1e-9
    stored = LowRankUpdate(update.left.float(), update.right.float())
    assert relative(stored.dense(), expected) < 1e-4


def test_at_gamma_one_the_update_minimises_its_objective() -> None:
    matrix, keys, residuals = problem()
    change = low_rank_update(Preservation(matrix), keys, residuals, 1.0).dense().requires_grad_()
    ((change @ keys - residuals).square().sum() + (change @ matrix @ change.T).trace()).backward()
    assert change.grad.abs().max() < 1e-9


def test_at_gamma_zero_every_residual_is_met_at_the_least_norm() -> None:
    """Against the KKT system of: minimise tr(ΔW A ΔWᵀ) subject to ΔW K = R."""
    matrix, keys, residuals = problem()
    change = low_rank_update(Preservation(matrix), keys, residuals, 0.0).dense()
    assert relative(change @ keys, residuals) < 1e-9
    zero = torch.zeros(FACT_COUNT, FACT_COUNT, dtype=torch.float64)
    system = torch.cat([torch.cat([2 * matrix, keys], dim=1), torch.cat([keys.T, zero], dim=1)])
    wanted = torch.cat([torch.zeros(D_IN, D_OUT, dtype=torch.float64), residuals.T])
    assert relative(change, torch.linalg.solve(system, wanted)[:D_IN].T) < 1e-9


def test_one_fact_at_gamma_zero_is_the_rank_one_update_of_rome() -> None:
    matrix, keys, residuals = problem()
    key, residual = keys[:, :1], residuals[:, :1]
    direction = torch.linalg.solve(matrix, key)
    expected = residual @ direction.T / (key.T @ direction)
    assert relative(low_rank_update(Preservation(matrix), key, residual, 0.0).dense(), expected) < 1e-9


def test_keys_and_residuals_in_float32_are_solved_in_float64() -> None:
    matrix, keys, residuals = problem()
    keys, residuals = keys.float(), residuals.float()
    update = low_rank_update(Preservation(matrix.float()), keys, residuals, 1.0)
    expected = low_rank_update(Preservation(matrix.float().double()), keys.double(), residuals.double(), 1.0)
    assert update.left.dtype == update.right.dtype == torch.float64
    assert torch.equal(update.dense(), expected.dense())


@pytest.mark.parametrize("count", [1, D_IN - 1])
def test_a_preservation_term_from_too_few_tokens_is_an_error(count: int) -> None:
    keys = torch.randn(D_IN, count, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"size 30 is not positive definite.*more tokens"):
        Preservation(keys @ keys.T - 1e-9 * torch.eye(D_IN))


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_a_preservation_term_that_is_not_finite_is_an_error(broken: float) -> None:
    matrix = second_moment()
    matrix[3, 2] = matrix[2, 3] = broken
    with pytest.raises(ValueError, match="not positive definite"):
        Preservation(matrix)


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
@pytest.mark.parametrize("seed", range(8))  # rounding may leave a dependent key's pivot negative, zero or positive
def test_dependent_keys_cannot_be_written_exactly(seed: int, scale: float) -> None:
    torch.manual_seed(seed)
    matrix, keys, residuals = problem()
    preservation = Preservation(matrix)
    keys[:, 3] = keys[:, 1]
    assert torch.isfinite(low_rank_update(preservation, keys, residuals, 1.0).right).all()
    keys *= scale
    with pytest.raises(ValueError, match=r"keys of 5 facts are linearly dependent.*separate rounds"):
        low_rank_update(preservation, keys, residuals, 0.0)
    keys[:, 3] = keys[:, 0] - 2 * keys[:, 2]
    with pytest.raises(ValueError, match="linearly dependent"):
        low_rank_update(preservation, keys, residuals, 0.0)


def test_more_facts_than_dimensions_cannot_be_written_exactly() -> None:
    keys, residuals = torch.randn(D_IN, D_IN + 1), torch.randn(D_OUT, D_IN + 1)
    with pytest.raises(ValueError, match="linearly dependent"):
        low_rank_update(Preservation(second_moment()), keys, residuals, 0.0)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_similar_but_independent_keys_are_written_exactly(scale: float) -> None:
    matrix, keys, residuals = problem()
    keys[:, 3] = keys[:, 1] + 1e-3 * keys[:, 3]
    change = low_rank_update(Preservation(matrix), scale * keys, residuals, 0.0).dense()
    assert relative(change @ (scale * keys), residuals) < 1e-6


def test_key_similarity_is_the_cosine_in_the_metric_of_the_inverse() -> None:
    matrix, keys, _ = problem()
    keys[:, 1] = -3 * keys[:, 0]
    similarity = key_similarity(Preservation(matrix), keys)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(matrix), keys, upper=False)
    expected = torch.nn.functional.normalize(white, dim=0)
    torch.testing.assert_close(similarity, expected.T @ expected)
    assert similarity[0, 1] == pytest.approx(-1)


# Whole rounds


def language_model(architecture: str, dtype: torch.dtype = torch.float64) -> LanguageModel:
    return LanguageModel(tiny_model(architecture, dtype=dtype), tiny_tokenizer("bytelevel"))


def prompts_of(lm: LanguageModel, contexts: Contexts, count: int = len(FACTS)) -> list[FactPrompts]:
    return tokenize_facts(lm.tokenizer, FACTS[:count], contexts)


def covariances(lm: LanguageModel, method: Method) -> dict[int, Tensor]:
    return {layer: second_moment(lm.weight(Place(layer)).shape[1]) for layer in method.layers}


def write(
    lm: LanguageModel, method: Method, moments: dict[int, Tensor], contexts: Contexts, targets: Tensor
) -> dict[int, LowRankUpdate]:
    by_place = {Place(layer): moment for layer, moment in moments.items()}
    preservation = {place: method.preservation(by_place, place) for place in by_place}
    prompts = prompts_of(lm, contexts, targets.shape[1])
    written = write_facts(lm, method, preservation, prompts, targets, "round")
    return {place.layer: update for place, update, _ in written}


def present(lm: LanguageModel, layer: int) -> Tensor:
    """The block's output at the subjects of the bare prompts, [d, B]."""
    return KeyWalk(lm, prompts_of(lm, BY_TYPE), Place(layer)).outputs(Place(layer, "block"))


@pytest.mark.parametrize("layers", [(2,), (1, 2, 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("architecture", PRE_NORM)
def test_memit_equals_the_published_procedure(architecture: str, dtype: torch.dtype, layers: tuple[int, ...]) -> None:
    lm = language_model(architecture, dtype)
    method = MEMIT(layers=layers, lambda_=3.0)
    moments = covariances(lm, method)
    targets = 2 * torch.randn(lm.d_model, len(FACTS), dtype=torch.float64)
    expected = published_memit(
        lm.model, lm.tokenizer, REQUESTS, TEMPLATES, list(targets.T), layers, moments, method.lambda_
    )
    bases = {layer: lm.weight(Place(layer)).clone() for layer in range(lm.n_layers)}
    updates = write(lm, method, moments, BY_TYPE, targets)
    assert list(updates) == list(layers)
    tolerance = 1e-6 if dtype == torch.float64 else 1e-4
    for layer, base in bases.items():
        if layer in updates:
            assert relative(updates[layer].dense(), expected[layer]) < tolerance
            assert relative(lm.weight(Place(layer)) - base, expected[layer]) < tolerance
        else:
            assert torch.equal(lm.weight(Place(layer)), base)
    assert lm.weights.owners == ["round"]


def moved(lm: LanguageModel, layer: int, size: float) -> tuple[Tensor, Tensor]:
    """Targets that a search could find: a change of this size, relative to the state, where δ is added.

    Returns:
        The value of each fact, [d, B] or [2 d, B], and the block's output with it, [d, B].
    """
    walk = KeyWalk(lm, prompts_of(lm, Contexts()), Place(layer))
    before, norm = walk.outputs(Place(layer, "block")), lm.mlp_norm(layer)
    states = before if norm is None else walk.outputs(Place(layer))
    values = states + size * states.norm(dim=0) / lm.d_model**0.5 * torch.randn_like(states)
    if norm is None:
        return values, values
    behind, at_first = (norm(rows.T.to(lm.dtype)).T.double() for rows in (values, states))
    return torch.cat([before + behind - at_first, values]), before + behind - at_first


@pytest.mark.parametrize("layers", [(2,), (1, 2, 3)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_memit_moves_the_block_towards_its_targets(architecture: str, layers: tuple[int, ...]) -> None:
    lm = language_model(architecture, torch.float32)
    method = MEMIT(layers=layers, lambda_=1e-5)  # some keys of these models are short
    before = present(lm, layers[-1])
    values, targets = moved(lm, layers[-1], 0.3)
    write(lm, method, covariances(lm, method), Contexts(), values)  # averaged keys would miss the bare prompts' own
    left_over = (present(lm, layers[-1]) - targets).norm(dim=0) / (before - targets).norm(dim=0)
    assert (left_over < 0.9).all()


@pytest.mark.parametrize("architecture", POST_NORM)
def test_a_target_behind_the_norm_after_the_mlp_is_reached(architecture: str) -> None:
    lm, unaware = language_model(architecture, torch.float32), language_model(architecture, torch.float32)
    unaware.mlp_norm = lambda layer: None
    method, before = MEMIT(layers=(2,), lambda_=1e-8), present(lm, 2)
    values, targets = moved(lm, 2, 0.5)
    moments = covariances(lm, method)
    left_over = []
    for model, given in ((lm, values), (unaware, targets)):
        write(model, method, moments, Contexts(), given)
        left_over.append((present(model, 2) - targets).norm(dim=0) / (before - targets).norm(dim=0))
    assert (left_over[0] < 1e-3).all()
    assert (left_over[1] > 0.1).all()


@pytest.mark.parametrize("architecture", POST_NORM)
def test_an_earlier_layer_moves_the_residual_stream_as_far_as_its_norm_allows(architecture: str) -> None:
    lm = language_model(architecture, torch.float32)
    walk = KeyWalk(lm, prompts_of(lm, Contexts()), Place(1))
    mlp, norm = walk.outputs(Place(1)), lm.mlp_norm(1).double()
    gain = norm(torch.ones(1, lm.d_model, dtype=torch.float64))[0].abs()
    assert gain.min() < 1e-3 * gain.median(), "the test needs gains that cannot be inverted"
    other = mlp.norm() * torch.nn.functional.normalize(torch.randn_like(mlp), dim=0)
    asked = (norm(other.T) - norm(mlp.T)).T
    assert relative((norm((mlp + before_norm(walk, asked)).T) - norm(mlp.T)).T, asked) < 1e-2  # it can be reached
    asked = gain.mean() * torch.randn_like(mlp)  # and this cannot, not even where gains are 0
    change = before_norm(walk, asked)

    def left_over(change: torch.Tensor) -> torch.Tensor:
        return ((norm((mlp + change).T) - norm(mlp.T)).T - asked).norm(dim=0)

    assert (change.norm(dim=0) < 2.1 * mlp.norm(dim=0)).all()  # both ends lie on one sphere
    assert (left_over(change) < left_over(torch.zeros_like(change))).all()
    for _ in range(50):  # no point nearby is clearly better
        nearby = change + 0.05 * mlp.norm(dim=0) * torch.nn.functional.normalize(torch.randn_like(mlp), dim=0)
        assert (left_over(change) < 1.01 * left_over(nearby)).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rome_equals_the_published_procedure_and_its_key_gives_the_value(architecture: str) -> None:
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 1e-4)):
        lm = language_model(architecture, dtype)
        method = ROME(layers=(1,))
        moments = covariances(lm, method)
        value = torch.randn(lm.d_model, 1, dtype=torch.float64)
        expected = published_rome(lm.model, lm.tokenizer, REQUESTS[0], TEMPLATES, value[:, 0], 1, moments[1])
        key = KeyWalk(lm, prompts_of(lm, PLAIN, 1), Place(1)).keys()
        updates = write(lm, method, moments, PLAIN, value)
        assert relative(updates[1].dense(), expected) < tolerance
        assert relative(values_of(lm, Place(1), key), value) < (1e-9 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.99])
def test_gamma_is_that_at_which_the_share_is_written(share: float) -> None:
    keys = torch.randn(3, 8, 20, dtype=torch.float64)
    gram = keys @ keys.mT
    gamma = gamma_for_share(torch.linalg.eigvalsh(gram), share)
    system = gram + gamma[:, None, None] * torch.eye(8)
    written = (gram @ torch.linalg.inv(system)).diagonal(dim1=1, dim2=2).mean(1)
    torch.testing.assert_close(written, torch.full((3,), share, dtype=torch.float64), rtol=1e-9, atol=0)
    one = gamma_for_share(gram[:, 0, :1], share)
    torch.testing.assert_close(one, gram[:, 0, 0] * (1 - share) / share)  # the leverage q: q / (γ + q) is the share
    twins = gamma_for_share(
        torch.tensor([0.0, 2.0], dtype=torch.float64), share
    )  # they count as one key of twice the leverage
    torch.testing.assert_close(twins, torch.tensor(2 * (1 - share) / share, dtype=torch.float64))


def test_a_share_writes_what_the_lambda_does_that_it_stands_for() -> None:
    lm = language_model("llama", torch.float64)
    targets = torch.randn(lm.d_model, len(FACTS), dtype=torch.float64)
    by_share = MEMIT(layers=(1,), share=0.7)
    moments = covariances(lm, by_share)
    updates = [update.dense() for update in write(lm, by_share, moments, BY_TYPE, targets).values()]
    lm.weights.remove(lm.weights.owners)
    keys = KeyWalk(lm, prompts_of(lm, BY_TYPE), Place(1)).keys()
    lambda_ = float(gamma_for_share(torch.linalg.eigvalsh(keys.T @ torch.linalg.solve(moments[1].double(), keys)), 0.7))
    same = write(lm, replace(by_share, share=None, lambda_=lambda_), moments, BY_TYPE, targets)
    assert relative(updates[0], same[1].dense()) < 1e-9


@pytest.mark.parametrize("share", [0.0, 1.0, float("nan")])
def test_a_share_is_between_0_and_1(share: float) -> None:
    with pytest.raises(ArgumentError, match="share is above 0 and below 1"):
        MEMIT(layers=(1,), share=share)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_updates_are_kept_in_float32_or_better(dtype: torch.dtype) -> None:
    lm = language_model("llama", dtype)
    method = MEMIT(layers=(1, 2), lambda_=3.0)
    targets = torch.randn(lm.d_model, len(FACTS), dtype=torch.float64)
    for update in write(lm, method, covariances(lm, method), BY_TYPE, targets).values():
        assert update.left.dtype == update.right.dtype == torch.float32


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_an_update_that_is_not_finite_is_not_written(broken: float) -> None:
    lm = language_model("llama", torch.float32)
    method = MEMIT(layers=(1, 2))
    base = lm.weight(Place(1)).clone()
    targets = torch.randn(lm.d_model, len(FACTS), dtype=torch.float64)
    targets[3, 1] = broken
    with pytest.raises(FloatingPointError, match="update of layer 1 holds NaN or infinity"):
        write(lm, method, covariances(lm, method), BY_TYPE, targets)
    assert torch.equal(lm.weight(Place(1)), base)
    assert lm.weights.owners == []


@pytest.mark.parametrize("method", [MEMIT(layers=(1, 2)), ROME(layers=(1,))])
def test_keys_that_are_not_finite_are_named_as_such(method: Method) -> None:
    lm = language_model("llama", torch.float32)
    moments = covariances(lm, method)
    lm.blocks[0].mlp.gate_proj.weight.data[3, 5] = torch.nan
    with pytest.raises(FloatingPointError, match="update of layer 1 holds NaN or infinity"):
        write(lm, method, moments, BY_TYPE, torch.randn(lm.d_model, 1, dtype=torch.float64))
    assert lm.weights.owners == []


def test_the_residual_still_standing_is_spread_over_the_layers_that_are_left() -> None:
    method = MEMIT(layers=(3, 4, 6))
    assert [method.spread(layer) for layer in method.layers] == [1 / 3, 1 / 2, 1]
    assert method.value_layer == 6


@pytest.mark.parametrize("share", [None, 0.6])
@pytest.mark.parametrize("basis", [False, True])
@pytest.mark.parametrize("past", [False, True])
def test_more_keys_than_inputs_give_the_update_of_the_smaller_system(
    share: float | None, basis: bool, past: bool
) -> None:
    torch.manual_seed(0)
    keys = torch.randn(12, 40, dtype=torch.float64) * torch.logspace(0, -1, 12, dtype=torch.float64)[:, None]
    residuals = torch.randn(7, 40, dtype=torch.float64)
    root = torch.randn(12, 12, dtype=torch.float64)
    term = root @ root.T
    terms = Preservation(term)
    inverse = torch.linalg.inv(term)
    if basis:
        columns = torch.linalg.qr(root).Q[:, :9]
        terms = Preservation(torch.full((9,), 2.0, dtype=torch.float64), columns)
        inverse = columns @ columns.T / 2
    if past:
        before = 0.3 * torch.randn(12, 2, dtype=torch.float64)
        terms.remember(before)
        inverse = inverse - inverse @ before @ torch.linalg.inv(torch.eye(2) + before.T @ inverse @ before) @ (
            before.T @ inverse
        )
    gram = keys.T @ inverse @ keys
    gamma = 0.7
    if share is not None:
        kept = torch.linalg.eigvalsh(gram)[-(9 if basis else 12) :]
        gamma = float(gamma_for_share(kept, share))
    right = inverse @ keys @ torch.linalg.inv(gamma * torch.eye(40, dtype=torch.float64) + gram)
    update = low_rank_update(terms, keys, residuals, 0.7, share)
    torch.testing.assert_close(update.right, right, rtol=1e-7, atol=1e-9)
