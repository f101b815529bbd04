"""Integrated gradients on batched rows against a plain loop, and the identity that they must fulfil."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import lightedit as le
from benchmarks.published.neurons import first_matrix, integrated_gradients, key_module
from lightedit.errors import NumericalError
from lightedit.lm import Place
from lightedit.lm.changes import Adaptor
from lightedit.lm.reading import Prompts
from lightedit.methods.neurons import attribution
from lightedit.methods.neurons.attribution import Query, attribute, both_ends, midpoints
from tests.models import tiny_model, tiny_tokenizer

LAYERS = range(3)
TEXTS = ["The capital of the city was in", "The", "In the state", "The river"]
TARGET = 300
# packed and not, sequential and parallel, with a gate and without, with recurrent layers, with a window, Conv1D
ARCHITECTURES = ["gpt2", "llama", "gptj", "opt", "bloom", "phi3", "gpt_neox", "qwen3_5_text", "mistral"]


def a_model(architecture: str, dtype: torch.dtype = torch.float32) -> le.LanguageModel:
    return le.LanguageModel(tiny_model(architecture, layers=3, dtype=dtype), tiny_tokenizer("bytelevel"))


def queries(lm: le.LanguageModel) -> list[Query]:
    return [Query(tuple(ids), TARGET + number) for number, ids in enumerate(lm.encode(TEXTS))]


def plain(lm: le.LanguageModel, query: Query, layer: int, points: Tensor) -> Tensor:
    return integrated_gradients(
        lm.model, query.ids, query.target, key_module(lm.model, layer), "input", points.tolist()
    )


def probability(lm: le.LanguageModel, query: Query, layer: int, alpha: float) -> float:
    """After the layer's key at the last token was scaled."""

    def scale(_: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        keys = args[0].reshape(1, -1, args[0].shape[-1]).clone()
        keys[:, -1] *= alpha
        return (keys.view_as(args[0]), *args[1:])

    handle = key_module(lm.model, layer).register_forward_pre_hook(scale)
    with torch.no_grad():
        p = lm.model(torch.tensor([query.ids])).logits[0, -1].double().softmax(-1)[query.target]
    handle.remove()
    return float(p)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_attributions_equal_those_of_a_loop_over_prompts_layers_and_points(architecture: str) -> None:
    lm = a_model(architecture)
    points = midpoints(5)
    found = attribute(lm, queries(lm), LAYERS, points)
    for number, query in enumerate(queries(lm)):
        for layer in LAYERS:
            expected = plain(lm, query, layer, points)
            largest = float(expected.abs().max())
            assert largest > 0
            assert found.scores[layer][number] == pytest.approx(expected, abs=2e-4 * largest), (query, layer)
        assert found.p[number] == pytest.approx(probability(lm, query, 0, 1.0), rel=1e-4)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "bloom", "olmo2"])
def test_the_attributions_of_a_layer_sum_to_what_the_probability_loses_without_its_key(architecture: str) -> None:
    lm = a_model(architecture, torch.float64)
    found = attribute(lm, queries(lm), LAYERS, midpoints(400), max_tokens=4000)
    for number, query in enumerate(queries(lm)):
        for layer in LAYERS:
            lost = probability(lm, query, layer, 1.0) - probability(lm, query, layer, 0.0)
            scale = max(abs(lost), float(found.p[number]))
            assert float(found.scores[layer][number].sum()) == pytest.approx(lost, abs=1e-3 * scale)


