"""The row "ig" on a tiny model."""

import pytest

import lightedit as le
from benchmarks import WrongResultError, neurons
from tests.models import tiny_model, tiny_tokenizer
from tests.runs import FACTS


@pytest.fixture(scope="module")
def lm() -> le.LanguageModel:
    return le.LanguageModel(tiny_model("llama"), tiny_tokenizer("bytelevel"))


def test_both_attribute_and_agree(lm: le.LanguageModel) -> None:
    result = neurons.run(lm, FACTS[:2], points=3)
    facts = result.figures["facts"]
    assert [fact["fact"] for fact in facts] == [fact.text for fact in FACTS[:2]]
    assert all(0 <= fact["difference"] < 1e-3 and fact["ratio"] > 0 for fact in facts)
    assert facts[0]["answer_tokens"] > 1


def test_a_quick_look_scales_the_loops_time_to_all_layers(lm: le.LanguageModel) -> None:
    assert "one layer in 2" in neurons.run(lm, FACTS[:1], points=2, every=2).notes[-1]


def test_a_wrong_attribution_ends_the_row(lm: le.LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    right = neurons.midpoints
    ours = iter([True, False, False, False, False])
    monkeypatch.setattr(neurons, "midpoints", lambda points: right(points) * (0.5 if next(ours) else 1.0))
    with pytest.raises(WrongResultError, match="The capital of France"):
        neurons.run(lm, FACTS[:1], points=2)
