"""Quick runs of a tiny model that several test modules start from: settings, facts, statistics and checks."""

from collections.abc import Sequence
from dataclasses import fields

import torch

import lightedit as le
from lightedit.data.prompts import ContextSettings
from lightedit.editing.run import prepare
from lightedit.lm import Place
from lightedit.statistics.covariance import Provenance

QUIET = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
LAYERS = (1, 2)
VALUES = le.ValueSettings(lr=0.3, steps=5, clamp_norm_factor=2.0)
CONTEXTS = ContextSettings(prefixes=(("The", 1, 5), ("I", 1, 5)))
MEMIT = le.MEMIT(layers=LAYERS, values=VALUES, contexts=CONTEXTS, lambda_=5.0)
ROME = le.ROME(layers=(1,), values=VALUES, contexts=ContextSettings(prefixes=(("", 2, 4),), bare_weight=None))
FACTS = [
    le.Fact(
        "The capital of {}", "France", "Rome", target_true="Paris", paraphrase_prompts=("France has its capital in",)
    ),
    le.Fact("{} is a city in the north of", "Old London Town", "Spain", target_true="England"),
    le.Fact("It is said that the river {} flows through", "Rhine", "Paris", target_true="Bonn"),
    le.Fact("The music of {} was", "Mozart", "loud", target_true="quiet"),
    le.Fact("{} speaks the language", "A girl from Peru", "French", target_true="Spanish"),
]


def covariance_of(lm: le.LanguageModel, places: Sequence[int | Place] = LAYERS) -> le.Covariance:
    moments = {}
    for place in (Place(place) if isinstance(place, int) else place for place in places):
        generator = torch.Generator().manual_seed(place.layer)
        keys = torch.randn(500, lm.weight(place).shape[1], generator=generator)
        moments[place] = keys.T @ keys / 500
    return le.Covariance(moments, Provenance(lm.name, lm.fingerprint, "noise", 500, 8, "float32"))


def state(lm: le.LanguageModel) -> dict[str, torch.Tensor]:
    return {name: parameter.clone() for name, parameter in lm.model.named_parameters()}


def assert_unedited(lm: le.LanguageModel, before: dict[str, torch.Tensor]) -> None:
    assert not lm.weights.owners
    for name, parameter in lm.model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def run(lm: le.LanguageModel, facts=FACTS, method=MEMIT, *, covariance=None, **arguments) -> le.Edit:
    """Edit quietly, without outcomes; settings of a run stand beside the other arguments."""
    names = {field.name for field in fields(le.RunSettings)}
    settings = {name: arguments.pop(name) for name in names & arguments.keys()}
    covariance = covariance or covariance_of(lm, method.covariance_places)
    settings = le.RunSettings(**{"progress_bar": False, "outcomes": False, **settings})
    if (targets := arguments.pop("targets", None)) is not None:
        arguments["prepared"] = prepare(lm, facts, method, covariance=covariance, settings=settings)
        arguments["prepared"].give(targets)
    return le.edit(lm, facts, method, covariance=covariance, settings=settings, **arguments)


def scored(lm: le.LanguageModel, facts, *, before=None, held_out=(), references=None, checkpoint=None, **settings):
    """Evaluate quietly; settings of the evaluation stand beside the other arguments."""
    chosen = le.EvaluationSettings(**{"progress_bar": False, **settings})
    return le.evaluate(
        lm, facts, settings=chosen, before=before, held_out=held_out, references=references, checkpoint=checkpoint
    )


def scored_single(lm: le.LanguageModel, facts, method, covariance, **arguments) -> le.Evaluation:
    """Score single edits quietly; settings of the evaluation, and known targets, stand beside the other arguments."""
    names = {field.name for field in fields(le.EvaluationSettings)}
    settings = {name: arguments.pop(name) for name in names & arguments.keys()}
    if (targets := arguments.pop("targets", None)) is not None:
        arguments["prepared"] = method.editor(lm, covariance=covariance)
        arguments["prepared"].prepare(facts, None)
        arguments["prepared"].give(targets)
    settings = le.EvaluationSettings(**{"progress_bar": False, **settings})
    return le.evaluate_single(lm, facts, method, covariance=covariance, settings=settings, **arguments)