@pytest.mark.parametrize(("architecture", "within"), [("gemma2", 2e-3), ("olmo2", 1e-6)])  # one gain of gemma2 is 300
def test_behind_a_norm_neurons_share_what_the_norm_gives_in_the_proportions_of_the_mlps_output(
    architecture: str, within: float
) -> None:
    lm = a_model(architecture, torch.float64)
    points = midpoints(5)
    found = attribute(lm, queries(lm), LAYERS, points)
    for number, query in enumerate(queries(lm)):
        for layer in LAYERS:
            place = Place(layer)
            at = (torch.tensor([0]), torch.tensor([len(query.ids) - 1]))
            with torch.no_grad(), lm.capture([place], 1, at) as outputs, lm.capture([place], 1, at, True) as keys:
                lm.model(torch.tensor([query.ids]))
            norm = lm.mlp_norm(layer)
            of_norm = integrated_gradients(lm.model, query.ids, query.target, norm, "output", points.tolist())
            shares = lm.weight(place) * keys[place] / outputs[place].T  # of each neuron in each output, [d_out, d_in]
            expected = of_norm @ shares
            assert found.scores[layer][number] == pytest.approx(expected, abs=within * float(expected.abs().max()))


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_midpoints_are_nearer_to_the_integral_than_points_with_both_ends(architecture: str) -> None:
    lm = a_model(architecture, torch.float64)

    def error(points: Tensor) -> float:
        found = attribute(lm, queries(lm), LAYERS, points)
        sums = torch.stack([part.sum(1) for part in found.scores])
        lost = [
            [probability(lm, query, layer, 1.0) - probability(lm, query, layer, 0.0) for query in queries(lm)]
            for layer in LAYERS
        ]
        return float((sums - torch.tensor(lost)).abs().sum())

    assert error(midpoints(20)) < 0.2 * error(both_ends(20))


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_neurons_before_the_activation_are_what_the_first_matrix_gives(architecture: str) -> None:
    lm = a_model(architecture)
    points = both_ends(4)
    found = attribute(lm, queries(lm), LAYERS, points, before_activation=True)
    for number, query in enumerate(queries(lm)):
        for layer in LAYERS:
            module = first_matrix(lm.model, layer)
            expected = integrated_gradients(lm.model, query.ids, query.target, module, "output", points.tolist())
            assert found.scores[layer][number] == pytest.approx(expected, abs=2e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("architecture", ["llama", "bloom"])
def test_how_rows_are_divided_into_passes_changes_nothing(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = a_model(architecture)
    ran: list[Sequence[int]] = []
    right = attribution._gradients
    monkeypatch.setattr(
        attribution, "_gradients", lambda lm, c, group, *o: ran.append(group) or right(lm, c, group, *o)
    )
    whole = attribute(lm, queries(lm), LAYERS, midpoints(6), max_tokens=4096)
    assert max(map(len, ran)) > 1  # several layers in one pass
    ran.clear()
    parts = attribute(lm, queries(lm), LAYERS, midpoints(6), max_tokens=1)
    assert len(ran) == len(TEXTS) * len(LAYERS)
    some = attribute(lm, queries(lm), [0, 2], midpoints(6))
    for layer in LAYERS:
        largest = float(whole.scores[layer].abs().max())
        assert parts.scores[layer] == pytest.approx(whole.scores[layer], abs=1e-4 * largest)
    assert some.scores[1] == pytest.approx(whole.scores[2], abs=1e-4 * float(whole.scores[2].abs().max()))


def test_passes_hold_more_layers_where_that_costs_less() -> None:
    assert [list(group) for group in attribution._layer_groups(range(4), 4, 1000, 4096)] == [[0], [1], [2], [3]]
    assert [list(group) for group in attribution._layer_groups(range(4), 4, 1, 4096)] == [[0, 1, 2, 3]]
    assert [list(group) for group in attribution._layer_groups([1, 3], 4, 20, 10)] == [[1], [3]]


def test_attributions_are_those_of_the_present_weights() -> None:
    lm, edited = a_model("gpt2"), a_model("gpt2")
    with torch.no_grad():
        for model in (lm.model, edited.model):
            model.transformer.h[1].mlp.c_proj.weight[:7] *= 3
    found, same = (attribute(model, queries(model), [1], midpoints(3)) for model in (lm, edited))
    other = attribute(a_model("gpt2"), queries(lm), [1], midpoints(3))
    assert torch.equal(found.scores[0], same.scores[0]) and not torch.equal(found.scores[0], other.scores[0])


def test_bfloat16_gives_attributions_near_those_of_float32() -> None:
    exact, rough = (attribute(a_model("llama", dtype), queries(a_model("llama")), [2], midpoints(10))
                    for dtype in (torch.float32, torch.bfloat16))  # fmt: skip
    assert torch.cosine_similarity(exact.scores[0][0], rough.scores[0][0], dim=0) > 0.95


class Doubling(Adaptor):
    """Doubles the output."""

    kind = "doubling in test_attribution"

    def __call__(self, inputs: Tensor, output: Tensor, prompts: Prompts) -> Tensor:
        return 2 * output

    def check(self, place: Place, shape: tuple[int, int]) -> None:
        pass

    def norm(self) -> float:
        return 0.0

    def to(self, device: object, dtype: object = None) -> "Doubling":
        return self

    def tensors(self) -> dict[str, Tensor]:
        return {}

    @classmethod
    def from_tensors(cls, tensors: object, settings: object) -> "Doubling":
        return cls()


def test_a_place_with_an_adaptor_is_refused() -> None:
    lm = a_model("llama")
    lm.weights.add(("some", 0), Place(1), Doubling())
    with pytest.raises(le.UnsupportedModelError, match="layer 1 carries an adaptor"):
        attribute(lm, queries(lm), LAYERS, midpoints(2))
    assert attribute(lm, queries(lm), [0, 2], midpoints(2)).p.isfinite().all()


def test_a_model_that_gives_nan_is_refused() -> None:
    lm = a_model("llama")
    with torch.no_grad():
        lm.model.lm_head.weight[0] = torch.nan
    with pytest.raises(NumericalError, match="NaN"):
        attribute(lm, queries(lm), LAYERS, midpoints(2))
