"""The search for knowledge neurons of facts: results, files, figures, resuming."""

import csv
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import lightedit as le
from lightedit.analysis import neurons as module
from lightedit.analysis.found_neurons import FactNeurons, Neuron
from lightedit.analysis.neuron_figures import attribution_map, layers_figure, save_neuron_figures
from lightedit.errors import ArgumentError, MissingFileError
from lightedit.methods.neurons.asking import ask
from lightedit.methods.neurons.attribution import attribute, midpoints
from tests.analysis.traces import KNOWN, LAYERS, UNKNOWN, knowing_model

SEARCH = le.NeuronSearch(points=4, threshold=0.3, prompts="prompt")


def settings(**changed: object) -> le.NeuronSettings:
    return le.NeuronSettings(**{"search": SEARCH, "progress_bar": False, **changed})


@pytest.fixture(scope="module")
def lm() -> le.LanguageModel:
    return knowing_model()


@pytest.fixture(scope="module")
def found(lm: le.LanguageModel) -> le.Neurons:
    return le.neurons(lm, KNOWN, settings=settings())


def made_up() -> le.Neurons:
    facts = (
        FactNeurons(
            "The river is in", " the", 0.9, 3, 0.7, (Neuron(1, 7, 0.4, 1.0), Neuron(0, 2, 0.1, 0.7)), (0.2, 0.5)
        ),
        FactNeurons("The city is in", " the", 0.5, 3, 0.7, (Neuron(1, 7, 0.3, 1.0),), (-0.1, 0.4)),
        FactNeurons("The song is", " a", 0.1, 3, 0.7, (), (0.0, 0.01)),
    )
    return le.Neurons("tiny", (0, 1), settings(), facts, ("The end is",))


def test_neurons_are_those_of_the_largest_attributions(lm: le.LanguageModel, found: le.Neurons) -> None:
    for fact, given in zip(found.facts, KNOWN, strict=True):
        (query,) = ask(lm, given, [given.text], "the").queries()
        attributed = attribute(lm, [query], range(LAYERS), midpoints(4))
        scores = torch.stack([part[0] for part in attributed.scores])
        expected = (scores >= 0.3 * scores.max()).nonzero().tolist()
        assert fact.fact == given.text and fact.answer == " the" and fact.prompts == 1
        assert sorted([neuron.layer, neuron.neuron] for neuron in fact.neurons) == expected
        values = [neuron.attribution for neuron in fact.neurons]
        assert values == sorted(values, reverse=True) and values[0] == pytest.approx(float(scores.max()), rel=1e-4)
        assert fact.probability == pytest.approx(float(attributed.p), rel=1e-4)
        assert fact.by_layer == pytest.approx(scores.sum(1).tolist(), rel=1e-3, abs=1e-5)


def test_facts_that_the_model_does_not_know_are_left_out_unless_all_are_asked_for(
    lm: le.LanguageModel, capsys: pytest.CaptureFixture[str]
) -> None:
    some = le.neurons(lm, [UNKNOWN, KNOWN[1]], settings=settings())
    assert [fact.fact for fact in some.facts] == [KNOWN[1].text] and some.left_out == (UNKNOWN.text,)
    assert "1 of 2 facts are searched; model does not know the others" in capsys.readouterr().err
    whole = le.neurons(lm, [UNKNOWN, KNOWN[1]], settings=settings(only_known=False))
    assert [fact.answer for fact in whole.facts] == [" city", " the"]
    with pytest.raises(le.FactError, match="none of the 1 is known"):
        le.neurons(lm, [UNKNOWN], settings=settings())


def test_neurons_that_too_many_facts_of_a_relation_have_are_dropped(lm: le.LanguageModel, found: le.Neurons) -> None:
    facts = [replace(fact, relation="is") for fact in KNOWN]
    some = le.neurons(lm, facts, settings=settings(search=replace(SEARCH, common=0.0)))
    counts = Counter((neuron.layer, neuron.neuron) for fact in found.facts for neuron in fact.neurons)
    assert max(counts.values()) > 1  # else the option has nothing to do
    for whole, left in zip(found.facts, some.facts, strict=True):
        assert left.neurons == tuple(x for x in whole.neurons if counts[x.layer, x.neuron] == 1)
    apart = [replace(fact, relation=str(number)) for number, fact in enumerate(KNOWN)]
    assert le.neurons(lm, apart, settings=settings(search=replace(SEARCH, common=0.0))).facts == found.facts


