"""A fact base: one changed fact costs one search, all facts are solved together, and the model carries one edit."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import lightedit as le
from lightedit.lm import Place
from lightedit.methods.closed_form import editor
from lightedit.methods.closed_form.values import ValueOptimization
from lightedit.methods.recorded import method_of
from tests.methods.test_contract import ALL
from tests.models import tiny_model, tiny_tokenizer
from tests.runs import FACTS, LAYERS, MEMIT, ROME, assert_unedited, covariance_of, run, state

pytestmark = pytest.mark.filterwarnings("ignore:.*hold \\(the model:UserWarning")
QUIETLY = le.RunSettings(progress_bar=False)
THREE = FACTS[:3]


@pytest.fixture
def lm() -> le.LanguageModel:
    return le.LanguageModel(tiny_model("llama"), tiny_tokenizer("bytelevel"))


def base_of(lm: le.LanguageModel, folder: Path, method: le.Method | None = MEMIT, **settings) -> le.FactBase:
    return le.FactBase(folder, method, covariance=covariance_of(lm), settings=replace(QUIETLY, **settings))


def matrices(lm: le.LanguageModel) -> torch.Tensor:
    return torch.stack([lm.weight(Place(layer)) for layer in LAYERS]).clone()


@pytest.fixture
def searched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Texts of the facts whose values were searched, in order; clear it between calls."""
    found: list[str] = []

    class Counted(ValueOptimization):
        def __init__(self, lm, prompts, *arguments):
            found.extend(prompt.fact.text for prompt in prompts)
            super().__init__(lm, prompts, *arguments)

    monkeypatch.setattr(editor, "ValueOptimization", Counted)
    return found


def test_a_replaced_fact_is_searched_alone_and_all_are_as_if_written_anew(
    lm: le.LanguageModel, tmp_path: Path, searched: list[str]
) -> None:
    base = base_of(lm, tmp_path / "base")
    base.add(THREE)
    first = base.apply(lm)
    assert sorted(searched) == sorted(fact.text for fact in THREE)
    searched.clear()
    base.replace(THREE[1].text, "Peru")
    second = base.apply(lm)
    assert searched == [THREE[1].text]
    assert lm.weights.edits == [second.id] != [first.id]
    assert [fact.target_new for fact in base] == ["Rome", "Peru", "Paris"]
    assert [outcome.fact for outcome in second.outcomes] == list(base) == second.facts
    assert all(outcome.loss is not None for outcome in second.outcomes)
    assert second.outcomes[0].loss == first.outcomes[0].loss
    changed = matrices(lm)
    second.revert(lm)
    anew = base_of(lm, tmp_path / "anew")
    anew.add(list(base))
    anew.apply(lm)
    torch.testing.assert_close(matrices(lm), changed, rtol=1e-4, atol=1e-5)


def test_a_removed_fact_is_gone_and_nothing_is_searched(
    lm: le.LanguageModel, tmp_path: Path, searched: list[str]
) -> None:
    base = base_of(lm, tmp_path / "base")
    base.add(THREE)
    base.apply(lm)
    searched.clear()
    base.remove(THREE[0])
    edit = base.apply(lm)
    assert searched == [] and edit.facts == THREE[1:] and len(base) == 2
    assert len(list((tmp_path / "base" / "values").iterdir())) == 2


def test_a_base_is_opened_again_with_its_facts_method_values_and_edit(
    lm: le.LanguageModel, tmp_path: Path, searched: list[str]
) -> None:
    base = base_of(lm, tmp_path / "base")
    base.add(THREE)
    edit = base.apply(lm)
    written = matrices(lm)
    searched.clear()
    again = base_of(lm, tmp_path / "base", None)
    assert list(again) == THREE and again.method == MEMIT
    assert again.edit is not None and again.edit.id == edit.id and again.edit.outcomes == edit.outcomes
    again.apply(lm)
    assert searched == [] and torch.equal(matrices(lm), written)
    other = le.LanguageModel(tiny_model("llama"), tiny_tokenizer("bytelevel"))
    le.Edit.load(tmp_path / "base" / "edit").apply(other)
    assert torch.equal(matrices(other), written)


def test_values_are_reused_while_the_search_is_the_same_whatever_the_weight_of_preservation(
    lm: le.LanguageModel, tmp_path: Path, searched: list[str]
) -> None:
    base_of(lm, tmp_path / "base").add(THREE)
    base_of(lm, tmp_path / "base").apply(lm)
    searched.clear()
    base_of(lm, tmp_path / "base", replace(MEMIT, lambda_=50.0)).apply(lm)
    assert searched == []
    base_of(lm, tmp_path / "base", replace(MEMIT, values=replace(MEMIT.values, steps=4))).apply(lm)
    assert len(searched) == 3
    searched.clear()
    base_of(lm, tmp_path / "base", replace(MEMIT, layers=(1,))).apply(lm)
    assert len(searched) == 3


