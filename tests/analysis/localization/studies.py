"""A tiny model, facts that it knows, methods and settings of short localisation studies; for tests."""

from dataclasses import replace

import lightedit as le
from lightedit.data.prompts import ContextSettings
from tests.analysis.traces import LAYERS, knowing_model

FACTS = [
    le.Fact(
        "The capital of the {} is in",
        "river",
        "city",
        target_true="the",
        paraphrase_prompts=("I say that the river is in",),
        neighborhood_prompts=("The song of the radio was",),
    ),
    le.Fact(
        "{} is in",
        "The river",
        "north of",
        target_true="the",
        paraphrase_prompts=("It is said that The river is in", "unused"),
        neighborhood_prompts=("The village of the state is in",),
    ),
    le.Fact("In the city {} was", "of the state", "say", target_true="the"),
]
UNKNOWN = le.Fact("The song of the {} was", "radio", "the", target_true="city")
LAYER_NUMBERS = tuple(range(LAYERS))
VALUES = le.ValueSettings(lr=0.5, steps=6, clamp_norm_factor=4.0)
METHODS = {
    "ROME": le.ROME(layers=(0,), values=VALUES, contexts=ContextSettings(prefixes=(("", 2, 4),), bare_weight=None)),
    "MEMIT": le.MEMIT(layers=(0, 1), values=VALUES, contexts=ContextSettings(prefixes=(("The", 1, 5),)), share=0.9),
    "FT": le.FT(layers=(0,), lr=2e-2, epochs=4),
}
SETTINGS = le.LocalizationSettings(
    windows=(3, 1),
    effect_window=1,
    samples=2,
    noise_level=0.5,
    min_probability=0.0,
    continuation_tokens=4,
    essence_texts=2,
    essence_tokens=12,
    facts_per_chunk=2,
    progress_bar=False,
)

__all__ = ["FACTS", "LAYER_NUMBERS", "METHODS", "SETTINGS", "UNKNOWN", "knowing", "with_settings"]


def knowing() -> le.LanguageModel:
    """A tiny model that says "the" to the prompts of these facts."""
    return knowing_model([le.Fact(fact.prompt, fact.subject, "the") for fact in FACTS], logit=7.0)


def with_settings(**changed: object) -> le.LocalizationSettings:
    return replace(SETTINGS, **changed)
