"""What KN writes: worked out from the neurons that are found, and against the published loop."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer

import lightedit as le
from benchmarks.published import Request
from benchmarks.published.neurons import published_attributions, published_kn, published_neurons
from lightedit.data.prompts import ContextSettings
from lightedit.errors import ArgumentError
from lightedit.lm import Place
from lightedit.lm.changes import LowRankUpdate
from lightedit.methods.neurons import kn
from lightedit.methods.neurons.asking import object_embedding, object_tokens
from lightedit.methods.neurons.search import NeuronSearch
from lightedit.methods.protocol import search
from tests.models import tiny_model, tiny_tokenizer
from tests.runs import FACTS, assert_unedited, state

pytestmark = pytest.mark.filterwarnings("ignore:.*hold \\(the model:UserWarning")
ALONE = NeuronSearch(points=4, threshold=0.3, prompts="prompt")
QUIET = le.RunSettings(progress_bar=False, outcomes=False)
BOTH = pytest.mark.parametrize("architecture", ["gpt2", "llama"])


def a_model(architecture: str = "llama", dtype: torch.dtype = torch.float32) -> le.LanguageModel:
    return le.LanguageModel(tiny_model(architecture, dtype=dtype), tiny_tokenizer("bytelevel"))


def neurons_of(lm: le.LanguageModel, method: le.Method, facts: list[le.Fact]) -> list[list[tuple[int, int]]]:
    editor = method.editor(lm)
    editor.prepare(facts, [list(range(len(facts)))])
    search(editor, range(len(facts)), None)
    return [[(int(i), int(j)) for i, j, _ in editor.results[index]] for index in range(len(facts))]


def signs_of(
    lm: le.LanguageModel, fact: le.Fact, answer: str, neurons: list[tuple[int, int]]
) -> dict[tuple[int, int], int]:
    """The sign of each neuron's activation, averaged over the tokens that predict the answer."""
    (prompt,), (row,) = lm.encode([fact.text]), lm.encode([f"{fact.text} {answer}"])
    reads = torch.arange(len(prompt) - 1, len(row) - 1)
    places = [Place(layer) for layer in range(lm.n_layers)]
    with torch.no_grad(), lm.capture(places, 1, (torch.zeros_like(reads), reads), inputs=True) as keys:
        lm.model(torch.tensor([row]))
    return {(i, j): 1 if float(keys[Place(i)][:, j].mean()) > 0 else -1 for i, j in neurons}


def changes_of(lm: le.LanguageModel, before: dict[str, torch.Tensor], layer: int) -> torch.Tensor:
    name = f"{lm.module_name(Place(layer))}.weight"
    old = before[name]
    return lm.weight(Place(layer)) - (old.T if lm.architecture.blocks.startswith("transformer") else old)


def test_it_is_a_method_of_the_package() -> None:
    assert le.methods.KN is le.KN and le.methods.METHODS["KN"] is le.KN


@BOTH
def test_an_update_moves_the_values_of_the_facts_neurons_from_the_old_object_to_the_new(architecture: str) -> None:
    lm = a_model(architecture)
    before = state(lm)
    fact = FACTS[0]
    method = le.KN(search=ALONE, subtract=1.5, add=6.0)
    (neurons,) = neurons_of(lm, method, [fact])
    assert neurons and len(neurons) < 40
    old, new = (object_embedding(lm, object_tokens(lm, fact, text), "output") for text in ("Paris", "Rome"))
    direction = 6.0 * new / new.norm() - 1.5 * old / old.norm()
    values = {(i, j): lm.weight(Place(i))[:, j].clone() for i, j in neurons}
    signs = signs_of(lm, fact, "Paris", neurons)
    assert (-1 in signs.values()) == (architecture == "llama")  # behind a gate
    edit = le.edit(lm, [fact], method, settings=QUIET)
    for layer in range(lm.n_layers):
        change = changes_of(lm, before, layer)
        expected = torch.zeros_like(change)
        for i, j in neurons:
            if i == layer:
                expected[:, j] = signs[i, j] * values[i, j].norm() * direction
        assert torch.equal(change != 0, expected != 0)  # no other column changes
        assert torch.allclose(change, expected, atol=1e-5)
    for place, update in edit.rounds[0].items():
        assert isinstance(update, LowRankUpdate)
        assert update.rank == sum(i == place.layer for i, _ in neurons)
        assert torch.equal(update.right.sum(0), torch.ones(update.rank)) and set(update.right.unique().tolist()) == {
            0,
            1,
        }