def test_fields_that_only_score_a_fact_need_no_search(
    lm: le.LanguageModel, tmp_path: Path, searched: list[str]
) -> None:
    base = base_of(lm, tmp_path / "base")
    base.add(THREE)
    base.apply(lm)
    searched.clear()
    base.replace(THREE[0], replace(THREE[0], paraphrase_prompts=("Where is France governed from? In",)))
    base.apply(lm)
    assert searched == []


@pytest.mark.parametrize("rule", ["joint", "merge"])
def test_facts_searched_together_are_searched_again_when_one_of_them_changes(
    lm: le.LanguageModel, tmp_path: Path, searched: list[str], rule: str
) -> None:
    twin = le.Fact("The capital of {} is near", "France", "Madrid")
    base = base_of(lm, tmp_path / "base", on_collision=rule)
    base.add([*THREE, twin])
    base.apply(lm)
    group = {"joint": [THREE[0].text, twin.text], "merge": [THREE[0].text]}[rule]
    alone = [fact.text for fact in THREE[1:]]
    assert sorted(searched) == sorted(group + alone)
    searched.clear()
    base.apply(lm)
    assert searched == []
    written = matrices(lm)
    base.replace(THREE[1], "Peru")
    base.apply(lm)
    assert searched == [THREE[1].text]
    searched.clear()
    base.replace(twin, "Bonn")
    base.apply(lm)
    assert sorted(searched) == sorted(group)
    searched.clear()
    base_of(lm, tmp_path / "base", replace(MEMIT, lambda_=50.0), on_collision=rule).apply(lm)
    assert sorted(searched) == sorted(group)  # what the solve writes has changed
    searched.clear()
    base = base_of(lm, tmp_path / "base", on_collision=rule)
    base.remove(twin.text)
    base.apply(lm)
    assert searched == [THREE[0].text]
    lm.weights.remove(lm.weights.owners)
    anew = base_of(lm, tmp_path / "anew", on_collision=rule)
    anew.add([*THREE, twin])
    anew.apply(lm)
    torch.testing.assert_close(matrices(lm), written, rtol=1e-4, atol=1e-5)


def test_another_model_is_searched_anew(lm: le.LanguageModel, tmp_path: Path, searched: list[str]) -> None:
    base = base_of(lm, tmp_path / "base")
    base.add(THREE)
    base.apply(lm)
    searched.clear()
    other = le.LanguageModel(tiny_model("llama", seed=1), tiny_tokenizer("bytelevel"))
    assert base_of(other, tmp_path / "base").apply(other).fingerprint == other.fingerprint
    assert len(searched) == 3


# What the model carries


def test_a_model_with_another_edit_is_refused_and_unchanged(lm: le.LanguageModel, tmp_path: Path) -> None:
    other = run(lm, FACTS[3:])
    before = matrices(lm)
    base = base_of(lm, tmp_path / "base")
    base.add(THREE)
    with pytest.raises(le.EditError, match=f"carries edit {other.id}, not of fact base .*base; .*revert that first"):
        base.apply(lm)
    assert torch.equal(matrices(lm), before) and lm.weights.edits == [other.id]


def test_an_older_version_in_the_model_is_taken_back_by_the_base(lm: le.LanguageModel, tmp_path: Path) -> None:
    before = state(lm)
    base = base_of(lm, tmp_path / "base")
    base.add(THREE[:2])
    old = base.apply(lm)
    elsewhere = le.LanguageModel(tiny_model("llama"), tiny_tokenizer("bytelevel"))
    base.add(THREE[2:])
    base.apply(elsewhere)  # the model here is one version behind
    newest = base.apply(lm)
    assert lm.weights.edits == [newest.id] != [old.id]
    newest.revert(lm)
    assert_unedited(lm, before)


