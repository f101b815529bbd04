"""Fine-tuning in rounds: EWC, and retraining from the unedited weights."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning import Callback

import lightedit as le
from lightedit.data.prompts import Contexts, tokenize_facts
from lightedit.lm import Place
from lightedit.statistics.fisher import fisher_information
from tests.methods.finetuning.test_ft import changes, close, loss_of, model, parameter
from tests.runs import FACTS, run, state

PLACES = [Place(1, "mlp_in"), Place(1), Place(2)]
STEPS = {"lr": 1e-2, "epochs": 4}


def rounds(lm: le.LanguageModel, method: le.Method, size: int = 1, facts: list[le.Fact] = FACTS) -> le.Edit:
    return run(lm, facts, method, covariance=None, facts_per_round=size)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_fisher_information_is_the_mean_of_squared_gradients_of_single_facts(architecture: str) -> None:
    lm = model(architecture)
    found = fisher_information(lm, tokenize_facts(lm.tokenizer, FACTS, Contexts()), PLACES)
    for place in PLACES:
        weight = parameter(lm, place).requires_grad_()
        squares = [torch.autograd.grad(loss_of(lm, [fact]), weight)[0].square() for fact in FACTS]
        weight.requires_grad_(False)
        expected = sum(squares) / len(FACTS)
        close(found[place], expected.T if architecture == "gpt2" else expected, 1e-9)


def test_without_weight_or_earlier_facts_ewc_is_fine_tuning() -> None:
    lm, other = model(), model()
    plain = rounds(lm, le.FT(layers=[1], **STEPS))
    free = rounds(other, le.EWC(layers=[1], **STEPS, lambda_=0.0))
    held = rounds(model(), le.EWC(layers=[1], **STEPS, lambda_=1e6))
    for one, two, three in zip(plain.rounds, free.rounds, held.rounds, strict=True):
        assert torch.equal(one[Place(1)].weight, two[Place(1)].weight)
        first = one is plain.rounds[0]
        assert torch.equal(one[Place(1)].weight, three[Place(1)].weight) == first


def test_ewc_holds_the_weights_that_the_latest_earlier_facts_depend_on() -> None:
    lm = model()
    method = le.EWC(layers=[1], lr=1e-2, epochs=3, lambda_=50.0, last=2)
    edit = rounds(lm, method, facts=FACTS[:4])
    last = edit.rounds[-1][Place(1)].weight
    lm.weights.remove([edit.owner(3)])  # the weights before the last round
    prompts = tokenize_facts(lm.tokenizer, FACTS[1:3], Contexts())
    fisher = fisher_information(lm, prompts, [Place(1)])[Place(1)]
    weight = parameter(lm, Place(1))
    start = weight.detach().clone()
    weight.requires_grad_()
    adam = torch.optim.Adam([weight], lr=1e-2)
    for _ in range(3):
        adam.zero_grad()
        (loss_of(lm, [FACTS[3]]) + 50.0 * (fisher * (weight - start).square()).sum()).backward()
        adam.step()
    close(last, weight.detach() - start)


def test_retraining_once_is_training_on_all_facts_from_the_unedited_weights() -> None:
    lm = model()
    method = le.Retrain(layers=[1], **STEPS, every=4, passes=3)
    edit = rounds(lm, method, facts=FACTS[:4])
    plain = rounds(model(), le.FT(layers=[1], **STEPS), facts=FACTS[:4])
    for one, two in zip(edit.rounds[:3], plain.rounds[:3], strict=True):
        assert torch.equal(one[Place(1)].weight, two[Place(1)].weight)
    together = changes(model(), le.FT(layers=[1], lr=1e-2, epochs=3), FACTS[:4])[Place(1)].weight
    close(sum(each[Place(1)].weight for each in edit.rounds), together, 1e-9)
    close(lm.weight(Place(1)) - model().weight(Place(1)), together, 1e-9)


def test_retraining_after_every_fact_with_one_fact_is_fine_tuning() -> None:
    method = le.Retrain(layers=[1], lr=1e-2, every=1, passes=4)
    one = rounds(model(), method, facts=FACTS[:1]).rounds[0][Place(1)].weight
    assert torch.equal(one, changes(model(), le.FT(layers=[1], **STEPS), FACTS[:1])[Place(1)].weight)


def test_retraining_may_be_on_the_latest_facts_only() -> None:
    method = le.Retrain(layers=[1], lr=1e-2, epochs=2, every=4, passes=3, last=2)
    edit = rounds(model(), method, size=2, facts=FACTS[:4])
    latest = changes(model(), le.FT(layers=[1], lr=1e-2, epochs=3), FACTS[2:4])[Place(1)].weight
    close(sum(each[Place(1)].weight for each in edit.rounds), latest, 1e-9)


def test_retraining_needs_a_model_without_other_edits() -> None:
    lm = model()
    rounds(lm, le.FT(layers=[2], **STEPS))
    before = state(lm)
    with pytest.raises(le.LightEditError, match=r"carries edits.*Retrain starts again from the unedited weights"):
        rounds(lm, le.Retrain(layers=[1]))
    with pytest.raises(le.LightEditError, match="every: 1 retrains after every fact"):
        le.evaluate_single(model(), FACTS, le.Retrain(layers=[1], every=1))
    for name, each in lm.model.named_parameters():
        assert torch.equal(each, before[name])


@pytest.mark.parametrize("method", [le.EWC, le.Retrain])
def test_what_does_not_run_as_published_is_refused(method: type[le.Method]) -> None:
    with pytest.raises(le.LightEditError, match="published"):
        method(layers=[1], published=True)


def test_a_resumed_run_knows_the_facts_of_earlier_rounds(tmp_path: Path) -> None:
    method = le.EWC(layers=[1], **STEPS, lambda_=50.0)
    whole = rounds(model(), method)

    class Killed(Exception):
        pass

    class Kill(Callback):
        def on_train_epoch_start(self, trainer, *_):
            if trainer.current_epoch == 3:
                raise Killed

    with pytest.raises(Killed):
        run(model(), FACTS, method, covariance=None, facts_per_round=1, checkpoint=tmp_path / "run", callbacks=[Kill()])
    resumed = run(model(), FACTS, method, covariance=None, facts_per_round=1, checkpoint=tmp_path / "run")
    for one, two in zip(whole.rounds, resumed.rounds, strict=True):
        assert torch.equal(one[Place(1)].weight, two[Place(1)].weight)
    other = rounds(model(), replace(method, last=1))
    assert not torch.equal(other.rounds[3][Place(1)].weight, whole.rounds[3][Place(1)].weight)
