"""Edited weights: undone exactly, in any order, and without drift."""

import itertools

import pytest
import torch

from lightedit.lm import LanguageModel, Place
from lightedit.lm.changes import LowRankUpdate
from tests.models import tiny_model, tiny_tokenizer

D_OUT, D_IN = 32, 80
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def language_model(architecture: str = "llama", dtype: torch.dtype = torch.float32) -> LanguageModel:
    return LanguageModel(tiny_model(architecture, dtype=dtype), tiny_tokenizer("bytelevel"))


def random_update(rank: int = 2, scale: float = 0.1) -> LowRankUpdate:
    return LowRankUpdate(scale * torch.randn(D_OUT, rank), torch.randn(D_IN, rank))


# One update


def test_the_norm_equals_that_of_the_dense_matrix() -> None:
    update = random_update(rank=5)
    assert update.dense().shape == (D_OUT, D_IN)
    assert update.norm() == pytest.approx(float(update.dense().double().norm()), rel=1e-6)
    assert update.rank == 5


@pytest.mark.parametrize(
    ("left", "right"),
    [((D_OUT, 2), (D_IN, 3)), ((D_OUT, 1), (D_IN, 2)), ((D_OUT,), (D_IN,)), ((D_OUT, 2), (D_IN,))],
)
def test_factors_of_different_rank_are_refused(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"left \[d_out, B\] and right \[d_in, B\]"):
        LowRankUpdate(torch.zeros(left), torch.zeros(right))


# Several updates of one model


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])  # a Conv1D, which is stored transposed, and a Linear
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_update_is_added_and_rounded_once(architecture: str, dtype: torch.dtype) -> None:
    lm = language_model(architecture, dtype)
    base, update = lm.weight(Place(1)).clone(), random_update()
    lm.weights.add("a", Place(1), update)
    exact = base.double() + update.left.double() @ update.right.double().T
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, torch.finfo(dtype).eps / 2 * 1.001)
    torch.testing.assert_close(lm.weight(Place(1)).double(), exact, atol=1e-6, rtol=tolerance)
    assert lm.weight(Place(1)).dtype == dtype
    assert torch.equal(lm.weights.base(Place(1)), base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_removing_in_any_order_gives_the_base_back_bit_for_bit(dtype: torch.dtype) -> None:
    lm = language_model(dtype=dtype)
    base = {layer: lm.weight(Place(layer)).clone() for layer in (1, 2)}
    for order in itertools.permutations("abc"):
        for owner in "abc":
            lm.weights.add(owner, Place(1), random_update())
            lm.weights.add(owner, Place(2), random_update())
        assert lm.weights.owners == ["a", "b", "c"]
        for owner in order:
            assert not any(torch.equal(lm.weight(Place(layer)), base[layer]) for layer in base)
            lm.weights.remove([owner])
        assert lm.weights.owners == []
        assert all(torch.equal(lm.weight(Place(layer)), base[layer]) for layer in base)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_removing_an_edit_equals_never_having_written_it_bit_for_bit(architecture: str, dtype: torch.dtype) -> None:
    updates = {owner: random_update() for owner in "abcd"}
    for removed in ("a", "b", "d", "bc"):
        lm, never = language_model(architecture, dtype), language_model(architecture, dtype)
        for owner, update in updates.items():
            lm.weights.add(owner, Place(1), update)
            if owner not in removed:
                never.weights.add(owner, Place(1), update)
        assert not torch.equal(lm.weight(Place(1)), never.weight(Place(1)))
        lm.weights.remove(list(removed))
        assert torch.equal(lm.weight(Place(1)), never.weight(Place(1)))
        assert lm.weights.owners == never.weights.owners
        later = random_update()  # and what is written next is the same too
        for model in (lm, never):
            model.weights.add("e", Place(1), later)
        assert torch.equal(lm.weight(Place(1)), never.weight(Place(1)))


def test_removing_an_edit_leaves_other_layers_alone() -> None:
    lm = language_model()
    lm.weights.add("a", Place(1), random_update())
    lm.weights.add("b", Place(2), random_update())
    kept = lm.weight(Place(2)).clone()
    lm.weights.remove(["a", "unknown"])
    assert torch.equal(lm.weight(Place(2)), kept)
    assert lm.weights.owners == ["b"]


def test_one_edit_may_write_a_layer_more_than_once() -> None:
    lm = language_model()
    base = lm.weight(Place(1)).clone()
    first, second = random_update(), random_update()
    lm.weights.add("a", Place(1), first)
    lm.weights.add("a", Place(1), second)
    torch.testing.assert_close(lm.weight(Place(1)), base + first.dense() + second.dense(), atol=1e-5, rtol=1e-5)
    lm.weights.remove(["a"])
    assert torch.equal(lm.weight(Place(1)), base)


def test_a_bfloat16_model_does_not_drift_over_many_small_updates() -> None:
    """Each update is far below half a unit in the last place of most weights: added one by one, most would vanish."""
    lm = language_model(dtype=torch.bfloat16)
    base = lm.weight(Place(1)).clone()
    exact, one_by_one = base.double(), base.clone()
    for index in range(100):
        update = LowRankUpdate(torch.full((D_OUT, 1), 1e-2), torch.rand(D_IN, 1) * 1e-2)
        lm.weights.add(str(index), Place(1), update)
        exact += update.left.double() @ update.right.double().T
        one_by_one += update.dense().bfloat16()
    ulp = torch.finfo(torch.bfloat16).eps * exact.abs()  # at least one unit in the last place
    assert ((lm.weight(Place(1)).double() - exact.bfloat16().double()).abs() <= ulp).all()
    assert ((one_by_one.double() - exact).abs() > 2 * ulp).any()  # what is avoided
    assert (lm.weight(Place(1)) == exact.bfloat16()).float().mean() > 0.99


@pytest.mark.parametrize("written", [False, True])
def test_an_update_of_another_shape_is_refused_and_changes_nothing(written: bool) -> None:
    lm = language_model()
    base = lm.weight(Place(1)).clone()
    if written:
        lm.weights.add("a", Place(1), random_update())
    before = lm.weight(Place(1)).clone()
    with pytest.raises(ValueError, match=r"layer 1: an update of shape \(80, 32\) does not fit .* \(32, 80\)"):
        lm.weights.add("b", Place(1), LowRankUpdate(torch.ones(D_IN, 1), torch.ones(D_OUT, 1)))
    assert torch.equal(lm.weight(Place(1)), before)
    assert lm.weights.owners == (["a"] if written else [])
    lm.weights.remove(["a", "b"])
    assert torch.equal(lm.weight(Place(1)), base)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_unedited_matrices_come_back_for_a_while(architecture: str, dtype: torch.dtype) -> None:
    lm = language_model(architecture, dtype)
    base = {layer: lm.weight(Place(layer)).clone() for layer in (1, 2)}
    for owner, layer in (("a", 1), ("a", 2), ("b", 1)):
        lm.weights.add(owner, Place(layer), random_update())
    edited = {layer: lm.weight(Place(layer)).clone() for layer in base}
    with pytest.raises(RuntimeError), lm.weights.unedited():
        assert all(torch.equal(lm.weight(Place(layer)), base[layer]) for layer in base)
        raise RuntimeError
    assert all(torch.equal(lm.weight(Place(layer)), edited[layer]) for layer in base)
    lm.weights.remove(["a", "b"])
    assert all(torch.equal(lm.weight(Place(layer)), base[layer]) for layer in base)
