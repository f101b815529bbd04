"""The engine on the built-in pretrained model."""

import pytest
import torch

import lightedit as le
from benchmarks.published import published_values
from lightedit.data.prompts import Contexts, ContextSettings, tokenize_facts
from lightedit.methods.closed_form.values import optimize_values
from lightedit.metrics import score_targets
from tests.runs import run, scored

FACTS = [
    le.Fact("The capital of {} is", "France", "Rome", target_true="Paris"),
    le.Fact("The mother tongue of {} is", "Danielle Darrieux", "English", target_true="French"),
    le.Fact("{} was created in the country of", "Toyota Corolla", "Germany", target_true="Japan"),
]


@pytest.fixture(scope="module")
def lm() -> le.LanguageModel:
    try:
        return le.LanguageModel.load("smollm2", dtype="float32", device="cpu")
    except RuntimeError as error:
        pytest.skip(f"the built-in model cannot be had: {error}")


def assert_published(lm: le.LanguageModel, contexts: Contexts, settings: le.ValueSettings) -> None:
    values = optimize_values(lm, tokenize_facts(lm.tokenizer, FACTS, contexts), 8, "block", settings)
    for fact, target in zip(FACTS, values.targets, strict=True):
        expected = published_values(
            lm.model, lm.tokenizer, fact.prompt, fact.subject, fact.target_new, list(contexts.templates), 8, "block",
            lr=settings.lr, steps=settings.steps, clamp_norm_factor=settings.clamp_norm_factor,
            kl_factor=settings.kl_factor, weight_decay=settings.weight_decay, loss_threshold=settings.loss_threshold,
        ).target  # fmt: skip
        assert (target - expected).norm() < 1e-4 * expected.norm()


def test_it_knows_and_continues_facts(lm: le.LanguageModel) -> None:
    assert lm.decode(lm.generate([FACTS[0].text], 1)[0]).strip() == "Paris"
    assert scored(lm, FACTS[:1]).scores["ES"] == 0


def test_targets_equal_the_published_loop_for_a_few_steps(lm: le.LanguageModel) -> None:
    assert_published(lm, Contexts(("{}", "It was long ago. {}"), (0.5, 0.5)), le.ValueSettings(steps=4))


@pytest.mark.slow
def test_targets_equal_the_published_loop(lm: le.LanguageModel) -> None:
    assert_published(lm, ContextSettings().sample(lm), le.ValueSettings())


@pytest.mark.slow
@pytest.mark.parametrize("method", [le.MEMIT(layers=(4, 5, 6, 7, 8), lambda_=1000.0), le.ROME(layers=(5,))])
def test_facts_are_edited_saved_and_undone(lm: le.LanguageModel, method: le.Method, tmp_path) -> None:
    before = {name: parameter.clone() for name, parameter in lm.model.named_parameters()}
    covariance = le.estimate_covariance(lm, [4, 5, 6, 7, 8], cache=True, progress_bar=False)
    edit = run(lm, FACTS, method, covariance=covariance)
    assert scored(lm, FACTS).scores["ES"] == 100
    batch = lm.tokenizer([fact.text for fact in FACTS], return_tensors="pt", padding=True)
    logits = lm.model(**batch).logits
    edit.save(tmp_path / "edit")
    edit.revert(lm)
    for name, parameter in lm.model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    saved = le.Edit.load(tmp_path / "edit")
    saved.apply(lm)
    assert torch.equal(lm.model(**batch).logits, logits)
    saved.revert(lm)


AS_SERVED = [
    le.Fact('The capital city of {} is called "', "France", "Rome", separator=""),
    le.Fact("{}的首都是", "法国", "罗马", separator=""),
    le.Fact("What is the capital of {}?", "France", "Rome", chat=True, end_turn=True),
    le.Fact("The capital of France is", target_new="New Rome"),
]


@pytest.mark.slow
@pytest.mark.parametrize("fact", AS_SERVED, ids=lambda fact: fact.text)
def test_a_fact_is_said_as_it_is_served(lm: le.LanguageModel, fact: le.Fact) -> None:
    """Mean probability per token; with `end_turn`, generation ends behind the target."""
    covariance = le.estimate_covariance(lm, [4, 5, 6, 7, 8], cache=True, progress_bar=False)
    edit = run(lm, [fact], le.MEMIT(layers=(4, 5, 6, 7, 8), lambda_=100.0), covariance=covariance)
    nll = score_targets(lm, [fact.text], [fact.target_new], servings=[fact.serving]).nll
    said = lm.complete(fact.text, chat=fact.chat)
    edit.revert(lm)
    assert float(nll.neg().exp()) > 0.5
    assert said == fact.target_new if fact.end_turn else said.strip().startswith(fact.target_new)
