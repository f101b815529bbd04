"""Step 1 against the published loop: one fact, full forward, every position."""

from dataclasses import replace

import pytest
import torch

from benchmarks.values import published_value
from lightedit.data.facts import Fact
from lightedit.data.prompts import Contexts, tokenize_facts
from lightedit.lm import LanguageModel
from lightedit.lm.batch import rectangles
from lightedit.methods.closed_form.value_settings import ValueSettings
from lightedit.methods.closed_form.values import optimize_values
from tests.models import ARCHITECTURES, tiny_model, tiny_tokenizer

CONTEXTS = Contexts(("{}", "The river is long. {}", "I think so. {}"), (0.5, 0.25, 0.25))
FACTS = [
    Fact("The capital of {}", "France", "Rome"),
    Fact("{} is a city in the north of", "Old London Town", "Spain and Italy"),
    Fact("It is said that the river {} flows through", "Rhine", "Paris"),
]
SETTINGS = ValueSettings(lr=0.3, steps=8, clamp_norm_factor=2.0)


def language_model(architecture: str, tokenizer: str = "bytelevel", **kwargs) -> LanguageModel:
    return LanguageModel(tiny_model(architecture, **kwargs), tiny_tokenizer(tokenizer))


def published(lm: LanguageModel, fact: Fact, layer: int, site: str, settings: ValueSettings):
    return published_value(lm, fact, CONTEXTS, layer, site, settings)


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("site", ["block", "mlp"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_targets_equal_the_published_loop(architecture: str, site: str) -> None:
    lm = language_model(architecture)
    tolerance = 1e-5 if lm.mlp_norm(1) is None else 3e-5  # gains of up to 300 enlarge float32's rounding
    values = optimize_values(lm, tokenize_facts(lm.tokenizer, FACTS, CONTEXTS), 1, site, SETTINGS)
    for fact, target, steps in zip(FACTS, values.targets, values.steps, strict=True):
        expected = published(lm, fact, 1, site, SETTINGS)
        assert steps == expected.steps_taken == 7
        assert expected.delta.norm() > 0.02 * expected.h0.norm()  # else h0 alone would pass
        if site == "block" and lm.mlp_norm(1) is not None:  # the block's output, then the MLP's
            target, with_delta = target.chunk(2)
            assert relative(with_delta, expected.h0 + expected.delta) < tolerance
        assert relative(target, expected.target) < tolerance


@pytest.mark.parametrize("site", ["block", "mlp"])
def test_a_relative_learning_rate_is_a_share_of_the_activations_root_mean_square(site: str) -> None:
    lm = language_model("llama", dtype=torch.float64)
    settings = replace(SETTINGS, lr=0.2, relative_lr=True)
    values = optimize_values(lm, tokenize_facts(lm.tokenizer, FACTS, CONTEXTS), 1, site, settings)
    sizes = values.initial.square().mean(1).sqrt()
    assert sizes.max() > 1.1 * sizes.min() and (sizes - 1).abs().min() > 0.1  # each fact has a rate of its own
    for fact, target, size in zip(FACTS, values.targets, sizes, strict=True):
        expected = published(lm, fact, 1, site, replace(SETTINGS, lr=0.2 * float(size)))
        assert relative(target - expected.h0, expected.delta) < 1e-5


@pytest.mark.parametrize("max_tokens", [16, 1024])
def test_facts_that_are_done_leave_with_their_own_targets(max_tokens: int) -> None:
    lm = language_model("llama")
    losses = optimize_values(lm, tokenize_facts(lm.tokenizer, FACTS, CONTEXTS), 1, "block", SETTINGS).losses
    settings = replace(SETTINGS, steps=12, loss_threshold=float(losses.sort().values[1]) + 1e-3)
    values = optimize_values(lm, tokenize_facts(lm.tokenizer, FACTS, CONTEXTS), 1, "block", settings, max_tokens)
    assert len(values.steps.unique()) > 1
    for fact, target, steps in zip(FACTS, values.targets, values.steps, strict=True):
        expected = published(lm, fact, 1, "block", settings)
        assert steps == expected.steps_taken
        assert relative(target, expected.target) < 1e-5


def test_padding_and_order_do_not_matter() -> None:
    lm = language_model("gpt2")
    together = optimize_values(lm, tokenize_facts(lm.tokenizer, FACTS, CONTEXTS), 1, "block", SETTINGS)
    alone = [optimize_values(lm, tokenize_facts(lm.tokenizer, [f], CONTEXTS), 1, "block", SETTINGS) for f in FACTS]
    assert relative(together.targets, torch.cat([values.targets for values in alone])) < 1e-5


def test_delta_stays_in_its_ball() -> None:
    lm = language_model("llama")
    settings = replace(SETTINGS, clamp_norm_factor=0.01)
    values = optimize_values(lm, tokenize_facts(lm.tokenizer, FACTS, CONTEXTS), 1, "block", settings)
    share = (values.targets - values.initial).norm(dim=1) / values.initial.norm(dim=1)
    assert torch.allclose(share, torch.tensor(0.01), rtol=1e-3)


def test_a_single_evaluation_takes_no_step() -> None:
    lm = language_model("llama")
    values = optimize_values(lm, tokenize_facts(lm.tokenizer, FACTS, CONTEXTS), 1, "block", replace(SETTINGS, steps=1))
    assert torch.equal(values.targets, values.initial)


def test_nan_in_the_loss_names_the_fact() -> None:
    lm = language_model("llama")
    prompts = tokenize_facts(lm.tokenizer, FACTS, CONTEXTS)
    lm.model.lm_head.weight.data[prompts[1].rows[0].targets[0]] = torch.nan
    with pytest.raises(FloatingPointError, match=r"fact .* (France|Old London Town|Rhine)"):
        optimize_values(lm, prompts, 1, "block", SETTINGS)


@pytest.mark.parametrize("wrong", [{"lr": 0}, {"steps": 0}, {"clamp_norm_factor": 0}, {"kl_factor": -1}])
def test_settings_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ValueSettings(**wrong)


@pytest.mark.parametrize("max_tokens", [10, 100])
def test_rectangles_hold_every_row_once_and_little_padding(max_tokens: int) -> None:
    lengths = [0, 1, 2, 2, 8, 1, 3, 8, 8, 40] * 7
    groups = rectangles(lengths, max_tokens)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[i] for i in group) <= max_tokens


def test_rectangles_pad_only_where_a_pass_costs_more() -> None:
    assert len(rectangles([2] * 10 + [3] * 10, 1000)) == 1
    assert len(rectangles([2] * 50 + [9] * 50, 1000)) == 2
