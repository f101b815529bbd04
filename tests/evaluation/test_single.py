"""Single edits, many at once, against editing, scoring and undoing one fact after the other."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import lightedit as le
from lightedit.data.prompts import ContextSettings
from lightedit.evaluation import single
from lightedit.runs.folder import kept_chunks, locked, remove_run
from tests.models import tiny_model, tiny_tokenizer
from tests.runs import assert_unedited, covariance_of, run, scored, scored_single, state
from tests.sweeps.runs import FACTS, MEMIT, of, sweep

CONTEXTS = ContextSettings(prefixes=(("The", 1, 5), ("I", 1, 5)))
VALUES = le.ValueSettings(lr=0.3, steps=4, clamp_norm_factor=2.0)
PLAIN = {"values": VALUES, "contexts": CONTEXTS}
METHODS = {
    "ROME": le.ROME(layers=(1,), **PLAIN),
    "ROME bare": le.ROME(layers=(1, 2), key="bare", **PLAIN),
    "ROME published": le.ROME(layers=(1,), key="published", **PLAIN),
    "MEMIT": le.MEMIT(layers=(1, 2), lambda_=5.0, **PLAIN),
    "EMMET": le.EMMET(layers=(1, 2), mu=0.1, **PLAIN),
    "PMET": le.PMET(layers=(1, 2), lambda_=5.0, **PLAIN),
    "AlphaEdit": le.AlphaEdit(layers=(1, 2), threshold=0.9, ridge=1.0, **PLAIN),
    "ENCORE": le.ENCORE(
        layers=(1, 2), lambda_=5.0, contexts=CONTEXTS, values=replace(VALUES, stopping=le.MostProbable())
    ),
}  # fmt: skip


@pytest.fixture
def lm() -> le.LanguageModel:
    return le.LanguageModel(tiny_model("llama"), tiny_tokenizer("bytelevel"))


def assert_same_record(found: dict, expected: dict) -> None:
    """The same but for rounding, which differs with a row's place among the others."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, dict):
            assert found[name].keys() == value.keys()
            for same in value.keys() & {"predicted", "prompts"}:
                assert found[name][same] == value[same]
            for of_prompts in value.keys() - {"predicted", "prompts"}:
                assert found[name][of_prompts] == pytest.approx(value[of_prompts], rel=1e-4, abs=1e-4)
        else:
            assert found[name] == (pytest.approx(value, abs=0.01) if isinstance(value, float) else value)


def assert_equal_to_the_loop(lm: le.LanguageModel, method: le.Method, found: le.Evaluation, **kwargs) -> None:
    assert [record["subject"] for record in found.records] == [fact.subject for fact in FACTS]
    for fact, record in zip(FACTS, found.records, strict=True):
        edit = run(lm, [fact], method, covariance=covariance_of(lm))
        (expected,) = scored(lm, [fact], **kwargs).records
        edit.revert(lm)
        assert_same_record(record, expected)


@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
def test_scores_equal_those_of_edit_score_undo(lm: le.LanguageModel, method: le.Method) -> None:
    before = state(lm)
    unedited = scored(lm, FACTS)
    found = scored_single(lm, FACTS, method, covariance_of(lm), batch_size=7, facts_per_chunk=3)
    assert_unedited(lm, before)
    assert_equal_to_the_loop(lm, method, found)
    for record, other in zip(found.records, unedited.records, strict=True):
        assert abs(record["efficacy"]["nll_wanted"][0] - other["efficacy"]["nll_wanted"][0]) > 0.02  # it was edited


def test_each_edit_is_compared_with_the_model_that_it_starts_from(lm: le.LanguageModel) -> None:
    facts = [replace(fact, neighborhood_prompts=(*fact.neighborhood_prompts, "The king is in")) for fact in FACTS]
    method, before = METHODS["MEMIT"], scored(lm, facts)
    found = scored_single(lm, facts, method, covariance_of(lm), before=before)
    expected = []
    for index, fact in enumerate(facts):
        edit = run(lm, [fact], method, covariance=covariance_of(lm))
        alone = replace(before, records=before.records[index : index + 1])
        expected.append(scored(lm, [fact], before=alone).scores["retain_accuracy"])
        edit.revert(lm)
    assert [record["retain_accuracy"] for record in found.records] == expected
    assert 0 < found.scores["retain_accuracy"] < 100 and "success_rate" in found.scores
    with pytest.raises(ValueError, match="before: it evaluated"):
        scored_single(lm, facts[:1], method, covariance_of(lm), before=before)


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "opt"])
def test_other_architectures(architecture: str) -> None:
    lm = le.LanguageModel(tiny_model(architecture), tiny_tokenizer("bytelevel"))
    method = METHODS["MEMIT"]
    found = scored_single(lm, FACTS, method, covariance_of(lm))
    assert_equal_to_the_loop(lm, method, found)


def test_the_edited_models_write_too() -> None:
    lm = le.LanguageModel(tiny_model("llama", dtype=torch.float64), tiny_tokenizer("bytelevel"))
    method = METHODS["MEMIT"]
    found = scored_single(lm, FACTS, method, covariance_of(lm), generate=True)
    assert_equal_to_the_loop(lm, method, found, generate=True)
    assert "GE" in found.scores


