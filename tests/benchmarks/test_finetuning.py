"""The row "ft" on a tiny model, and the published loop against hand calculations."""

import pytest
import torch

from benchmarks import WrongResultError, finetuning
from benchmarks.published import Request
from benchmarks.published.finetuning import parameters_of, published_ft
from lightedit.lm import LanguageModel
from lightedit.methods import FT
from tests.models import tiny_model, tiny_tokenizer
from tests.runs import FACTS

METHODS = {"FT": FT(layers=(1,), lr=1e-2, epochs=3), "FT-L": FT(layers=(0,), lr=1e-2, epochs=3, norm=2e-3)}
REQUESTS = [Request(fact.prompt, fact.subject, fact.target_new) for fact in FACTS]


def build(architecture: str = "llama") -> LanguageModel:
    return LanguageModel(tiny_model(architecture, dtype=torch.float64), tiny_tokenizer("bytelevel"))


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_both_ways_are_timed_and_agree(architecture: str) -> None:
    lm = build(architecture)
    result = finetuning.run(lm, FACTS, METHODS, 2)
    for name in METHODS:
        figures = result.figures[name]
        assert figures["median_difference"] < 1e-6
        assert figures["ratio"] == figures["published_seconds_per_fact"] / figures["seconds_per_fact"] > 0
    assert result.figures["reference_facts"] == 2 and len(result.table) == 8
    again = build(architecture).model
    assert all(torch.equal(lm.model.get_parameter(name), each) for name, each in again.named_parameters())


def test_another_update_ends_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    right = finetuning.published_ft
    monkeypatch.setattr(
        finetuning, "published_ft", lambda *args, **kwargs: {n: 1.1 * d for n, d in right(*args, **kwargs).items()}
    )
    with pytest.raises(WrongResultError, match=r"FT: ΔW of the median fact is 9.1e-02 from the published loop's"):
        finetuning.run(build(), FACTS, METHODS, 2)


@pytest.mark.parametrize(("steps", "stop"), [(1, 1e-2), (3, 1e6)])
def test_the_first_published_step_moves_each_weight_by_lr_and_no_step_none(steps: int, stop: float) -> None:
    lm = build("gpt2")
    found = published_ft(lm.model, lm.tokenizer, REQUESTS, "h.1.mlp.c_proj.", lr=1e-2, steps=steps, stop=stop)
    assert found.keys() == parameters_of(lm.model, "h.1.mlp.c_proj.").keys() and len(found) == 2
    for change in found.values():
        moved = change.abs()
        assert not moved.any() if stop > 1 else float((moved - 1e-2).abs().median()) < 1e-6


def test_the_published_bound_holds_for_the_bias_too() -> None:
    lm = build("gpt2")
    found = published_ft(lm.model, lm.tokenizer, REQUESTS, "h.1.mlp.c_proj.", lr=1e-2, steps=3, norm=1e-3)
    assert all(float(change.abs().max()) == pytest.approx(1e-3) for change in found.values())


def test_all_published_targets_are_predicted_at_one_position() -> None:
    lm = build()
    two = [Request("The capital of {}", "France", "Rome and Paris")]
    other = [Request("The capital of {}", "France", "Paris and Rome")]
    one, same = (
        published_ft(lm.model, lm.tokenizer, requests, "layers.1.mlp.down_proj.", lr=1e-2, steps=3)
        for requests in (two, other)
    )
    for name in one:
        torch.testing.assert_close(one[name], same[name])  # a bag of words
