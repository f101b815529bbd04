"""The row "mend" on a tiny model."""

import pytest
import torch

import lightedit as le
from benchmarks import WrongResultError, hypernetworks
from tests.models import tiny_model, tiny_tokenizer
from tests.runs import FACTS

METHOD = le.MEND(layers=(2, 3), rank=8, rate=1e-2)


@pytest.fixture(scope="module")
def lm() -> le.LanguageModel:
    return le.LanguageModel(tiny_model("llama"), tiny_tokenizer("bytelevel"))


def test_both_take_the_same_step(lm: le.LanguageModel) -> None:
    figures = hypernetworks.run(lm, FACTS, METHOD, batch=2, steps=2).figures
    assert 0 <= figures["difference"] < 1e-3 and figures["ratio"] > 0 and figures["steps"] == 2


def test_a_wrong_gradient_ends_the_row(lm: le.LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    right = hypernetworks.mend_step
    monkeypatch.setattr(hypernetworks, "mend_step", lambda *arguments: right(*arguments) * torch.tensor(1.01))
    with pytest.raises(WrongResultError, match="differs from the loop's"):
        hypernetworks.run(lm, FACTS, METHOD, batch=2, steps=1)
