"""Step 1 against the published loop: one fact, full forward, every position."""

import pytest
import torch

from lightedit.data.facts import Fact
from lightedit.data.prompts import Contexts, tokenize_facts
from lightedit.lm import LanguageModel
from lightedit.values import ValueSettings, optimize_values
from tests.models import ARCHITECTURES, tiny_model, tiny_tokenizer
from tests.reference import published_values

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
    return published_values(
        lm.model,
        lm.tokenizer,
        fact.prompt,
        fact.subject,
        fact.target_new,
        list(CONTEXTS.templates),
        layer,
        site,
        lr=settings.lr,
        steps=settings.steps,
        clamp_norm_factor=settings.clamp_norm_factor,
        kl_factor=settings.kl_factor,
        weight_decay=settings.weight_decay,
        loss_threshold=settings.loss_threshold,
    )


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("site", ["block", "mlp"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_targets_equal_the_published_loop(architecture: str, site: str) -> None:
    lm = language_model(architecture)
    values = optimize_values(lm, tokenize_facts(lm.tokenizer, FACTS, CONTEXTS), 1, site, SETTINGS)
    for fact, target, steps in zip(FACTS, values.targets, values.steps, strict=True):
        expected = published(lm, fact, 1, site, SETTINGS)
        assert steps == expected.steps_taken == 7
        assert expected.delta.norm() > 0.02 * expected.h0.norm()  # else h0 alone would pass
        assert relative(target, expected.target) < 1e-5