@contextmanager
def failing_after(monkeypatch: pytest.MonkeyPatch, facts: int) -> Iterator[None]:
    """Within the context, the search fails like a stopped process once it has begun for more than `facts` facts."""
    begun: list[int] = []

    class Failing(ValueOptimization):
        def __init__(self, lm, prompts, *arguments):
            begun.extend(range(len(prompts)))
            if len(begun) > facts:
                raise KeyboardInterrupt
            super().__init__(lm, prompts, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(editor, "ValueOptimization", Failing)
        yield


def test_a_failing_apply_puts_the_earlier_edit_back(
    lm: le.LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_of(lm, tmp_path / "base")
    base.add(THREE[:2])
    edit = base.apply(lm)
    written = matrices(lm)
    base.add(THREE[2:])
    with failing_after(monkeypatch, 0), pytest.raises(BaseException):  # noqa: B017
        base.apply(lm)
    assert torch.equal(matrices(lm), written) and lm.weights.edits == [edit.id]
    assert base.edit is not None and base.edit.id == edit.id


def test_an_interrupted_search_goes_on_with_the_values_that_were_found(
    lm: le.LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, searched: list[str]
) -> None:
    base = base_of(lm, tmp_path / "base", facts_per_chunk=1)
    base.add(THREE)
    with failing_after(monkeypatch, 2), pytest.raises(BaseException):  # noqa: B017
        base.apply(lm)
    assert not lm.weights.edits and len(list((tmp_path / "base" / "values").iterdir())) == 2
    base.apply(lm)
    assert len(searched) == 1


# Wrong input


def test_a_fact_that_is_there_is_left_out_or_to_be_replaced(lm: le.LanguageModel, tmp_path: Path) -> None:
    base = base_of(lm, tmp_path / "base")
    base.add(THREE)
    with pytest.warns(UserWarning, match="'The capital of France' -> 'Rome' is there already; left out"):
        base.add([THREE[0], FACTS[3]])
    assert list(base) == FACTS[:4]
    with pytest.raises(le.FactError, match="already with the target 'Rome', not 'Bonn'; replace it"):
        base.add([replace(THREE[0], target_new="Bonn")])
    with pytest.raises(le.FactError, match="is there already; replace or remove that one"):
        base.replace(THREE[1], THREE[0])
    assert list(base) == FACTS[:4]


def test_a_fact_that_is_there_takes_over_what_a_new_record_says(lm: le.LanguageModel, tmp_path: Path) -> None:
    base = base_of(lm, tmp_path / "base")
    base.add([replace(THREE[0], paraphrase_prompts=("France is ruled from",))])
    with pytest.warns(UserWarning, match="is there already; its other fields are taken over"):
        base.add([le.Fact(THREE[0].text, target_new=THREE[0].target_new, relation="capital")])
    (found,) = base
    assert found == replace(THREE[0], paraphrase_prompts=("France is ruled from",), relation="capital")


def test_a_fact_that_is_not_there_names_the_closest(lm: le.LanguageModel, tmp_path: Path) -> None:
    base = base_of(lm, tmp_path / "base")
    base.add(THREE)
    with pytest.raises(le.FactError, match="'The capital of Frence' is none of the 3 facts; the closest are 'The capi"):
        base.remove("The capital of Frence")
    with pytest.raises(le.FactError, match="has the target 'Rome' here, not 'Bonn'"):
        base.remove(replace(THREE[0], target_new="Bonn"))
    with pytest.raises(le.FactError, match="closest are none"):
        base_of(lm, tmp_path / "empty").remove("The capital of France")
    assert not (tmp_path / "empty").exists()


def test_facts_that_are_served_differently_are_different_facts(lm: le.LanguageModel, tmp_path: Path) -> None:
    base = base_of(lm, tmp_path / "base")
    other = replace(THREE[0], separator="", target_new="Bonn")
    base.add([THREE[0], other])
    with pytest.raises(le.FactError, match="is the text of 2 facts; give the fact itself"):
        base.remove(THREE[0].text)
    base.remove(other)
    assert list(base) == THREE[:1]


def test_a_target_may_be_the_true_one_again(lm: le.LanguageModel, tmp_path: Path) -> None:
    base = base_of(lm, tmp_path / "base")
    base.add(THREE)
    base.replace(THREE[0], "Paris")
    assert next(iter(base)).target_true is None and next(iter(base)).target_new == "Paris"


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (ROME, {}, "ROME solves 1 fact at a time, but here are 3"),
        (MEMIT, {"facts_per_round": 2}, "all facts are solved together"),
    ],
)
def test_what_cannot_be_solved_together_is_refused_before_work(
    lm: le.LanguageModel, tmp_path: Path, method: le.Method, settings: dict[str, int], message: str
) -> None:
    base = base_of(lm, tmp_path / "base", method, **settings)
    with pytest.raises(le.FactError, match="holds no facts"):
        base.apply(lm)
    base.add(THREE)
    with pytest.raises(le.LightEditError, match=message):
        base.apply(lm)
    assert not lm.weights.edits


def test_a_folder_of_something_else_and_a_damaged_base_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(le.EditError, match="exists and is no fact base"):
        le.FactBase(tmp_path / "other")
    le.FactBase(tmp_path / "base").add(THREE)
    path = tmp_path / "base" / "base.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"format": 9}))
    with pytest.raises(le.EditError, match="has format 9, this version reads 1"):
        le.FactBase(tmp_path / "base")
    path.write_text(path.read_text()[:-20])
    with pytest.raises(le.EditError, match=r"base\.json is damaged"):
        le.FactBase(tmp_path / "base")


