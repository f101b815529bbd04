"""The row "trace" on a tiny model."""

import pytest

import lightedit as le
from benchmarks import WrongResultError, tracing
from tests.analysis.traces import KNOWN, LAYERS, knowing_model

SETTINGS = le.TraceSettings(samples=2, window=2, severed=False, progress_bar=False)


@pytest.fixture(scope="module")
def lm() -> le.LanguageModel:
    return knowing_model()


def test_both_trace_a_fact_of_each_form_and_agree(lm: le.LanguageModel) -> None:
    result = tracing.run(lm, KNOWN, SETTINGS)
    facts = result.figures["facts"]
    assert [fact["fact"] for fact in facts] == [KNOWN[1].text, KNOWN[0].text]
    assert [fact["before_subject"] for fact in facts] == [0, 4]
    assert all(0 <= fact["difference"] < 1e-5 for fact in facts)
    assert all(fact["ratio"] == pytest.approx(fact["loop"] / fact["ours"]) for fact in facts)


def test_a_quick_look_scales_the_loops_time_to_all_layers(lm: le.LanguageModel) -> None:
    result = tracing.run(lm, KNOWN, SETTINGS, every=LAYERS)
    assert "one layer in 3" in result.notes[-1]


def test_a_wrong_probability_ends_the_row(lm: le.LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    right = tracing.restored
    monkeypatch.setattr(tracing, "restored", lambda *arguments: right(*arguments) + 2e-4)
    with pytest.raises(WrongResultError, match="The river is in"):
        tracing.run(lm, KNOWN, SETTINGS)


def test_weights_of_a_block_are_those_of_its_matrices(lm: le.LanguageModel) -> None:
    assert tracing._block_weights(lm) == 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 80
