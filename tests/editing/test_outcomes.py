"""Outcomes: what became of each fact and of other prompts, kept with the edit, printed, and the same when resumed."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer

import lightedit as le
from lightedit.data.prompts import ContextSettings
from lightedit.editing.outcomes import GENERIC_PROMPTS, Damage, Observed, Outcome, untouched_prompts
from lightedit.editing.summary import advice, lines_of
from lightedit.lm import Place
from lightedit.lm.batch import pad
from tests.models import tiny_model, tiny_tokenizer
from tests.runs import FACTS, MEMIT, QUIET, covariance_of, run

pytestmark = pytest.mark.filterwarnings("ignore:.*hold \\(the model:UserWarning")

# A random model states the first target after this edit, and the other two not
THREE = [
    le.Fact("The capital of {}", "France", "a"),
    le.Fact("{} is a city in the north of", "Old London Town", "e"),
    le.Fact("The music of {} was", "Mozart", "loud"),
]
STRONG = replace(
    MEMIT,
    lambda_=1e-3,
    contexts=ContextSettings(prefixes=()),
    values=le.ValueSettings(lr=0.5, steps=15, clamp_norm_factor=20.0, kl_factor=0.0, weight_decay=0.0),
)


@pytest.fixture
def lm() -> le.LanguageModel:
    return le.LanguageModel(tiny_model("llama"), tiny_tokenizer("bytelevel"))


def log_probs(lm: le.LanguageModel, ids: list[int]) -> torch.Tensor:
    return lm.forward(pad([ids], lm.pad_id))[0].double().log_softmax(-1)


def continued(lm: le.LanguageModel, text: str) -> str:
    (new,), prompt = lm.generate([text], 12), lm.encode([text])[0]
    return lm.decode([*prompt, *new]).removeprefix(lm.decode(prompt))


def test_an_outcome_is_what_the_model_says_and_how_likely_the_target_is(lm: le.LanguageModel) -> None:
    said = [continued(lm, fact.text) for fact in THREE]
    edit = run(lm, THREE, STRONG, outcomes=True)
    assert [outcome.fact for outcome in edit.outcomes] == THREE
    assert [outcome.held for outcome in edit.outcomes] == [True, False, False]
    for outcome, before in zip(edit.outcomes, said, strict=True):
        fact = outcome.fact
        prompt = len(lm.encode([fact.text])[0])
        ids = lm.encode([f"{fact.text} {fact.target_new}"])[0]
        found = log_probs(lm, ids)
        tokens = range(prompt, len(ids))
        expected = torch.stack([found[place - 1, ids[place]] for place in tokens]).mean().exp()
        ranks = [1 + int((found[place - 1] > found[place - 1, ids[place]]).sum()) for place in tokens]
        assert outcome.probability == pytest.approx(float(expected), rel=1e-4)
        assert outcome.rank == max(ranks)
        assert (outcome.before, outcome.after) == (before, continued(lm, fact.text))
        assert outcome.held == outcome.after.lstrip().startswith(fact.target_new)
        assert outcome.loss is not None and outcome.loss > 0


def test_damage_is_the_kl_of_the_next_token_at_prompts_that_are_not_edited(lm: le.LanguageModel) -> None:
    prompts = untouched_prompts(FACTS)
    before = {prompt: log_probs(lm, lm.encode([prompt])[0])[-1] for prompt in prompts}
    edit = run(lm, outcomes=True)
    assert sorted(row.prompt for row in edit.damage) == sorted(prompts)
    for row in edit.damage:
        now = log_probs(lm, lm.encode([row.prompt])[0])[-1]
        expected = float((now.exp() * (now - before[row.prompt])).sum())
        assert row.kl == pytest.approx(expected, rel=1e-3, abs=1e-6)
        assert row.after == continued(lm, row.prompt)
    assert [row.kl for row in edit.damage] == sorted((row.kl for row in edit.damage), reverse=True)
    assert edit.damage[0].kl > 1e-3


def test_prompts_are_few_whatever_the_number_of_facts_and_none_is_an_edited_one() -> None:
    facts = [le.Fact("{} is", f"land {number}", "old") for number in range(100)]
    facts.append(le.Fact("The weather {} is", "today", "bad"))
    prompts = untouched_prompts(facts)
    assert len(prompts) == len(set(prompts)) == len(GENERIC_PROMPTS) - 1 + 24
    assert not {fact.text for fact in facts} & set(prompts)
    assert "land 0 is known for" in prompts and "land 96 is known for" in prompts
    assert len(untouched_prompts(facts[:1])) == len(GENERIC_PROMPTS) + 2


def test_outcomes_are_saved_and_loaded(lm: le.LanguageModel, tmp_path: Path) -> None:
    edit = run(lm, outcomes=True, facts_per_round=2)
    loaded = le.Edit.load(edit.save(tmp_path / "edit"))
    assert (loaded.outcomes, loaded.damage) == (edit.outcomes, edit.damage)
    assert str(loaded) == str(edit)
    assert loaded.values.keys() == edit.values.keys() == {0, 1}  # later rounds search in edited weights
    assert all(torch.equal(loaded.values[index], edit.values[index]) for index in edit.values)


def test_the_values_of_an_edit_give_the_same_edit_without_a_search(lm: le.LanguageModel) -> None:
    edit = run(lm)
    matrix = lm.weight(Place(1)).clone()
    edit.revert(lm)
    again = run(lm, targets=edit.values)
    assert torch.equal(lm.weight(Place(1)), matrix)
    assert again.record.seconds["values"] < edit.record.seconds["values"]


def test_a_merged_value_is_not_kept_as_a_facts_own(lm: le.LanguageModel) -> None:
    twin = le.Fact("The capital of {} is near", "France", "Madrid")
    edit = run(lm, [*FACTS[:2], twin], on_collision="merge")
    assert edit.values.keys() == {1}


def test_outcomes_can_be_switched_off(lm: le.LanguageModel) -> None:
    edit = run(lm, outcomes=False)
    assert edit.outcomes == () and edit.damage == ()
    assert str(edit) == "MEMIT wrote 5 facts into model, layers [1, 2]"


class Stopped(Exception):
    pass


class StopAfter(Callback):
    """Fails as round `number`, counted from 0, begins."""

    def __init__(self, number: int) -> None:
        self.number = number

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.current_epoch == self.number:
            raise Stopped


@pytest.mark.parametrize("finished", [1, 2])
def test_a_resumed_run_has_the_outcomes_and_values_of_a_whole_one(
    lm: le.LanguageModel, tmp_path: Path, finished: int
) -> None:
    arguments = {"facts": FACTS[:4], "facts_per_round": 2, "outcomes": True}
    whole = run(lm, **arguments)
    whole.revert(lm)
    if finished == 1:
        with pytest.raises(Stopped):
            run(lm, **arguments, checkpoint=tmp_path / "run", callbacks=[StopAfter(1)])
    else:
        run(lm, **arguments, checkpoint=tmp_path / "run").revert(lm)
    resumed = run(lm, **arguments, checkpoint=tmp_path / "run")
    assert (resumed.outcomes, resumed.damage) == (whole.outcomes, whole.damage)
    assert all(torch.equal(resumed.values[index], value) for index, value in whole.values.items())


def test_a_trainer_of_ones_own_asks_with_the_callback(lm: le.LanguageModel) -> None:
    whole = run(lm, facts_per_round=2, outcomes=True)
    whole.revert(lm)
    module = le.EditModule(lm, MEMIT, covariance=covariance_of(lm))
    trainer = Trainer(accelerator="cpu", logger=False, callbacks=[le.Outcomes()], **QUIET)
    trainer.fit(module, datamodule=le.FactsDataModule(FACTS, facts_per_round=2))
    assert module.edit is not None and module.edit.outcomes == whole.outcomes


@pytest.mark.filterwarnings("ignore:stopped in round")
@pytest.mark.parametrize(("on_limit", "kept"), [("stop", 2), ("roll_back", 0)])
def test_a_run_that_a_limit_ends_has_the_outcomes_of_what_was_written(
    lm: le.LanguageModel, on_limit: Any, kept: int
) -> None:
    limits = le.HealthLimits(max_update_norm=1e-6, on_limit=on_limit)
    texts = [[1, 2, 3, 4]]
    edit = run(lm, facts_per_round=2, outcomes=True, callbacks=[le.Health(texts, limits=limits)])
    assert [outcome.fact for outcome in edit.outcomes] == FACTS[:kept]
    assert edit.values.keys() == set(range(kept))


def test_in_a_ruined_model_nothing_holds(lm: le.LanguageModel) -> None:
    observed = Observed(lm, FACTS)

    class Ruin(Callback):
        def on_train_epoch_end(self, *_: Any) -> None:
            lm.weight(Place(3)).fill_(torch.nan)

    with pytest.warns(UserWarning, match="gives NaN or infinity: revert the edit"):
        edit = run(lm, outcomes=True, callbacks=[Ruin()])
    assert not edit.held and edit.damage == ()
    assert edit.outcomes == observed.unknown([outcome.loss for outcome in edit.outcomes])
    assert "(NaN or infinity)" in str(edit)


# What is printed


def outcome(number: int, held: bool, **values: Any) -> Outcome:
    fact = le.Fact("The capital of {} is", f"land {number}", "Rome")
    return Outcome(fact, " Paris", " Rome, a city" if held else " Paris", held, 0.25, 3, **{"loss": 0.04, **values})


def test_facts_that_do_not_hold_come_first_and_many_are_cut_with_a_word() -> None:
    outcomes = tuple(outcome(number, held=number != 40) for number in range(60))
    lines = lines_of(outcomes, (Damage("Dear friend, I", " am", " was", 0.5), Damage("Once", " upon", " upon", 0.1)))
    assert lines[1].startswith("NOT HELD") and "land 40" in lines[1] and "0.25" in lines[1] and "0.04" in lines[1]
    assert lines[2].startswith("holds") and len([line for line in lines if "land" in line]) == 20
    assert "... and 40 more, which hold; edit.outcomes and the report have all" in lines
    assert any(line.startswith("Dear friend, I") and line.endswith("0.5") for line in lines)
    assert max(map(len, lines)) < 130


def test_an_edit_prints_how_many_facts_hold(lm: le.LanguageModel) -> None:
    edit = le.Edit("tiny", "0", facts=[outcome(0, True).fact], outcomes=(outcome(0, True),))
    assert "1 of 1 fact holds" in str(edit) and edit.held
    edit.outcomes = (outcome(0, True), outcome(1, False))
    assert "1 of 2 facts hold" in str(edit) and not edit.held


# Advice


def test_no_advice_where_all_facts_hold() -> None:
    assert advice([outcome(0, True)], MEMIT.to_dict(), [1], "error") is None


def test_a_search_that_ended_too_early_is_told_from_a_weak_edit() -> None:
    outcomes = [outcome(0, True), outcome(1, False), outcome(2, False, loss=5.25)]
    said = advice(outcomes, MEMIT.to_dict(), [3], "keep")
    assert said is not None
    weak, early = said.split("; ")[1:]
    assert "1 of 3 facts hold" in said
    assert "the search reached the target of 'The capital of land 1 is'" in weak
    assert "smaller lambda_ (5), more passes (1)" in weak and "fewer facts at a time (facts_per_round, 3 now)" in weak
    assert "on_collision" not in weak and "steps" not in weak
    assert "the search did not reach the target of 'The capital of land 2 is'" in early and "5.2 nats" in early
    assert "more values.steps (5)" in early and "higher values.lr (0.3)" in early and "lambda_" not in early
    assert "larger values.clamp_norm_factor (2)" in early and "another last layer ([1, 2])" in early


def test_a_share_is_named_instead_of_the_lambda_that_it_replaces() -> None:
    said = advice([outcome(1, False)], replace(MEMIT, share=0.5).to_dict(), [1], "keep")
    assert said is not None and "larger share (0.5)" in said and "lambda_" not in said


def test_facts_about_one_subject_name_the_rule_for_collisions() -> None:
    fact = le.Fact("{} speaks", "land 1", "French")
    outcomes = [outcome(1, False), replace(outcome(1, True), fact=fact)]
    said = advice(outcomes, MEMIT.to_dict(), [2], "merge")
    assert said is not None and "on_collision 'joint' ('merge' now) for facts about one subject" in said
    joint = advice(outcomes, MEMIT.to_dict(), [2], "joint")
    assert joint is not None and "on_collision" not in joint
    assert "facts_per_round" not in said + joint  # a later round would undo the first


def test_a_run_warns_with_its_own_settings_and_stays_silent_where_all_hold(lm: le.LanguageModel) -> None:
    with pytest.warns(UserWarning, match=r"1 of 3 facts hold .* more values.steps \(15\)"):
        run(lm, THREE, STRONG, outcomes=True).revert(lm)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert run(lm, THREE[:1], STRONG, outcomes=True).held


# An edit under another


def test_reverting_an_edit_under_another_says_what_stands_on_top(lm: le.LanguageModel) -> None:
    first, second = run(lm, FACTS[:2]), run(lm, FACTS[2:])
    with pytest.warns(UserWarning, match=f"still carries edit {second.id}"):
        first.revert(lm)
    second.revert(lm)
    first.apply(lm)
    second.apply(lm)
    with pytest.warns(UserWarning, match=f"still carries edit {second.id}"):
        first.revert(lm)


def test_edits_made_apart_are_reverted_in_silence(lm: le.LanguageModel) -> None:
    first = run(lm, FACTS[:2])
    first.revert(lm)
    second = run(lm, FACTS[2:])
    second.revert(lm)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first.apply(lm)
        second.apply(lm)
        first.revert(lm)


# Facts as they are served


def test_a_fact_is_asked_with_its_own_separator(lm: le.LanguageModel) -> None:
    fact = le.Fact('The capital of {} is called "', "France", "a", separator="")
    (outcome,) = run(lm, [fact], STRONG, outcomes=True).outcomes
    found = log_probs(lm, lm.encode([fact.text + "a"])[0])
    assert outcome.probability == pytest.approx(float(found[-2, lm.encode(["a"])[0][-1]].exp()), rel=1e-4)


def test_a_fact_that_is_to_end_the_turn_holds_only_if_nothing_follows(lm: le.LanguageModel) -> None:
    (alone,) = run(lm, [THREE[0]], STRONG, outcomes=True).outcomes
    assert alone.held and alone.after.strip() != "a"
    observed = Observed(lm, [replace(THREE[0], end_turn=True)])
    assert not observed.outcomes([None])[0].held


def test_a_fact_without_a_subject_has_an_outcome_and_generic_prompts(lm: le.LanguageModel) -> None:
    fact = le.Fact("The capital of France", target_new="a")
    edit = run(lm, [fact], STRONG, outcomes=True)
    assert edit.outcomes[0].fact == fact and [row.prompt for row in edit.damage if "France" in row.prompt] == []
    assert len(edit.damage) == len(GENERIC_PROMPTS)


def test_a_prompt_near_the_last_position_has_a_shorter_continuation() -> None:
    lm = le.LanguageModel(tiny_model("llama"), tiny_tokenizer("bytelevel"))
    long = le.Fact("The river of {}" + " a" * 16, "France", "b")
    lm.model.config.max_position_embeddings = length = 4 + len(lm.encode([long.text])[0])
    edit = run(lm, [long, THREE[0]], STRONG, outcomes=True)
    assert [outcome.fact for outcome in edit.outcomes] == [long, THREE[0]]
    rest = continued(le.LanguageModel(tiny_model("llama"), tiny_tokenizer("bytelevel")), long.text)
    assert lm.positions == length and rest != edit.outcomes[0].before and rest.startswith(edit.outcomes[0].before[:2])
    assert edit.damage and all(len(lm.encode([row.prompt])[0]) + 11 <= length for row in edit.damage)