@BOTH
@pytest.mark.parametrize(("mode", "factor"), [("erase", 0.0), ("suppress", 0.0), ("enhance", 2.0)])
def test_values_of_the_targets_neurons_are_scaled_exactly_and_once(architecture: str, mode: str, factor: float) -> None:
    lm = a_model(architecture)
    facts = [FACTS[0], le.Fact(FACTS[0].prompt, "Francesco", "Rome")]
    method = le.KN(mode=mode, search=NeuronSearch(points=4, threshold=0.02, prompts="prompt"))
    found = neurons_of(lm, method, facts)
    assert set(found[0]) & set(found[1])  # what both have is not scaled twice
    values = {(i, j): lm.weight(Place(i))[:, j].clone() for own in found for i, j in own}
    edit = le.edit(lm, facts, method, settings=QUIET)
    for (i, j), value in values.items():
        assert torch.equal(lm.weight(Place(i))[:, j], factor * value)
    edit.revert(lm)
    for (i, j), value in values.items():
        assert torch.equal(lm.weight(Place(i))[:, j], value)


@pytest.mark.parametrize("mode", ["erase", "suppress"])
def test_erasing_lowers_and_enhancing_raises_the_targets_probability(mode: str) -> None:
    lm = a_model()
    quiet = le.EvaluationSettings(progress_bar=False)

    def nll(method: le.Method | None) -> float:
        edit = method and le.edit(lm, FACTS[:1], method, settings=QUIET)
        found = le.evaluate(lm, FACTS[:1], settings=quiet).records[0]["efficacy"]["nll_wanted"]
        if edit:
            edit.revert(lm)
        return float(torch.as_tensor(found))

    assert nll(le.KN(mode=mode, search=ALONE)) > nll(None)
    assert le.KN(mode=mode).erases and le.KN().erasing() == le.KN(mode="erase")
    assert not le.KN(mode="enhance").erases and not le.KN().erases


def test_the_old_object_is_what_the_model_says_where_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = a_model()
    fact = le.Fact("The capital of {}", "France", "Rome")
    (row,) = lm.encode([fact.text])
    ((said,),) = lm.generate([row], 1, stop_at_end=False)
    asked: list[Any] = []
    right = kn.find_neurons
    monkeypatch.setattr(kn, "find_neurons", lambda lm, own, *o, **k: asked.append(own) or right(lm, own, *o, **k))
    before = state(lm)
    method = le.KN(search=ALONE)
    (neurons,) = neurons_of(lm, method, [fact])
    assert asked[0].answers == ((said,),)
    values = {(i, j): lm.weight(Place(i))[:, j].clone() for i, j in neurons}
    le.edit(lm, [fact], method, settings=QUIET)
    old, new = (object_embedding(lm, tokens, "output") for tokens in ([said], object_tokens(lm, fact, "Rome")))
    (layer, neuron), value = next(iter(values.items()))
    expected = value.norm() * (8 * new / new.norm() - old / old.norm())
    assert torch.allclose(changes_of(lm, before, layer)[:, neuron].abs(), expected.abs(), atol=1e-5)


def test_neurons_are_those_of_the_true_target_in_an_update_and_else_of_the_new_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lm = a_model()
    asked: list[Any] = []
    right = kn.find_neurons
    monkeypatch.setattr(kn, "find_neurons", lambda lm, own, *o, **k: asked.append(own) or right(lm, own, *o, **k))
    for mode, answer in (("update", "Paris"), ("erase", "Rome"), ("suppress", "Rome"), ("enhance", "Rome")):
        neurons_of(lm, le.KN(mode=mode, search=ALONE), FACTS[:1])
        assert asked[-1].answers == (object_tokens(lm, FACTS[0], answer),)


def test_embeddings_of_the_input_and_of_the_head_are_a_choice() -> None:
    lm = a_model("gptj")  # its head is untied
    fact = FACTS[0]
    for embeddings in ("output", "input"):
        method = le.KN(search=ALONE, subtract=0.0, add=1.0, scaled=False, embeddings=embeddings)
        (neurons,) = neurons_of(lm, method, [fact])
        edit = le.edit(lm, [fact], method, settings=QUIET)
        update = edit.rounds[0][Place(neurons[0][0])]
        expected = object_embedding(lm, object_tokens(lm, fact, "Rome"), embeddings)
        assert torch.allclose(update.left[:, 0].abs(), expected.abs(), atol=1e-6)
        edit.revert(lm)