def test_a_fact_may_come_twice_and_known_targets_are_used(lm: le.LanguageModel) -> None:
    method, covariance = METHODS["MEMIT"], covariance_of(lm)
    once = scored_single(lm, FACTS[:2], method, covariance)
    twice = scored_single(lm, [*FACTS[:2], FACTS[0]], method, covariance)
    assert_same_record(twice.records[2], twice.records[0])
    assert twice.records[0]["EM"] == pytest.approx(once.records[0]["EM"], abs=0.01)
    known = {0: torch.zeros(lm.d_model)}
    other = scored_single(lm, FACTS[:2], method, covariance, targets=known)
    before, after = ([record["efficacy"]["nll_wanted"][0] for record in found.records] for found in (once, other))
    assert abs(after[0] - before[0]) > 0.02
    assert after[1] == pytest.approx(before[1], abs=1e-4)


def stop_after(monkeypatch: pytest.MonkeyPatch, chunks: int) -> None:
    """Interrupt the next evaluation before it scores chunk number `chunks`, from 0."""
    score, calls = single.score_facts, iter(range(chunks))

    def interrupted(*args, **kwargs):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return score(*args, **kwargs)

    monkeypatch.setattr(single, "score_facts", interrupted)


@pytest.mark.parametrize("generate", [False, True])
def test_an_interrupted_evaluation_goes_on(
    lm: le.LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generate: bool
) -> None:
    def run(checkpoint: Path | None) -> le.Evaluation:
        return scored_single(
            lm, FACTS, METHODS["MEMIT"], covariance_of(lm), facts_per_chunk=2, generate=generate,
            checkpoint=checkpoint,
        )  # fmt: skip

    whole, folder = run(None), tmp_path / "scores.run"
    for chunks in (1, 0, 1):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stop_after(patch, chunks)
            run(folder)
    assert len(kept_chunks(folder)) == 2
    with monkeypatch.context() as patch:
        stop_after(patch, 1)  # nothing that is kept is scored again
        assert run(folder) == whole
    some = [fact for chunk in kept_chunks(folder)[:1] for fact in json.loads(chunk.read_text())["records"]]
    for chunk in kept_chunks(folder)[1:]:
        chunk.unlink()
    again = scored_single(lm, FACTS, METHODS["MEMIT"], covariance_of(lm), facts_per_chunk=5,
                               generate=generate, checkpoint=folder)  # fmt: skip
    assert len(some) == 2 and [again.records[int(i)] == whole.records[int(i)] for i in some] == [True, True]
    assert again.scores == pytest.approx(whole.scores, abs=0.1)
    remove_run(folder)
    assert not folder.exists()


def test_a_folder_of_another_evaluation_or_a_damaged_one_is_refused(
    lm: le.LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, method, covariance = tmp_path / "scores.run", METHODS["MEMIT"], covariance_of(lm)

    def run(lm: le.LanguageModel = lm, facts=FACTS, method=method, **changes) -> le.Evaluation:
        changes = {"facts_per_chunk": 2, "checkpoint": folder} | changes
        return scored_single(lm, facts, method, covariance, **changes)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 1)
        run()
    with pytest.raises(le.ResumeError, match=r"differs in facts;.*choose another folder, or delete this one"):
        run(facts=FACTS[:4])
    with pytest.raises(le.ResumeError, match=r"differs in method.init_args.lambda_|differs in method.lambda_"):
        run(method=replace(method, lambda_=6.0))
    with pytest.raises(le.ResumeError, match="differs in generate"):
        run(generate=True)
    with pytest.raises(le.ResumeError, match="differs in targets"):
        run(targets={0: torch.zeros(lm.d_model)})
    with locked(folder), pytest.raises(le.ResumeError, match="another process"):
        run()
    (chunk,) = kept_chunks(folder)
    chunk.write_text(chunk.read_text()[:-9])
    with pytest.raises(le.ResumeError, match=f"{chunk.name} is truncated or was altered .*delete it"):
        run()
    chunk.unlink()
    assert run(method=replace(method, lambda_=6.0)) != run(checkpoint=None)  # nothing was kept, so nothing is refused


def test_wrong_input_is_refused(lm: le.LanguageModel) -> None:
    with pytest.raises(le.FactError, match="empty"):
        scored_single(lm, [], MEMIT, covariance_of(lm))
    with pytest.raises(ValueError, match="out of range"):
        scored_single(lm, FACTS, replace(MEMIT, layers=(9,)), covariance_of(lm))
    with pytest.raises(le.CovarianceError, match="layer 2"):
        scored_single(lm, FACTS, MEMIT, covariance_of(lm, (1,)))
    for size in ("batch_size", "facts_per_chunk"):
        with pytest.raises(ValueError, match=f"{size} must be at least 1, got 0"):
            scored_single(lm, FACTS, MEMIT, covariance_of(lm), **{size: 0})
    with pytest.raises(ValueError, match="batch_size"):
        le.EvaluationSettings(batch_size=0)


def test_a_sweep_has_rows_of_single_edits(lm: le.LanguageModel, tmp_path: Path) -> None:
    methods = {"MEMIT": MEMIT, "ROME": le.ROME(layers=(1,), values=VALUES, contexts=CONTEXTS)}
    rows = sweep(lm, tmp_path / "s", methods, facts_per_round=[None, "single"])
    for name, method in methods.items():
        expected = scored_single(lm, FACTS, method, covariance_of(lm))
        row = of(rows, method=name, facts_per_round="single")
        assert {score: row[score] for score in ("ES", "PS", "NS", "S")} == pytest.approx(
            {score: expected.scores[score] for score in ("ES", "PS", "NS", "S")}
        )
    assert ",single," in (tmp_path / "s" / "runs.csv").read_text()
    assert sweep(lm, tmp_path / "s", methods, facts_per_round=[None, "single"]) == rows
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == ["runs.csv", "sweep.json", "sweep.svg", "values"]
    with pytest.raises(ValueError, match="'alone' facts cannot be a round"):
        sweep(lm, tmp_path / "t", methods, facts_per_round=["alone"])
