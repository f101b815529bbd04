"""Coarse and refined neurons, worked out by hand; prompts and answers as they reach the model."""

from dataclasses import replace

import pytest
import torch

import lightedit as le
from lightedit.data.prompts import Contexts
from lightedit.errors import ArgumentError
from lightedit.methods.neurons import search as module
from lightedit.methods.neurons.asking import AskedFact, ask, most_probable, object_embedding, object_tokens, texts_of
from lightedit.methods.neurons.attribution import Attributions, Query
from lightedit.methods.neurons.search import NeuronSearch, adjusted_share, find_neurons
from tests.models import tiny_model, tiny_tokenizer

FACT = le.Fact("The capital of {} is", "France", "Rome", target_true="Paris")


@pytest.fixture(scope="module")
def lm() -> le.LanguageModel:
    return le.LanguageModel(tiny_model("llama", layers=2), tiny_tokenizer("bytelevel"))


def found_for(monkeypatch, scores, p, sizes, **settings):
    """The neurons of made-up attributions: for each layer a row for each token of each prompt's answer."""
    rows = tuple(torch.tensor(layer) for layer in scores)
    given = Attributions(rows, torch.tensor(p), tuple(-2 * row for row in rows))
    monkeypatch.setattr(module, "attribute", lambda *_, **__: given)
    asked = AskedFact(((1,),) * len(sizes), tuple((2,) * size for size in sizes))
    return find_neurons(None, asked, range(len(scores)), NeuronSearch(**settings))


SCORES = [
    [[1.0, 0.19, 0.0], [1.0, 0.25, 0.0], [0.1, 0.5, -0.5]],  # layer 0: three prompts
    [[0.2, 0.0, 0.0], [2.0, 0.6, 0.3], [0.3, 0.0, 0.2]],
]


def test_a_neuron_is_coarse_from_a_share_of_the_largest_attribution_of_all_layers_on(monkeypatch) -> None:
    found = found_for(monkeypatch, [[SCORES[0][0]], [SCORES[1][0]]], [0.5], [1])
    assert found.neurons.tolist() == [[0, 0], [1, 0]]  # 1.0, and 0.2 = 0.2 * 1.0; 0.19 is less
    assert found.attributions.tolist() == pytest.approx([1.0, 0.2])
    stricter = found_for(monkeypatch, [[SCORES[0][1]], [SCORES[1][1]]], [0.5], [1], threshold=0.5)
    assert stricter.neurons.tolist() == [[0, 0], [1, 0]]  # 1.0 and 2.0 of at most 2.0


def test_a_neuron_is_refined_if_enough_prompts_share_it(monkeypatch) -> None:
    # coarse: {00, 10}, {00, 10, 11}, {00, 01, 10, 12}
    two_thirds = found_for(monkeypatch, SCORES, [0.5, 0.1, 0.1], [1, 1, 1], share=2 / 3)
    assert two_thirds.neurons.tolist() == [[0, 0], [1, 0]]
    assert two_thirds.shares.tolist() == [1.0, 1.0]
    assert two_thirds.attributions.tolist() == pytest.approx([2.1 / 3, 2.5 / 3])
    assert two_thirds.activations.tolist() == pytest.approx([-4.2 / 3, -5.0 / 3])
    some = found_for(monkeypatch, SCORES, [0.5, 0.1, 0.1], [1, 1, 1], share=0.0)
    assert some.neurons.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [1, 2]]
    assert some.shares.tolist() == pytest.approx([1.0, 1 / 3, 1.0, 1 / 3, 1 / 3])
    assert some.probability == 0.5
    assert some.by_layer == pytest.approx(((1.19 + 1.25 + 0.1) / 3, (0.2 + 2.9 + 0.5) / 3))


def test_an_answer_of_several_tokens_counts_with_their_mean(monkeypatch) -> None:
    scores = [[[1.0, 0.0], [0.0, 0.4], [0.6, 0.0]]]  # the first prompt's answer has two tokens
    found = found_for(monkeypatch, scores, [0.5, 0.5, 0.9], [2, 1], threshold=0.5)
    assert found.neurons.tolist() == [[0, 0]]  # 0.5 and 0.6; neuron 1 has 0.2
    assert found.attributions.tolist() == pytest.approx([0.55])
    assert found.probability == 0.25


def test_a_fact_whose_probability_nothing_raises_has_no_neurons(monkeypatch) -> None:
    assert len(found_for(monkeypatch, [[[-1.0, 0.0]], [[-0.5, -2.0]]], [0.5], [1]).neurons) == 0


