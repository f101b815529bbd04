"""Metrics of whole answers, against figures worked out by hand."""

import pytest
import torch

import lightedit as le
from lightedit.metrics.answered import answers, exact_match, f1, knowledge_editor_scores
from tests.kinds import TEXTS, facts_for, other_model
from tests.models import LABELS
from tests.runs import scored


def test_f1_counts_each_word_as_often_as_it_stands_in_both() -> None:
    said = ["the Sea of Japan", "Paris", "Paris Paris Rome", "", "", "It's"]
    wanted = ["Sea", "London", "Paris Rome Rome", "", "Rome", "its"]
    found = f1(said, wanted).tolist()
    # 1 common word of 3 and 1; none; 2 common of 3 and 3; two empty answers; one empty; punctuation does not count
    assert found == pytest.approx([2 * 1 / 4, 0, 2 * 2 / 6, 1, 0, 1])


def test_exact_match_ignores_case_articles_and_punctuation_only() -> None:
    assert exact_match(["The Tower!", "tower", "tower of"], ["tower", "towers", "tower"]).tolist() == [1, 0, 0]


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_answers_are_classes_or_greedy_texts(name: str) -> None:
    lm = other_model(name)
    found = answers(lm, TEXTS, max_new_tokens=5)
    for text, said in zip(TEXTS, found, strict=True):
        assert said == str(lm.complete(text, max_new_tokens=5)).strip()
        assert name == "t5" or said in LABELS


def record(said: int, target: int, rephrased: list[int], before: list[int], now: list[int]) -> dict[str, dict]:
    return {
        "efficacy": {"predicted": [[said]], "accuracy": [float(said == target)]},
        "paraphrase": {"predicted": [[p] for p in rephrased], "accuracy": [float(p == target) for p in rephrased]},
        "neighborhood": {"unchanged": [float(a == b) for a, b in zip(before, now, strict=True)]},
    }


def test_knowledge_editor_scores_by_hand() -> None:
    records = [
        record(1, 1, [1, 0, 1, 1], [0, 1], [0, 0]),  # 1; 3/4; 3/4; 1/2
        record(0, 1, [0, 1], [0, 1], [0, 1]),  # not written: KE's equivalence 1/2 is agreement with answer 0
    ]
    assert knowledge_editor_scores(records) == pytest.approx(
        {"success": 50, "retain": 75, "equivalence": 100 * (3 / 4 + 1 / 2) / 2,
         "equivalence_accuracy": 100 * (3 / 4 + 1 / 2) / 2}
    )  # fmt: skip
    failed = [record(0, 1, [0, 0], [0], [0])]
    found = knowledge_editor_scores(failed)
    assert (found["success"], found["equivalence"], found["equivalence_accuracy"]) == (0, 100, 0)
    assert knowledge_editor_scores([{"efficacy": {"predicted": [[3]], "accuracy": [1.0]}}]) == {"success": 100}


def test_single_edits_of_a_classifier_are_scored_with_retain_and_equivalence() -> None:
    lm = other_model("bert")
    unrelated = tuple(zip(TEXTS[2:], LABELS, strict=False))
    facts = [
        le.Example(fact.text, fact.target_new, rephrasings=(fact.text + " indeed",), unrelated=unrelated).fact()
        for fact in facts_for(lm)[:2]
    ]
    before = scored(lm, facts)
    method = le.FT(layers=(2,), lr=2e-2, epochs=40, parts="block")
    found = le.evaluate_single(lm, facts, method, before=before, settings=le.EvaluationSettings(progress_bar=False))
    scores = knowledge_editor_scores(found.records)
    assert scores["success"] == found.scores["success_rate"] == 100
    assert scores["retain"] == pytest.approx(found.scores["retain_accuracy"])
    assert scores["equivalence_accuracy"] == pytest.approx(found.scores["equivalence_accuracy"])
    for fact, of_fact in zip(facts, found.records, strict=True):
        edit = le.edit(lm, [fact], method, settings=le.RunSettings(progress_bar=False))
        now = answers(lm, [*fact.neighborhood_prompts, *fact.paraphrase_prompts])
        edit.revert(lm)
        then = answers(lm, fact.neighborhood_prompts)
        assert of_fact["neighborhood"]["unchanged"] == [float(a == b) for a, b in zip(now, then, strict=False)]
        assert (now[-1] == fact.target_new) == (of_fact["paraphrase"]["accuracy"] == [1.0])
    assert torch.is_tensor(f1(["a"], ["b"]))
