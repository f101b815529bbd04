"""The row "grace" on a tiny model."""

import pytest

from benchmarks import WrongResultError, adaptors
from benchmarks.published.adaptors import PublishedGRACE
from lightedit.data.fact import Fact
from lightedit.lm import LanguageModel, Place
from tests.models import tiny_model, tiny_tokenizer

FACTS = [Fact("The capital of {}", name, "x") for name in ("Peru", "Spain", "Rome", "London", "Berlin", "Italy")]


@pytest.fixture
def lm() -> LanguageModel:
    return LanguageModel(tiny_model("llama"), tiny_tokenizer("bytelevel"))


def test_all_ways_are_timed_and_agree(lm: LanguageModel) -> None:
    result = adaptors.run(lm, FACTS, Place(1, "mlp"), 2, count=20)
    assert result.figures["prompts"] == 6 and result.figures["entries"] == 20 and len(result.table) == 4
    assert set(result.figures["overhead"]) == {"ours", "published"} and not lm.weights.owners


def test_another_lookup_ends_the_row(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    right = PublishedGRACE.lookup
    monkeypatch.setattr(PublishedGRACE, "lookup", lambda *args: 1.1 * right(*args))
    with pytest.raises(WrongResultError, match="differ by"):
        adaptors.run(lm, FACTS, Place(1, "mlp"), 1, count=20)