def test_the_share_moves_until_two_to_five_neurons_are_left() -> None:
    counts = torch.tensor([10, 9, 8, 8, 8, 8, 8, 2, 1, 0])
    assert adjusted_share(counts, 10, 0.7) == pytest.approx(0.85)  # 7 neurons at 0.7 to 0.8, 2 at 0.85
    few = torch.tensor([10, 6, 1, 0])
    assert adjusted_share(few, 10, 0.7) == pytest.approx(0.6)
    assert adjusted_share(torch.tensor([10, 0]), 10, 0.7) == pytest.approx(0.4)  # after six moves
    assert adjusted_share(torch.tensor([7, 7]), 10, 0.7) == 0.7


def test_the_adjusted_share_is_used(monkeypatch) -> None:
    # coarse: {00}, {00, 10}, {01, 10}; two of three prompts are less than 0.7
    kept = found_for(monkeypatch, SCORES, [0.5, 0.1, 0.1], [1, 1, 1], threshold=0.5)
    assert kept.share == 0.7 and len(kept.neurons) == 0
    found = found_for(monkeypatch, SCORES, [0.5, 0.1, 0.1], [1, 1, 1], threshold=0.5, adjust=True)
    assert found.share == pytest.approx(0.65) and found.neurons.tolist() == [[0, 0], [1, 0]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"points": 0}, "points"),
        ({"threshold": 0.0}, "threshold"),
        ({"threshold": 1.1}, "threshold"),
        ({"share": -0.1}, "share"),
        ({"prompts": "some"}, "prompts is one of contexts, paraphrases, prompt"),
    ],
)
def test_wrong_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        NeuronSearch(**settings)


# Prompts and answers


def test_each_token_of_an_answer_is_attributed_after_the_true_ones_before_it(lm: le.LanguageModel) -> None:
    prompt, whole = lm.encode([FACT.text, f"{FACT.text} Paris"])
    answer = tuple(whole[len(prompt) :])
    assert len(answer) > 1
    asked = ask(lm, FACT, [FACT.text], "Paris")
    assert asked.queries() == [Query((*prompt, *answer[:i]), token) for i, token in enumerate(answer)]


def test_published_answers_have_no_space_and_stand_right_after_the_prompt(lm: le.LanguageModel) -> None:
    (prompt,) = lm.encode([FACT.text])
    alone = lm.tokenizer("Paris")["input_ids"]
    asked = ask(lm, FACT, [FACT.text], "Paris", published=True)
    assert asked.queries(published=True) == [Query(tuple(prompt), token) for token in alone]


def test_prompts_and_answers_are_those_that_the_fact_is_served_with(lm: le.LanguageModel) -> None:
    joined = replace(FACT, separator="-", end_turn=True)
    asked = ask(lm, joined, [FACT.text], "Paris")
    whole = [*lm.encode([f"{FACT.text}-Paris"])[0], lm.tokenizer.eos_token_id]
    assert [*asked.prompts[0], *asked.answers[0]] == whole
    assert object_tokens(lm, joined, "Paris") == asked.answers[0][:-1]


def test_a_fact_is_asked_by_its_contexts_or_paraphrases_or_alone() -> None:
    fact = replace(FACT, paraphrase_prompts=("France has its capital in", "The capital of France is"))
    contexts = Contexts(("{}", "I know. {}"), (0.5, 0.5))
    assert texts_of(fact, "contexts", contexts) == [FACT.text, f"I know. {FACT.text}"]
    assert texts_of(fact, "paraphrases", contexts) == [FACT.text, "France has its capital in"]
    assert texts_of(fact, "prompt", contexts) == [FACT.text]


def test_what_the_model_says_is_its_most_probable_token(lm: le.LanguageModel) -> None:
    (row,) = lm.encode([FACT.text])
    assert [most_probable(lm, row)] == lm.generate([row], 1, stop_at_end=False)[0]


def test_an_objects_embedding_is_the_sum_of_its_tokens_ones() -> None:
    lm = le.LanguageModel(tiny_model("gptj", layers=2), tiny_tokenizer("bytelevel"))  # its head is untied
    model = lm.model
    assert torch.equal(object_embedding(lm, [5, 9], "output"), model.lm_head.weight[5] + model.lm_head.weight[9])
    assert torch.equal(object_embedding(lm, [5, 9], "input"), model.transformer.wte.weight[[5, 9]].sum(0))
    assert not torch.equal(object_embedding(lm, [5], "input"), object_embedding(lm, [5], "output"))