def test_erased_values_become_the_unknown_tokens_embedding_where_there_is_one() -> None:
    method = le.KN(mode="erase", erase_with="unknown", search=ALONE)
    lm = a_model()
    with pytest.raises(ArgumentError, match="no unknown token; give zero"):
        le.edit(lm, FACTS[:1], method, settings=QUIET)
    tokenizer = copy.deepcopy(tiny_tokenizer("bytelevel"))
    tokenizer.unk_token = "<pad>"
    lm = le.LanguageModel(tiny_model("llama"), tokenizer)
    (neurons,) = neurons_of(lm, method, FACTS[:1])
    le.edit(lm, FACTS[:1], method, settings=QUIET)
    for i, j in neurons:
        assert torch.allclose(lm.weight(Place(i))[:, j], lm.head.weight[0], atol=1e-6)


@BOTH
@pytest.mark.parametrize("number", [0, 1])
def test_the_published_option_equals_the_published_loop(architecture: str, number: int) -> None:
    lm = a_model(architecture)
    fact = FACTS[number]
    attributions = published_attributions(lm.model, lm.tokenizer, fact.text, fact.target_true, steps=20)
    neurons = published_neurons(attributions)
    request = Request(fact.prompt, fact.subject, fact.target_new)
    expected = published_kn(lm.model, lm.tokenizer, request, neurons)
    method = le.KN(published=True)
    assert neurons_of(lm, method, [fact]) == [neurons]
    before = state(lm)
    le.edit(lm, [fact], method, settings=QUIET)
    assert expected
    for layer in range(lm.n_layers):
        change = changes_of(lm, before, layer)
        assert torch.allclose(change, expected.get(layer, torch.zeros_like(change)), atol=1e-5)


def test_facts_written_one_by_one_and_apart_are_the_same_updates() -> None:
    lm = a_model()
    method = le.KN(search=ALONE)
    editor = method.editor(lm)
    editor.prepare(FACTS, None)
    search(editor, range(len(FACTS)), None)
    apart = editor.separate(range(len(FACTS)))
    assert apart.of_row.tolist() == list(range(len(FACTS)))
    for index, fact in enumerate(FACTS):
        edit = le.edit(lm, [fact], method, settings=QUIET)
        edit.revert(lm)
        assert edit.rounds[0]
        for place, updates in apart.updates.items():
            own = LowRankUpdate(updates.left[index], updates.right[index]).dense()
            written = edit.rounds[0].get(place)
            assert torch.equal(own, torch.zeros_like(own) if written is None else written.dense())


def test_all_layers_are_searched_by_default_and_the_record_names_them() -> None:
    lm = a_model()
    edit = le.edit(lm, FACTS[:1], le.KN(search=ALONE), settings=QUIET)
    assert edit.record.method["layers"] == [0, 1, 2, 3]
    module = le.EditModule(lm, le.KN(search=ALONE))
    assert [place.layer for place in module.method.places] == [0, 1, 2, 3]  # whose drift health watches
    with pytest.raises(ArgumentError, match="give layers"):
        le.KN().searched  # noqa: B018


def test_contexts_are_sampled_recorded_and_searched() -> None:
    lm = a_model()
    contexts = ContextSettings(prefixes=(("The", 2, 5),))
    method = le.KN(search=NeuronSearch(points=3, threshold=0.05, share=0.6, contexts=contexts))
    edit = le.edit(lm, FACTS[:1], method, settings=QUIET)
    assert len(edit.record.inputs["contexts"]["templates"]) == 3
    editor = method.editor(lm)
    editor.prepare(FACTS[:1], None)
    assert len(editor.asked[0].prompts.prompts) == 3


class Stopped(Exception):
    pass


class StopAfter(Callback):
    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.current_epoch == 1:
            raise Stopped


def test_a_fact_without_neurons_is_warned_of_and_said_in_its_outcome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = kn.find_neurons

    def none_of_the_first(lm, asked, *others, **settings):
        found = right(lm, asked, *others, **settings)
        if asked.prompts[0] == tuple(lm.encode([FACTS[0].text])[0]):
            return replace(found, neurons=found.neurons[:0], activations=found.activations[:0])
        return found

    monkeypatch.setattr(kn, "find_neurons", none_of_the_first)
    method = le.KN(search=ALONE)
    settings = le.RunSettings(progress_bar=False, facts_per_round=1)
    lm = a_model()
    before = state(lm)
    with pytest.warns(UserWarning, match="nothing is written of 'The capital of France'.*search.share"):
        edit = le.edit(lm, FACTS[:2], method, settings=settings)
    assert edit.rounds[0] == {} and edit.rounds[1]
    assert [outcome.note for outcome in edit.outcomes] == ["no neuron was found, so nothing was written", None]
    assert "-> 'Rome': no neuron was found, so nothing was written" in str(edit)
    edit.save(tmp_path / "edit")
    assert le.Edit.load(tmp_path / "edit").outcomes == edit.outcomes
    edit.revert(lm)
    assert_unedited(lm, before)

    run = tmp_path / "run"
    with pytest.raises(Stopped), pytest.warns(UserWarning, match="nothing is written"):
        le.edit(lm, FACTS[:2], method, settings=settings, checkpoint=run, callbacks=[StopAfter()])
    resumed = le.edit(lm, FACTS[:2], method, settings=settings, checkpoint=run)
    assert resumed.outcomes == edit.outcomes