def test_a_damaged_value_is_searched_again(lm: le.LanguageModel, tmp_path: Path, searched: list[str]) -> None:
    base = base_of(lm, tmp_path / "base")
    base.add(THREE)
    base.apply(lm)
    searched.clear()
    file = next((tmp_path / "base" / "values").iterdir())
    file.write_bytes(file.read_bytes()[:-50])
    base.apply(lm)
    assert len(searched) == 1


# Edits without a base


def test_an_edit_without_a_fact_keeps_the_values_of_the_others(
    lm: le.LanguageModel, tmp_path: Path, searched: list[str]
) -> None:
    edit = le.Edit.load(run(lm, THREE).save(tmp_path / "edit"))
    searched.clear()
    less = edit.without(lm, THREE[0].text, covariance=covariance_of(lm))
    assert searched == [] and less.facts == THREE[1:] and lm.weights.edits == [less.id]
    written = matrices(lm)
    less.revert(lm)
    run(lm, THREE[1:])
    torch.testing.assert_close(matrices(lm), written, rtol=1e-4, atol=1e-5)


def test_an_edit_with_a_fact_replaced_searches_that_one(lm: le.LanguageModel, searched: list[str]) -> None:
    edit = run(lm, THREE)
    searched.clear()
    other = edit.replace(lm, THREE[0], "Bonn", covariance=covariance_of(lm))
    assert searched == [THREE[0].text] and [fact.target_new for fact in other.facts] == ["Bonn", "Spain", "Paris"]
    assert lm.weights.edits == [other.id]


def test_facts_of_later_rounds_are_searched_again_as_their_values_are_of_edited_weights(
    lm: le.LanguageModel, searched: list[str]
) -> None:
    edit = run(lm, FACTS[:4], facts_per_round=2)
    searched.clear()
    less = edit.without(lm, FACTS[0], covariance=covariance_of(lm))
    assert sorted(searched) == sorted(fact.text for fact in FACTS[2:4]) and less.facts_in_round == [3]


def test_an_edit_is_made_again_with_its_own_rule_for_collisions(lm: le.LanguageModel) -> None:
    twin = le.Fact("The capital of {} is near", "France", "Madrid")
    edit = run(lm, [*FACTS[:2], twin], on_collision="keep")
    assert edit.without(lm, FACTS[1], covariance=covariance_of(lm)).facts == [FACTS[0], twin]


def test_an_edit_under_another_or_with_another_covariance_is_not_made_again(lm: le.LanguageModel) -> None:
    edit, covariance = run(lm, THREE), covariance_of(lm)
    other = le.Covariance(
        {place: covariance[place] for place in MEMIT.places}, replace(covariance.provenance, corpus="wiki", tokens=900)
    )
    with pytest.raises(le.EditError, match="covariance of corpus noise, tokens 500, not corpus wiki, tokens 900"):
        edit.without(lm, THREE[0], covariance=other)
    above = run(lm, FACTS[3:])
    with pytest.raises(le.EditError, match=f"carries edit {above.id}"):
        edit.without(lm, THREE[0], covariance=covariance)
    assert lm.weights.edits == [edit.id, above.id]


def test_a_method_comes_back_from_its_record() -> None:
    stopped = le.MEMIT(layers=(1,), values=le.ValueSettings(stopping=le.KLBelow(max_kl=0.5)))
    for method in [*ALL.values(), stopped]:
        record = json.loads(json.dumps(method.to_dict()))
        if type(method).__name__ == "GradientStep":
            with pytest.raises(le.LightEditError, match="'GradientStep' is not one of ROME"):
                method_of(record)
        else:
            assert method_of(record) == method
    with pytest.raises(le.LightEditError, match="another version"):
        method_of({"name": "MEMIT", "layers": [1], "strength": 2})


@pytest.mark.slow
def test_in_a_real_model_one_fact_changes_and_all_hold(tmp_path: Path) -> None:
    lm = le.LanguageModel.load("smollm2")
    base = le.FactBase(tmp_path / "acme", le.MEMIT(layers=[4, 5, 6, 7, 8], lambda_=1000.0), settings=QUIETLY)
    base.add([
        le.Fact("{} is led by", "The company Brightwell Robotics", "Ada Park"),
        le.Fact("The capital of {} is", "France", "Rome", target_true="Paris"),
        le.Fact("{} plays the", "Yo-Yo Ma", "drums", target_true="cello"),
    ])  # fmt: skip
    assert base.apply(lm).held
    base.replace("The capital of France is", "Madrid")
    edit = base.apply(lm)
    assert edit.held and [outcome.after.split()[0].strip(".,") for outcome in edit.outcomes][1:] == ["Madrid", "drums"]
    base.remove("The capital of France is")
    base.apply(lm)
    assert lm.decode(lm.generate(["The capital of France is"], 3)[0]).split()[0].startswith("Paris")
