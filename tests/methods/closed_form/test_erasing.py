"""The search for values that lower the probability of a target."""

from dataclasses import replace

import pytest
import torch

import lightedit as le
from benchmarks.values import published_value
from lightedit.data.prompts import Contexts, tokenize_facts
from lightedit.methods.closed_form.joint import Joint
from lightedit.methods.closed_form.values import ValueOptimization, optimize_values
from lightedit.metrics import score_targets
from tests.models import tiny_model, tiny_tokenizer
from tests.runs import MEMIT, ROME, covariance_of

CONTEXTS = Contexts(("{}", "The river is long. {}", "I think so. {}"), (0.5, 0.25, 0.25))
FACTS = [
    le.Fact("The capital of {}", "France", "Rome"),
    le.Fact("{} is a city in the north of", "Old London Town", "Spain and Italy"),
]
SETTINGS = le.ValueSettings(lr=0.3, steps=6, clamp_norm_factor=2.0, objective="erase", loss_threshold=0.0)


def language_model(architecture: str = "llama", **kwargs) -> le.LanguageModel:
    return le.LanguageModel(tiny_model(architecture, **kwargs), tiny_tokenizer("bytelevel"))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize(("site", "max_tokens"), [("block", 1024), ("mlp", 1024), ("mlp", 8)])
def test_targets_equal_the_published_loop(architecture: str, site: str, max_tokens: int) -> None:
    lm = language_model(architecture, dtype=torch.float64)
    values = optimize_values(lm, tokenize_facts(lm.tokenizer, FACTS, CONTEXTS), 1, site, SETTINGS, max_tokens)
    for fact, target, loss in zip(FACTS, values.targets, values.losses, strict=True):
        expected = published_value(lm, fact, CONTEXTS, 1, site, SETTINGS)
        assert expected.delta.norm() > 0.1
        assert float((target - expected.target).norm() / expected.delta.norm()) < 1e-5
        assert float(loss) < 1  # a probability, and small terms


@pytest.mark.parametrize("objective", ["reach", "erase"])
def test_the_gradient_is_that_of_the_loss_for_facts_that_are_searched_together_too(objective: str) -> None:
    lm = language_model("gpt2", dtype=torch.float64)  # Llama's norms compute in float32
    prompts = tokenize_facts(lm.tokenizer, FACTS, CONTEXTS)
    joint = [Joint(torch.tensor([0, 1]), torch.tensor([[0.8, 0.3], [0.1, 0.6]]))]
    settings = replace(SETTINGS, objective=objective)
    draw = torch.Generator().manual_seed(0)

    def losses(delta: torch.Tensor) -> tuple[float, torch.Tensor]:
        search = ValueOptimization(lm, prompts, 1, "mlp", settings, 16, joint)
        for move in (torch.zeros_like(delta), delta):  # the KL term is measured from the first evaluation
            search.delta.data = move.clone()
            found = search.backward()
        return float(found.sum()), search.delta.grad

    start = 0.3 * torch.randn(2, lm.d_model, generator=draw, dtype=torch.float64)
    direction = torch.randn(2, lm.d_model, generator=draw, dtype=torch.float64)
    _, gradient = losses(start)
    ahead, behind = losses(start + 1e-5 * direction)[0], losses(start - 1e-5 * direction)[0]
    assert float((gradient * direction).sum()) == pytest.approx((ahead - behind) / 2e-5, rel=1e-5)


FACT = le.Fact("The capital of {}", "France", "the")


def saying_the() -> le.LanguageModel:
    """A model that continues the text of `FACT` with its target."""
    lm = language_model()
    (token,) = lm.encode([" the"])[0]
    with torch.no_grad():
        state = lm.model.model(torch.tensor([lm.encode([FACT.text])[0]])).last_hidden_state[0, -1]
        lm.model.lm_head.weight[token] += state / lm.d_model**0.5
    return le.LanguageModel(lm.model, lm.tokenizer)


@pytest.mark.parametrize("method", [ROME, MEMIT], ids=["ROME", "MEMIT"])
def test_erasing_lowers_the_probability_that_the_method_would_raise(method: le.Method) -> None:
    lm = saying_the()
    before = score_targets(lm, [FACT.text], ["the"]).nll.neg().exp().item()
    found = {}
    bare = le.ContextSettings(prefixes=())
    method = replace(method, contexts=bare, values=replace(method.values, steps=60))
    for name, one in (("raised", method), ("erased", method.erasing())):
        covariance = covariance_of(lm, one.covariance_places)
        edit = le.edit(lm, [FACT], one, covariance=covariance, settings=le.RunSettings(progress_bar=False))
        (found[name],) = edit.outcomes
        edit.revert(lm)
    assert found["erased"].probability < before < found["raised"].probability
    assert found["erased"].held and not found["erased"].after.startswith(" the")
    assert found["raised"].held and found["raised"].after.startswith(" the")


def test_an_erasure_that_did_not_take_says_so() -> None:
    lm, method = saying_the(), replace(MEMIT.erasing(), lambda_=1e9)
    with pytest.warns(UserWarning, match="still states it: try smaller lambda_") as warned:
        edit = le.edit(lm, [FACT], method, covariance=covariance_of(lm, method.covariance_places))
    (said,) = [str(one.message) for one in warned if "still states" in str(one.message)]
    assert "0 of 1 fact holds (the model's own continuation does not begin with the target)" in said
    assert "passes" not in said and not edit.held


def test_what_waits_for_the_target_cannot_erase() -> None:
    with pytest.raises(le.LightEditError, match="leave stopping out"):
        le.ValueSettings(objective="erase", stopping=le.MostProbable())
    with pytest.raises(le.LightEditError, match="passes"):
        le.MEMIT(layers=(1,), values=SETTINGS, passes=2)
    with pytest.raises(le.LightEditError, match="reach, erase"):
        le.ValueSettings(objective="forget")
    assert le.MEMIT(layers=(1,), passes=2).erasing().passes == 1
