"""Settings found by trials: what is tried, what is kept, what is chosen."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import lightedit as le
from lightedit.data.prompts import ContextSettings
from lightedit.editing import tuning as module
from lightedit.editing.trials import Trial, Tuning
from lightedit.editing.tuning import tuning, tuning_file
from tests.models import tiny_model, tiny_tokenizer
from tests.runs import assert_unedited, state

FACTS = [
    le.Fact(
        "The capital of {}",
        subject,
        new,
        target_true=true,
        paraphrase_prompts=(f"The city of {subject}",),
        neighborhood_prompts=("The capital of Spain", "The sea near Vienna"),
    )
    for subject, new, true in (("France", "Rome", "Paris"), ("Italy", "Berlin", "Rome"))
]
SETTINGS = le.TuningSettings(facts=2, depths=(0.3, 0.6), clamps=(1.0, 2.0), shares=(0.5, 0.9))


@pytest.fixture
def lm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> le.LanguageModel:
    monkeypatch.setenv("LIGHTEDIT_CACHE", str(tmp_path / "cache"))
    return le.LanguageModel(tiny_model("llama"), tiny_tokenizer("bytelevel"), name="tiny")


def found(lm: le.LanguageModel, settings: le.TuningSettings = SETTINGS, facts=FACTS) -> Tuning:
    return tuning(lm, facts, settings=settings, progress_bar=False)


def trial(held: float, PS: float, NS: float, share: float = 0.5, clamp: float = 1.0) -> Trial:
    return Trial((1, 2), clamp, share, held, PS, NS, NS_before=80.0)


def test_every_depth_and_share_is_tried_and_further_clamps_at_the_best_depth(lm: le.LanguageModel) -> None:
    before = state(lm)
    result = found(lm)
    assert_unedited(lm, before)
    tried = [(t.layers, t.clamp, t.share) for t in result.trials]
    first = [((1,), 1.0), ((2,), 1.0)]  # 4 blocks: a sixth of them is one layer
    assert tried[:4] == [(*one, share) for one in first for share in (0.5, 0.9)]
    best = replace(result, trials=result.trials[:4]).best.layers
    assert tried[4:] == [(best, 2.0, 0.5), (best, 2.0, 0.9)]


def test_one_layer_and_a_sixth_of_the_blocks_are_tried_at_each_depth() -> None:
    lm = le.LanguageModel(tiny_model("llama", layers=12), tiny_tokenizer("bytelevel"))
    windows = module.windows_of(lm, le.TuningSettings(depths=(0.0, 0.3, 0.5)))
    assert windows == {0: [(0,)], 4: [(4,), (3, 4)], 6: [(6,), (5, 6)]}


def test_a_trial_scores_what_an_edit_with_its_settings_does_in_one_pass(lm: le.LanguageModel) -> None:
    result = found(lm)
    covariance = le.estimate_covariance(lm, [1, 2], cache=True, progress_bar=False)
    settings = le.RunSettings(progress_bar=False, outcomes=False)
    for one in result.trials[1::2]:
        method = Tuning(lm.name, lm.fingerprint, SETTINGS, (one,)).method
        assert (method.layers, method.share, method.values.clamp_norm_factor) == (one.layers, one.share, one.clamp)
        assert method.passes == 2
        edit = le.edit(lm, FACTS, replace(method, passes=1), covariance=covariance, settings=settings)
        scores = le.evaluate(lm, FACTS, settings=le.EvaluationSettings(progress_bar=False)).scores
        edit.revert(lm)
        assert (one.held, one.PS, one.NS) == (scores["efficacy_accuracy"], scores["PS"], scores["NS"])


def test_an_interrupted_search_goes_on_after_its_finished_trials(
    lm: le.LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = found(lm)
    path = tuning_file(lm, FACTS, SETTINGS)
    path.unlink()
    evaluate, calls = module.evaluate, 0

    def interrupted(*arguments, **settings):
        nonlocal calls
        calls += 1
        if calls == 4:  # one of the unedited model, then one a trial
            raise KeyboardInterrupt
        return evaluate(*arguments, **settings)

    monkeypatch.setattr(module, "evaluate", interrupted)
    before = state(lm)
    with pytest.raises(KeyboardInterrupt):
        found(lm)
    assert_unedited(lm, before)
    assert len(json.loads(path.read_text())["trials"]) == 2
    assert found(lm) == expected
    assert calls == 4 + 1 + 4  # the two finished trials were not made again
    calls = 100
    assert found(lm) == expected  # read from the cache
    assert calls == 100


def test_the_best_trial_holds_generalises_and_leaves_neighbours_alone() -> None:
    even, forgetful, timid = trial(90, 90, 78), trial(100, 100, 30), trial(40, 50, 80)
    stronger = replace(even, share=0.9)
    result = Tuning("m", "f", SETTINGS, (forgetful, stronger, even, timid))
    assert result.best == even  # of equal ones the one that writes least
    assert trial(100, 100, 90).score == 100  # a neighbourhood score cannot make up for others
    assert trial(100, 100, 72).score == pytest.approx(3 / (1 / 100 + 1 / 100 + 1 / 80))  # a tenth lost counts twice
    assert trial(0, 100, 80).score == 0


def test_a_config_makes_the_same_method(lm: le.LanguageModel, tmp_path: Path) -> None:
    result = found(lm)
    content = yaml.safe_load(result.config("float32"))
    assert content["lm"] == "tiny" and content["dtype"] == "float32"
    settings = content["method"]["init_args"]
    values = settings.pop("values")
    values = le.ValueSettings(**values | {"stopping": le.MostProbable(**values["stopping"])})
    contexts = ContextSettings(**settings.pop("contexts"))
    assert content["method"]["class_path"] == "lightedit.MEMIT"
    assert le.MEMIT(**settings, values=values, contexts=contexts) == result.method


def test_without_facts_those_are_taken_that_the_model_knows_best(lm: le.LanguageModel) -> None:
    settings = replace(SETTINGS, facts=4, depths=(0.3,), clamps=(1.0,), shares=(0.9,))
    assert len(found(lm, settings, None).trials) == 1
    chosen = module.known_facts(lm, 4)
    assert sorted(str(fact.relation) for fact in chosen) == ["capital", "continent", "currency", "language"]
    assert all(fact.neighborhood_prompts for fact in chosen)


def test_edit_without_a_method_takes_the_tuned_one_and_says_so(
    lm: le.LanguageModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "tuning", lambda lm, progress_bar: found(lm))
    edit = le.edit(lm, FACTS[:1])
    assert edit.record.method["share"] == found(lm).method.share
    assert "no method was given: MEMIT at layers" in capsys.readouterr().err


def test_facts_that_cannot_be_scored_and_edited_models_are_refused(lm: le.LanguageModel) -> None:
    with pytest.raises(le.LightEditError, match=r"facts: none has paraphrase_prompts.*leave facts out"):
        found(lm, facts=[replace(fact, paraphrase_prompts=()) for fact in FACTS])
    with pytest.raises(le.LightEditError, match="list is empty"):
        found(lm, facts=[])
    covariance = le.estimate_covariance(lm, [1], progress_bar=False)
    settings = le.RunSettings(progress_bar=False, outcomes=False)
    le.edit(lm, FACTS[:1], le.MEMIT(layers=[1]), covariance=covariance, settings=settings)
    with pytest.raises(le.LightEditError, match=r"carries edits.*revert them first"):
        found(lm)


@pytest.mark.parametrize(
    "wrong", [{"facts": 0}, {"lr": 0.0}, {"depths": (1.0,)}, {"shares": (1.0,)}, {"clamps": ()}, {"clamps": (0.0,)}]
)
def test_settings_out_of_range(wrong: dict) -> None:
    with pytest.raises(le.LightEditError, match=next(iter(wrong))):
        le.TuningSettings(**wrong)