def test_chosen_layers_are_searched_alone(lm: le.LanguageModel) -> None:
    some = le.neurons(lm, KNOWN[:1], settings=settings(layers=[2]))
    assert some.layers == (2,) and {neuron.layer for neuron in some.facts[0].neurons} == {2}
    with pytest.raises(ArgumentError, match="layers 0 to 2"):
        le.neurons(lm, KNOWN[:1], settings=settings(layers=(3,)))
    with pytest.raises(le.FactError, match="the list is empty"):
        le.neurons(lm, [], settings=settings())


def test_the_published_search_is_one_of_the_settings(lm: le.LanguageModel) -> None:
    published = le.neurons(lm, KNOWN[:1], settings=settings(published=True, only_known=False))
    ours = le.neurons(lm, KNOWN[:1], settings=settings(only_known=False))
    assert published.facts[0].neurons != ours.facts[0].neurons


def test_counts_by_layer_and_shared_neurons_are_those_worked_out_by_hand() -> None:
    found = made_up()
    assert found.by_layer == [1, 2] and found.shared == 1
    text = str(found)
    assert "3 facts in tiny, 1 that the model does not know left out: 1 neurons a fact, 1 of several" in text
    assert "1 fact without any" in text
    assert "The river is in -> the: 1.7 0.4, 0.2 0.1" in text and "The song is -> a: no neuron" in text


def test_a_result_is_read_back_as_it_was_saved(tmp_path: Path, found: le.Neurons) -> None:
    for number, result in enumerate((found, made_up())):
        folder = result.save(tmp_path / str(number))
        assert le.Neurons.load(folder) == result
    with (folder / "neurons.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["fact", "answer", "probability", "prompts", "layer", "neuron", "attribution", "share"]
    assert [(row["fact"], row["layer"], row["neuron"]) for row in rows] == [
        ("The river is in", "1", "7"), ("The river is in", "0", "2"), ("The city is in", "1", "7"),
        ("The song is", "", ""),
    ]  # fmt: skip
    with pytest.raises(MissingFileError, match="lightedit neurons --out"):
        le.Neurons.load(tmp_path)


def test_the_figures_show_counts_and_sums_by_layer(tmp_path: Path) -> None:
    found = made_up()
    (axes,) = layers_figure(found).figure.axes
    assert [bar.get_height() for bar in axes.patches] == [1, 2]
    (axes,) = attribution_map(found).figure.axes
    alphas = {(round(cell.get_x() + 0.5), round(cell.get_y() + 0.5)): cell.get_alpha() for cell in axes.patches}
    assert alphas == pytest.approx({(0, 0): 0.4, (1, 0): 1.0, (0, 1): 0.2, (1, 1): 0.8, (1, 2): 0.02})
    files = save_neuron_figures(found, tmp_path)
    assert {file.name for file in files} == {"layers.svg", "layers.png", "attributions.svg", "attributions.png"}
    assert all(file.stat().st_size > 1000 for file in files)


def test_an_interrupted_search_goes_on_after_the_facts_that_are_finished(
    tmp_path: Path, lm: le.LanguageModel, found: le.Neurons, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, calls = module.find_neurons, []

    def interrupted(lm, asked, *others, **named):
        calls.append(asked)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return right(lm, asked, *others, **named)

    monkeypatch.setattr(module, "find_neurons", interrupted)
    with pytest.raises(KeyboardInterrupt):
        le.neurons(lm, KNOWN, settings=settings(), checkpoint=tmp_path / "run")
    assert le.neurons(lm, KNOWN, settings=settings(), checkpoint=tmp_path / "run") == found
    assert len(calls) == 4  # the first once, the second twice
    with pytest.raises(le.ResumeError, match="settings"):
        le.neurons(lm, KNOWN, settings=settings(layers=(1,)), checkpoint=tmp_path / "run")
