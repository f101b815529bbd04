"""The names of matrices, and the attention's output matrix of every architecture."""

import pytest
import torch

from lightedit.lm import LanguageModel, Place
from lightedit.lm.architectures import UnsupportedModelError
from lightedit.lm.batch import pad
from lightedit.lm.hooks import capture
from lightedit.lm.weights import LowRankUpdate
from tests.models import ARCHITECTURES, tiny_model, tiny_tokenizer

ROWS = [[5, 60, 70, 8], [9], [30, 31, 32, 33, 34, 35, 36]]


def language_model(architecture: str) -> LanguageModel:
    return LanguageModel(tiny_model(architecture), tiny_tokenizer("bytelevel"))


def test_a_layers_number_means_the_mlps_matrix_and_nothing_else() -> None:
    mlp, attention = Place(5), Place(5, "attention_out")
    assert mlp == 5 and (mlp != 5) is False and hash(mlp) == hash(5)
    assert attention != 5 and attention != mlp and mlp != 4 and mlp != (5, "mlp") and mlp != "layer 5"
    assert {mlp: "a", attention: "b"}[5] == "a" and {5: "a"}[mlp] == "a" and attention not in {5: "a"}
    assert Place.of(5) == mlp == mlp and attention is attention


def test_matrices_sort_by_layer_and_the_attention_first() -> None:
    expected = [Place(2, "attention_out"), Place(2), Place(9), Place(11, "attention_out"), Place(11)]
    assert sorted(reversed(expected)) == expected


@pytest.mark.parametrize(
    ("matrix", "text", "key"),
    [(Place(5), "layer 5", "5"), (Place(11, "attention_out"), "layer 11 attention", "11_attention")],
)
def test_a_matrix_is_named_in_messages_and_in_files(matrix: Place, text: str, key: str) -> None:
    assert (str(matrix), f"{matrix}", matrix.key) == (text, text, key)
    assert Place.from_key(key) == matrix


@pytest.mark.parametrize("key", ["", "attention", "5_mlp", "5_query", "x_attention", "_attention", "5."])
def test_what_names_no_matrix_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match=repr(key) if key.startswith("5_") else None):
        Place.from_key(key)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_attentions_weight_gives_its_output_and_can_be_written(architecture: str) -> None:
    lm = language_model(architecture)
    matrix, module = Place(2, "attention_out"), lm.module(Place(2, "attention_out"))
    weight = lm.weight(Place(matrix))
    with torch.no_grad(), capture({0: module}, 3, inputs=True) as keys, capture({0: module}, 3) as outputs:
        lm.forward(pad(ROWS, lm.pad_id))
    assert weight.shape == (lm.d_model, keys[0].shape[-1])
    bias = 0 if module.bias is None else module.bias
    torch.testing.assert_close(keys[0] @ weight.T + bias, outputs[0], atol=1e-5, rtol=1e-5)

    base, mlp = weight.clone(), lm.weight(Place(2)).clone()
    update = LowRankUpdate(torch.randn(weight.shape[0], 2), torch.randn(weight.shape[1], 2))
    lm.weights.add("edit", Place(matrix), update)
    assert lm.weights.places == [matrix] and torch.equal(lm.weights.base(Place(matrix)), base)
    expected = outputs[0] + keys[0] @ update.dense().T
    torch.testing.assert_close(module(keys[0]), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(lm.weight(Place(2)), mlp)
    with lm.weights.unedited():
        assert torch.equal(lm.weight(Place(matrix)), base)
    lm.weights.remove(["edit"])
    assert torch.equal(lm.weight(Place(matrix)), base)


def test_the_attentions_matrix_is_named_when_it_cannot_be_written() -> None:
    lm = language_model("llama")
    with pytest.raises(ValueError, match=r"layer 1 attention: an update of shape \(3, 4\)"):
        lm.weights.add("edit", Place(1, "attention_out"), LowRankUpdate(torch.ones(3, 1), torch.ones(4, 1)))
    lm.module(Place(1, "attention_out")).to("meta")
    with pytest.raises(UnsupportedModelError, match="layer 1 attention is offloaded"):
        lm.weight(Place(1, "attention_out"))