def test_a_fact_without_neurons_is_scored_unedited_in_the_single_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    right = kn.find_neurons

    def none(*arguments, **settings):
        found = right(*arguments, **settings)
        return replace(found, neurons=found.neurons[:0], activations=found.activations[:0])

    monkeypatch.setattr(kn, "find_neurons", none)
    lm = a_model()
    quiet = le.EvaluationSettings(progress_bar=False)
    with pytest.warns(UserWarning, match="nothing is written"):
        found = le.evaluate_single(lm, FACTS[:2], le.KN(search=ALONE), settings=quiet)
    for one, other in zip(found.records, le.evaluate(lm, FACTS[:2], settings=quiet).records, strict=True):
        assert one["efficacy"]["nll_wanted"] == pytest.approx(other["efficacy"]["nll_wanted"])


def with_relations(facts: list[le.Fact], relations: list[str | None]) -> list[le.Fact]:
    return [replace(fact, relation=relation) for fact, relation in zip(facts, relations, strict=True)]


def kept_by_hand(found: list[list[tuple[int, int]]], relations: list[str | None], largest: float) -> list[list]:
    """Each fact's neurons that at most this share of the other facts of its relation have."""
    kept = []
    for number, own in enumerate(found):
        others = [set(f) for i, f in enumerate(found) if i != number and relations[i] == relations[number]]
        alone = relations[number] is None or not others
        kept.append([x for x in own if alone or sum(x in other for other in others) <= largest * len(others)])
    return kept


@pytest.mark.parametrize("alone", [False, True])
def test_neurons_that_many_facts_of_a_relation_have_are_left_out(alone: bool) -> None:
    lm = a_model()
    relations = ["a", "a", None, "a", None][: len(FACTS)]
    facts = with_relations(FACTS, relations)
    every = le.KN(search=replace(ALONE, threshold=0.05))
    found = neurons_of(lm, every, facts)
    expected = kept_by_hand(found, relations, 0.5)
    assert expected != found and any(expected)  # some are left out, not all
    method = replace(every, search=replace(every.search, common=0.5))
    before = state(lm)
    if alone:  # chunks of two facts do not change which neurons a relation shares
        editor = method.editor(lm)
        editor.prepare(facts, None)
        edits = []
        for start in range(0, len(facts), 2):
            chunk = range(start, min(start + 2, len(facts)))
            search(editor, chunk, None)
            assert editor.facts_found == len(chunk)
            edits.append((chunk, editor.separate(chunk)))
        for chunk, edit in edits:
            for row, index in enumerate(chunk):
                own = [
                    (place.layer, int(j))
                    for place, change in sorted(edit.updates.items())
                    for j in change.right[row].sum(1).nonzero()
                ]
                assert own == sorted(expected[index])
    else:
        edit = le.edit(lm, facts, method, settings=QUIET)
        written = {
            (layer, int(j)) for layer in range(lm.n_layers) for j in changes_of(lm, before, layer).norm(dim=0).nonzero()
        }
        assert written == {neuron for own in expected for neuron in own}
        edit.revert(lm)
    assert_unedited(lm, before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "remove"}, "mode is one of update, erase, suppress, enhance"),
        ({"layers": (2, 1)}, "layers must be ascending"),
        ({"layers": ()}, "layers must be ascending"),
        ({"add": -1.0}, "add must be"),
        ({"embeddings": "both"}, "embeddings is one of output, input"),
        ({"published": True, "add": 2.0}, "leave add out"),
        ({"published": True, "search": NeuronSearch(prompts="prompt", points=5)}, "leave search.prompts out"),
        ({"published": True, "search": NeuronSearch(common=0.1)}, "leave search.common out"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        le.KN(**settings)


def test_a_fact_that_cannot_be_asked_is_refused_by_its_number() -> None:
    lm = a_model()
    long = le.Fact("word " * 2000 + "{} is", "France", "Rome")
    with pytest.raises(le.FactError, match="fact 1"):
        le.edit(lm, [FACTS[0], long], le.KN(search=ALONE), settings=QUIET)
