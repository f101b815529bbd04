"""Changes of every kind: what they do to a place, that they go away without a trace, and that files keep them."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightedit.errors import UnsupportedModelError
from lightedit.lm import LanguageModel, Place
from lightedit.lm.batch import pad
from lightedit.lm.changes import Adaptor, Change, DenseUpdate, LowRankUpdate, change_from
from lightedit.lm.reading import Prompts
from tests.lm.places import ROWS, language_model

DTYPES = [torch.float32, torch.bfloat16]
OWNERS = [("a", 0), ("a", 1), ("b", 0), ("c", 0)]


@dataclass(frozen=True)
class Affine(Adaptor):
    """A toy: a share of the output and a shift, at one position of every row."""

    shift: Tensor
    share: float = 0.5
    position: int = 2  # a later token, whose q matters

    kind: ClassVar[str] = "test-affine"

    def __call__(self, inputs: Tensor, output: Tensor, prompts: Prompts) -> Tensor:
        assert inputs.shape[:2] == output.shape[:2]
        changed = output.clone()
        changed[:, self.position] = self.share * output[:, self.position] + self.shift.to(output)
        return changed

    def check(self, place: Place, shape: tuple[int, int]) -> None:
        if len(self.shift) != shape[0]:
            raise ValueError(f"{place}: a shift of {len(self.shift)} does not fit {shape[0]} features")

    def norm(self) -> float:
        return float(self.shift.double().norm())

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Affine":
        return Affine(self.shift.to(device, dtype), self.share, self.position)

    def tensors(self) -> dict[str, Tensor]:
        return {"shift": self.shift}

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "share": self.share, "position": self.position}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> "Affine":
        return cls(tensors["shift"], settings["share"], settings["position"])


def shape(lm: LanguageModel, place: Place) -> tuple[int, int]:
    return lm.anatomy.shape(place)


def low_rank(lm: LanguageModel, place: Place, rank: int = 2) -> LowRankUpdate:
    d_out, d_in = shape(lm, place)
    return LowRankUpdate(0.1 * torch.randn(d_out, rank), torch.randn(d_in, rank))


def dense(lm: LanguageModel, place: Place, bias: bool = True) -> DenseUpdate:
    d_out, d_in = shape(lm, place)
    return DenseUpdate(0.1 * torch.randn(d_out, d_in), torch.randn(d_out) if bias else None)


def mixed(lm: LanguageModel, place: Place) -> list[Change]:
    """One change for each of `OWNERS`."""
    bias = DenseUpdate(bias=torch.randn(shape(lm, place)[0]))
    return [low_rank(lm, place), dense(lm, place), bias, low_rank(lm, place, 3)]


def state(lm: LanguageModel, place: Place) -> list[Tensor]:
    bias = lm.bias(place)
    return [lm.weight(place).clone(), *([] if bias is None else [bias.clone()])]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@torch.no_grad()
def logits(lm: LanguageModel) -> Tensor:
    return lm.forward(pad(ROWS, lm.pad_id))


PLACES = [("gpt2", Place(1)), ("gpt2", Place(1, "k")), ("opt", Place(1, "mlp_in")), ("qwen2", Place(1, "v"))]


# Weights and biases


@pytest.mark.parametrize(("architecture", "place"), PLACES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dense_update_is_added_to_weight_and_bias_and_rounded_once(
    architecture: str, place: Place, dtype: torch.dtype
) -> None:
    lm = language_model(architecture, dtype)
    weight, bias = state(lm, place)
    update = dense(lm, place)
    others = {name: value.clone() for name, value in lm.model.state_dict().items()}
    lm.weights.add(("a", 0), place, update)
    assert torch.equal(lm.weight(place), (weight.float() + update.weight).to(dtype))
    assert torch.equal(lm.bias(place), (bias.float() + update.bias).to(dtype))
    assert torch.equal(lm.weights.base(place), weight)
    name = lm.module_name(place)
    changed = {key for key, value in lm.model.state_dict().items() if not torch.equal(value, others[key])}
    assert changed == {f"{name}.weight", f"{name}.bias"}


@pytest.mark.parametrize(("architecture", "place"), PLACES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_mixed_changes_removed_in_any_order_give_the_base_back_bit_for_bit(
    architecture: str, place: Place, dtype: torch.dtype
) -> None:
    lm = language_model(architecture, dtype)
    base, changes = state(lm, place), mixed(lm, place)
    for order in itertools.permutations(OWNERS):
        for owner, change in zip(OWNERS, changes, strict=True):
            lm.weights.add(owner, place, change)
        assert lm.weights.owners == OWNERS and lm.weights.edits == ["a", "b", "c"] and lm.weights.places == [place]
        for owner in order:
            assert not same(state(lm, place), base)
            lm.weights.remove([owner])
        assert same(state(lm, place), base) and not lm.weights.owners and not lm.weights.places
        assert lm.weights.base(place).data_ptr() == lm.weight(place).data_ptr()  # no copy is kept


@pytest.mark.parametrize("dtype", DTYPES)
def test_removing_one_of_mixed_changes_equals_never_having_made_it_bit_for_bit(dtype: torch.dtype) -> None:
    place = Place(1)
    changes = mixed(language_model("gpt2"), place)
    for removed in (OWNERS[:1], OWNERS[1:2], OWNERS[2:3], OWNERS[:2]):
        lm, never = language_model("gpt2", dtype), language_model("gpt2", dtype)
        for owner, change in zip(OWNERS, changes, strict=True):
            lm.weights.add(owner, place, change)
            if owner not in removed:
                never.weights.add(owner, place, change)
        lm.weights.remove(removed)
        assert same(state(lm, place), state(never, place)) and lm.weights.owners == never.weights.owners
        for model in (lm, never):
            model.weights.add(("later", 0), place, changes[1])
        assert same(state(lm, place), state(never, place))


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_dense_updates_of_a_half_precision_model_add_up(dtype: torch.dtype) -> None:
    lm, place = language_model("gpt2", dtype), Place(1)
    weight, bias = state(lm, place)
    step = DenseUpdate(torch.full(shape(lm, place), 2.0**-12), torch.full((32,), 2.0**-12))
    for index in range(256):
        lm.weights.add(("a", index), place, step)
    torch.testing.assert_close(lm.weight(place).float(), weight.float() + 2.0**-4, atol=1e-5, rtol=2.0**-8)
    torch.testing.assert_close(lm.bias(place).float(), bias.float() + 2.0**-4, atol=1e-5, rtol=2.0**-8)


def test_low_rank_updates_alone_are_one_low_rank_change_and_others_one_dense_change() -> None:
    lm, place = language_model("gpt2", torch.bfloat16), Place(1)
    first, second, third = low_rank(lm, place), low_rank(lm, place, 3), dense(lm, place).to("cpu", torch.bfloat16)
    for index, change in enumerate((first, second)):
        lm.weights.add(("a", index), place, change)
    change = lm.weights.change(place)
    assert isinstance(change, LowRankUpdate) and change.rank == 5
    torch.testing.assert_close(change.dense(), first.dense() + second.dense())
    lm.weights.add(("b", 0), place, third)
    change = lm.weights.change(place)
    assert isinstance(change, DenseUpdate) and change.weight.dtype == change.bias.dtype == torch.float32
    torch.testing.assert_close(change.weight, first.dense() + second.dense() + third.weight.float())
    torch.testing.assert_close(change.bias, third.bias.float())
    with pytest.raises(KeyError):
        lm.weights.change(Place(2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_unedited_lifts_weights_biases_and_adaptors_and_brings_them_back(dtype: torch.dtype) -> None:
    lm, place, block = language_model("gpt2", dtype), Place(1), Place(2, "block")
    plain = logits(lm)
    for owner, change in zip(OWNERS, mixed(lm, place), strict=True):
        lm.weights.add(owner, place, change)
    lm.weights.add(("b", 1), block, Affine(torch.randn(32)))
    edited = logits(lm)
    assert not torch.equal(edited, plain)
    with pytest.raises(ZeroDivisionError), lm.weights.unedited():
        assert torch.equal(logits(lm), plain)
        with lm.weights.unedited():
            assert torch.equal(logits(lm), plain)
        assert torch.equal(logits(lm), plain)
        _ = 1 // 0
    assert torch.equal(logits(lm), edited)
    lm.weights.remove(lm.weights.owners)
    assert torch.equal(logits(lm), plain)


# What does not fit


@pytest.mark.parametrize("written", [False, True])
def test_what_does_not_fit_is_refused_and_changes_nothing(written: bool) -> None:
    lm, place = language_model("llama"), Place(1)
    if written:
        lm.weights.add(("a", 0), place, low_rank(lm, place))
    before, plain = state(lm, place), logits(lm)
    refused = [
        (
            place,
            DenseUpdate(torch.ones(80, 32)),
            ValueError,
            r"layer 1: .* shape \(80, 32\) does not fit .* \(32, 80\)",
        ),
        (
            place,
            DenseUpdate(bias=torch.ones(31)),
            ValueError,
            r"layer 1: .* shape \(31,\) does not fit a bias of \(32,\)",
        ),
        (place, DenseUpdate(torch.ones(32, 80), torch.ones(32)), UnsupportedModelError, "layer 1 has no bias"),
        (place, LowRankUpdate(torch.ones(2, 32, 1), torch.ones(2, 80, 1)), ValueError, r"\(2, 32, 80\) does not fit"),
        (Place(1, "block"), DenseUpdate(torch.ones(32, 32)), UnsupportedModelError, "block has no matrix"),
        (place, Affine(torch.ones(31)), ValueError, "a shift of 31 does not fit 32 features"),
    ]
    for where, change, error, message in refused:
        with pytest.raises(error, match=message):
            lm.weights.add(("b", 0), where, change)
        assert same(state(lm, place), before) and torch.equal(logits(lm), plain)
        assert lm.weights.owners == ([("a", 0)] if written else [])
    lm.weights.remove([("a", 0), ("b", 0)])
    assert not lm.weights.places


@pytest.mark.parametrize(("weight", "bias"), [((), None), (None, None), ((3,), None), ((3, 2), (2,)), ((3, 2), (3, 1))])
def test_a_dense_update_is_a_matrix_or_a_vector_or_both(weight: tuple | None, bias: tuple | None) -> None:
    with pytest.raises(ValueError, match=r"weight \[d_out, d_in\] or bias \[d_out\] or both"):
        DenseUpdate(*(None if size is None else torch.zeros(size) for size in (weight, bias)))


# Adaptors


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "bloom", "phi3"])
@pytest.mark.parametrize("name", ["block", "mlp", "mlp_in", "attention", "q", "embedding"])
def test_an_adaptor_changes_what_leaves_its_place_and_no_weight_until_it_is_removed(
    architecture: str, name: str
) -> None:
    lm, place = language_model(architecture), Place(0 if name == "embedding" else 1, name)
    before = {key: value.clone() for key, value in lm.model.state_dict().items()}
    plain = logits(lm)
    first, second = (Affine(torch.randn(shape(lm, place)[0]), share) for share in (0.5, -2.0))
    with lm.capture([place], 3) as states:
        logits(lm)
    lm.weights.add(("a", 0), place, first)
    lm.weights.add(("b", 0), place, second)
    with lm.capture([place], 3) as adapted:
        assert not torch.equal(logits(lm), plain)
    expected = states[place].clone()
    expected[:, 2] = -2 * (0.5 * expected[:, 2] + first.shift) + second.shift  # in the order of their adding
    torch.testing.assert_close(adapted[place], expected)
    assert lm.weights.adaptors(place) == [first, second] and lm.weights.places == [place]
    with pytest.raises(ValueError, match="carries an adaptor"):
        lm.weights.change(place)
    assert all(torch.equal(value, before[key]) for key, value in lm.model.state_dict().items())
    lm.weights.remove([("a", 0)])
    with lm.capture([place], 3) as adapted:
        logits(lm)
    expected = states[place].clone()
    expected[:, 2] = -2 * expected[:, 2] + second.shift
    torch.testing.assert_close(adapted[place], expected)
    lm.weights.remove([("b", 0)])
    assert torch.equal(logits(lm), plain)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lm.model.modules())


# Sizes and files


def test_norms_are_those_of_all_that_is_added() -> None:
    update = DenseUpdate(torch.randn(5, 7), torch.randn(5))
    expected = torch.cat([update.weight, update.bias[:, None]], dim=1).norm()
    assert update.norm() == pytest.approx(float(expected), rel=1e-6)
    assert DenseUpdate(bias=update.bias).norm() == pytest.approx(float(update.bias.norm()), rel=1e-6)


@pytest.mark.parametrize(("rank", "is_dense"), [(1, False), (3, False), (4, True), (20, True)])
def test_a_low_rank_update_is_dense_once_that_has_fewer_numbers(rank: int, is_dense: bool) -> None:
    update = LowRankUpdate(torch.randn(6, rank).bfloat16(), torch.randn(8, rank).bfloat16())  # 48 numbers or 14 a rank
    compact = update.compact()
    numbers = sum(tensor.numel() for tensor in compact.tensors().values())
    assert isinstance(compact, DenseUpdate) == is_dense and numbers == min(48, 14 * rank)
    if is_dense:
        assert compact.weight.dtype == torch.float32
        assert torch.equal(compact.weight, update.left.float() @ update.right.float().T)
    else:
        assert compact is update
    assert LowRankUpdate(torch.ones(2, 4).double(), torch.ones(2, 4)).compact().weight.dtype == torch.float64


CHANGES = {
    "low_rank": lambda: LowRankUpdate(torch.randn(4, 2), torch.randn(6, 2)),
    "dense": lambda: DenseUpdate(torch.randn(4, 6), torch.randn(4)),
    "weight alone": lambda: DenseUpdate(torch.randn(4, 6)),
    "bias alone": lambda: DenseUpdate(bias=torch.randn(4)),
    "adaptor": lambda: Affine(torch.randn(4), share=0.25, position=2),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_the_same_after_a_file(name: str, tmp_path: Path) -> None:
    change = CHANGES[name]()
    save_file(change.tensors(), tmp_path / "change.safetensors")
    again = change_from(load_file(tmp_path / "change.safetensors"), change.settings())
    assert type(again) is type(change) and again.settings() == change.settings()
    assert again.tensors().keys() == change.tensors().keys()
    assert all(torch.equal(tensor, change.tensors()[key]) for key, tensor in again.tensors().items())
    half = change.to("cpu", torch.bfloat16)
    assert type(half) is type(change) and {tensor.dtype for tensor in half.tensors().values()} == {torch.bfloat16}
    assert half.norm() == pytest.approx(change.norm(), rel=0.02)


def test_kinds_and_tensors_that_are_not_there_are_named() -> None:
    with pytest.raises(ValueError, match=r"kind 'other' is not known; known are .*dense, .*low_rank, .*test-affine"):
        change_from({}, {"kind": "other"})
    with pytest.raises(ValueError, match="kind 'low_rank' lacks the tensor 'right'"):
        change_from({"left": torch.ones(2, 1)}, {"kind": "low_rank"})


def test_two_kinds_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match=r"kind 'dense' is that of DenseUpdate; give .*Other another"):

        class Other(Adaptor):
            kind = "dense"
