"""The names of places, and the attention's output matrix of every architecture."""

from dataclasses import FrozenInstanceError

import pytest
import torch

from lightedit.errors import UnsupportedModelError
from lightedit.lm import LanguageModel, Place
from lightedit.lm.batch import pad
from lightedit.lm.changes import LowRankUpdate
from lightedit.lm.hooks import capture
from tests.models import ARCHITECTURES, tiny_model, tiny_tokenizer

ROWS = [[5, 60, 70, 8], [9], [30, 31, 32, 33, 34, 35, 36]]


def language_model(architecture: str) -> LanguageModel:
    return LanguageModel(tiny_model(architecture), tiny_tokenizer("bytelevel"))


def test_a_place_is_a_key_and_no_number() -> None:
    mlp, attention = Place(5), Place(5, "attention_out")
    assert mlp == Place(5, "mlp") and hash(mlp) == hash(Place(5, "mlp"))
    assert len({mlp, attention, Place(4), Place(5)}) == 3
    assert {mlp: "a", attention: "b"}[Place(5)] == "a"
    assert mlp != 5 and 5 not in {mlp: "a"} and mlp != (5, "mlp") and mlp != "5"


def test_a_place_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        Place(5).layer = 6  # type: ignore[misc]


def test_places_sort_in_the_order_in_which_they_run() -> None:
    within = ["q", "k", "v", "attention_out", "attention", "mlp_gate", "mlp_in", "mlp", "block"]
    expected = [Place(0, "embedding"), *(Place(layer, name) for layer in (0, 2, 11) for name in within)]
    assert sorted(reversed(expected)) == expected
    assert Place(2, "mlp") < Place(11, "attention_out") and Place(2) <= Place(2)


@pytest.mark.parametrize("name", ["", "query", "attention_in", "MLP"])
def test_an_unknown_name_is_refused_beside_those_there_are(name: str) -> None:
    with pytest.raises(ValueError, match=rf"place '{name}' is not known; places are embedding, q, .*, mlp, block"):
        Place(5, name)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("place", "text", "key"),
    [
        (Place(5), "layer 5", "5"),
        (Place(11, "attention_out"), "layer 11 attention_out", "11_attention_out"),
        (Place(0, "q"), "layer 0 q", "0_q"),
    ],
)
def test_a_place_is_named_in_messages_and_in_files(place: Place, text: str, key: str) -> None:
    assert (str(place), f"{place}", place.key) == (text, text, key)
    assert Place.from_key(key) == place


@pytest.mark.parametrize("key", ["", "attention_out", "5_query", "x_attention_out", "_attention_out", "5.", "-1"])
def test_a_key_that_names_no_place_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match=f"^{key!r} names no place"):
        Place.from_key(key)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_attentions_weight_gives_its_output_and_can_be_written(architecture: str) -> None:
    lm = language_model(architecture)
    matrix, module = Place(2, "attention_out"), lm.module(Place(2, "attention_out"))
    weight = lm.weight(matrix)
    with torch.no_grad(), capture({0: module}, 3, inputs=True) as keys, capture({0: module}, 3) as outputs:
        lm.forward(pad(ROWS, lm.pad_id))
    assert weight.shape == (lm.d_model, keys[0].shape[-1])
    bias = 0 if module.bias is None else module.bias
    torch.testing.assert_close(keys[0] @ weight.T + bias, outputs[0], atol=1e-5, rtol=1e-5)

    base, mlp = weight.clone(), lm.weight(Place(2)).clone()
    update = LowRankUpdate(torch.randn(weight.shape[0], 2), torch.randn(weight.shape[1], 2))
    lm.weights.add("edit", matrix, update)
    assert lm.weights.places == [matrix] and torch.equal(lm.weights.base(matrix), base)
    expected = outputs[0] + keys[0] @ update.dense().T
    torch.testing.assert_close(module(keys[0]), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(lm.weight(Place(2)), mlp)
    with lm.weights.unedited():
        assert torch.equal(lm.weight(matrix), base)
    lm.weights.remove(["edit"])
    assert torch.equal(lm.weight(matrix), base)


def test_the_attentions_matrix_is_named_when_it_cannot_be_written() -> None:
    lm = language_model("llama")
    with pytest.raises(ValueError, match=r"layer 1 attention_out: an update of shape \(3, 4\)"):
        lm.weights.add("edit", Place(1, "attention_out"), LowRankUpdate(torch.ones(3, 1), torch.ones(4, 1)))
    lm.module(Place(1, "attention_out")).to("meta")
    with pytest.raises(UnsupportedModelError, match="layer 1 attention_out is offloaded"):
        lm.weight(Place(1, "attention_out"))
