"""Further passes over a round: what still lacks is searched again in the edited model, and nothing else changes."""

from dataclasses import replace

import pytest
import torch

import lightedit as le
from lightedit.data.prompts import ContextSettings
from lightedit.errors import ArgumentError
from lightedit.lm import Place
from lightedit.lm.changes import LowRankUpdate
from lightedit.methods.closed_form import editor as editor_module
from lightedit.methods.closed_form.editor import ClosedFormEditor
from lightedit.methods.closed_form.method import ClosedForm
from lightedit.methods.closed_form.passes import FurtherPasses
from lightedit.methods.closed_form.values import ValueOptimization
from lightedit.methods.protocol import EditorSettings, search
from tests.models import tiny_model, tiny_tokenizer
from tests.runs import covariance_of, run, scored_single

FACTS = [  # the key is that of the last token, and the target is one token
    le.Fact(prompt, subject, target)
    for prompt, subject, target in (
        ("The capital of {}", "France", "the"),
        ("In the north of {}", "Old London Town", "of"),
        ("Along the river {}", "Rhine", "a"),
        ("The music of {}", "Mozart", "in"),
        ("The language of {}", "A girl from Peru", "and"),
    )
]
VALUES = le.ValueSettings(lr=0.3, steps=30, clamp_norm_factor=1.0, kl_factor=0.0, weight_decay=0.0, relative_lr=True)
ONE = le.MEMIT(layers=(0, 1, 2), values=VALUES, contexts=ContextSettings(prefixes=()), share=0.6)
MORE = replace(ONE, passes=3)
ALL = list(range(len(FACTS)))


def model(architecture: str = "llama", dtype: torch.dtype = torch.float64) -> le.LanguageModel:
    return le.LanguageModel(tiny_model(architecture, dtype=dtype), tiny_tokenizer("bytelevel"))


def written(lm: le.LanguageModel, method: le.Method, facts: list[le.Fact] = FACTS) -> ClosedFormEditor:
    """The editor after it has written one round on behalf of ("x", 0)."""
    settings = EditorSettings(on_collision="keep")
    editor = method.editor(lm, covariance=covariance_of(lm, method.covariance_places), settings=settings)
    assert isinstance(editor, ClosedFormEditor)
    indices = range(len(facts))
    editor.prepare(facts, [list(indices)])
    search(editor, indices, editor.make_optimizer())
    editor.write(indices, ("x", 0))
    return editor


def optimization(lm: le.LanguageModel, method: ClosedForm, prompts: list) -> ValueOptimization:
    return ValueOptimization(lm, prompts, method.value_layer, method.site, method.values)


def lacking(lm: le.LanguageModel, method: ClosedForm, prompts: list) -> list[int]:
    """Facts with a target token that is not the most probable one in some context."""
    found = optimization(lm, method, prompts)
    found.backward()
    return (~found.most_probable).nonzero().flatten().tolist()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gptj", "olmo2"])
def test_further_passes_make_facts_hold_that_one_pass_does_not_reach(architecture: str) -> None:
    lm = model(architecture)
    first = written(lm, ONE)
    after_one = lacking(lm, ONE, first.prompts)
    lm.weights.remove([("x", 0)])
    written(lm, MORE)
    after_more = lacking(lm, ONE, first.prompts)
    assert len(after_one) >= 1 and len(after_more) < len(after_one)


def test_a_second_pass_is_a_second_edit_of_the_edited_model() -> None:
    lm = model()
    facts = [replace(fact, target_new="to") for fact in FACTS[2:]]
    first = written(lm, replace(ONE, share=0.1), facts)
    assert lacking(lm, ONE, first.prompts) == [0, 1, 2]  # else the pass leaves those out that hold
    second = first.method.editor(lm, covariance=first.covariance, settings=first.settings)
    second.prepare(facts, [[0, 1, 2]], like=first)
    search(second, range(3), second.make_optimizer())
    second.write(range(3), ("x", 1))
    assert len(lacking(lm, ONE, first.prompts)) < 3
    by_hand = {place: lm.weight(place).clone() for place in ONE.places}
    lm.weights.remove([("x", 0), ("x", 1)])
    again = written(lm, replace(ONE, share=0.1, passes=2), facts)
    for place in ONE.places:
        torch.testing.assert_close(lm.weight(place), by_hand[place], rtol=1e-9, atol=1e-12)
    assert again.losses == pytest.approx(second.losses)


def test_one_change_a_place_is_kept_and_taken_back_bit_for_bit() -> None:
    lm = model(dtype=torch.float32)
    before = {place: lm.weight(place).clone() for place in ONE.places}
    edit = run(lm, FACTS, MORE, on_collision="keep")
    for place, change in edit.rounds[0].items():
        torch.testing.assert_close(lm.weight(place) - before[place], change.dense(), rtol=1e-4, atol=1e-5)
    live = {place: lm.weight(place).clone() for place in ONE.places}
    edit.revert(lm)
    assert all(torch.equal(lm.weight(place), before[place]) for place in ONE.places)
    edit.apply(lm)
    assert all(torch.equal(lm.weight(place), live[place]) for place in ONE.places)


def test_a_round_that_holds_after_its_first_pass_stays_bit_for_bit() -> None:
    lm = model(dtype=torch.float32)
    method = replace(ONE, values=replace(VALUES, lr=1.0, clamp_norm_factor=10.0))
    first = written(lm, method)
    assert not lacking(lm, method, first.prompts)
    one = {place: lm.weight(place).clone() for place in ONE.places}
    lm.weights.remove([("x", 0)])
    more = written(lm, replace(method, passes=3))
    assert all(torch.equal(lm.weight(place), one[place]) for place in ONE.places)
    assert more.losses == first.losses


def test_a_pass_that_does_not_help_is_taken_back_and_is_the_last_one() -> None:
    lm = model(dtype=torch.float32)
    first = written(lm, ONE)
    assert lacking(lm, ONE, first.prompts)
    one = {place: lm.weight(place).clone() for place in ONE.places}
    written_before = {place: lm.weights.change(place) for place in ONE.places}
    calls: list[torch.Tensor] = []

    def spoil(targets: torch.Tensor) -> dict[Place, LowRankUpdate]:
        calls.append(targets)
        noise = {place: LowRankUpdate(torch.randn(shape[0], 1), torch.randn(shape[1], 1)) for place, shape in shapes}
        for place, change in noise.items():
            lm.weights.add(("x", 0), place, change)
        return noise

    shapes = [(place, lm.weight(place).shape) for place in ONE.places]
    torch.manual_seed(0)
    passes = FurtherPasses(lm, ("x", 0), lambda: optimization(lm, ONE, first.prompts), spoil, lambda search: None)
    assert passes.run(written_before, 5) == written_before
    assert len(calls) == 1 and not passes.losses
    for place in ONE.places:
        torch.testing.assert_close(lm.weight(place), one[place], rtol=0, atol=1e-6)


def test_facts_that_hold_ask_for_no_change(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = model()
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    write_facts = editor_module.write_facts

    def kept(lm, method, preservation, prompts, targets, owner):
        present = optimization(lm, method, prompts)
        present.backward()
        seen.append(((targets.T - present.initial).norm(dim=1), present.most_probable))
        return write_facts(lm, method, preservation, prompts, targets, owner)

    monkeypatch.setattr(editor_module, "write_facts", kept)
    written(lm, MORE)
    assert len(seen) > 1 and seen[0][0].min() > 0
    moved, holds = seen[1]
    assert holds.any() and not holds.all()
    assert moved[holds].max() < 1e-9 and moved[~holds].min() > 1e-3


def test_progress_grows_while_a_round_is_written_again() -> None:
    lm = model()
    editor = MORE.editor(lm, covariance=covariance_of(lm, MORE.covariance_places))
    editor.prepare(FACTS, [ALL])
    found: list[float] = []
    editor.watch = lambda: found.append(editor.facts_found)
    search(editor, ALL, editor.make_optimizer())
    assert editor.facts_found == len(FACTS) / 2
    editor.write(ALL, ("x", 0))
    assert found and found[0] >= len(FACTS) / 2 and max(found) <= len(FACTS)
    assert found[:20] == sorted(found[:20])


def test_facts_edited_each_alone_take_their_passes_too() -> None:
    lm = model()
    covariance = covariance_of(lm, ONE.covariance_places)
    one, more = (scored_single(lm, FACTS, method, covariance) for method in (ONE, MORE))
    assert more.scores["efficacy_accuracy"] > one.scores["efficacy_accuracy"]
    assert not lm.weights.edits


@pytest.mark.parametrize("passes", [0, -1])
def test_passes_below_one_are_refused(passes: int) -> None:
    with pytest.raises(ArgumentError, match=f"passes must be at least 1, got {passes}"):
        replace(ONE, passes=passes)
