"""Fine-tuning of classifiers and encoder-decoders: against plain loops of autograd, and the contract of all methods."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import lightedit as le
from lightedit.lm import Place
from lightedit.runs.folder import kept_rounds
from tests.kinds import arguments, facts_for, other_model
from tests.methods.test_contract import QUIETLY, StopAfter, Stopped, run
from tests.models import OTHER_KINDS
from tests.runs import assert_unedited, state

EVERY = pytest.mark.parametrize("name", list(OTHER_KINDS))
METHODS: dict[str, le.Method] = {
    "FT": le.FT(layers=(1,), lr=1e-2, epochs=6, norm=0.05),
    "FT, all of two blocks": le.FT(layers=(0, 2), lr=1e-2, epochs=3, parts="block", order="depth"),
    "EWC": le.EWC(layers=(1, 2), lr=1e-2, epochs=4, lambda_=50.0),
    "Retrain": le.Retrain(layers=(2,), lr=1e-2, epochs=4, every=3),
}
METHOD = pytest.mark.parametrize("method", list(METHODS.values()), ids=list(METHODS))


def precise(name: str) -> le.LanguageModel:
    """A tiny model in float64: Adam turns rounding errors of a gradient near 0 into steps of full size."""
    return other_model(name, torch.float64)


def of_module(lm: le.LanguageModel, place: Place) -> torch.nn.Parameter:
    return lm.model.get_parameter(f"{lm.module_name(place)}.weight")


def mean_loss(lm: le.LanguageModel, facts: Sequence[le.Fact]) -> Tensor:
    """The mean of transformers' own loss of each fact, alone in its pass."""
    return torch.stack([lm.model(**arguments(lm, fact)).loss for fact in facts]).mean()


def plain_training(
    lm: le.LanguageModel,
    facts: Sequence[le.Fact],
    places: Sequence[Place],
    lr: float,
    epochs: int,
    norm: float | None = None,
    fisher: Mapping[Place, Tensor] | None = None,
) -> dict[Place, Tensor]:
    """ΔW of full-batch Adam on the matrices of `places`; the model's weights are as before afterwards."""
    weights = {place: of_module(lm, place) for place in places}
    start = {place: weight.detach().clone() for place, weight in weights.items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    adam = torch.optim.Adam(weights.values(), lr=lr)
    for _ in range(epochs):
        adam.zero_grad()
        loss = mean_loss(lm, facts)
        for place, importance in (fisher or {}).items():
            loss = loss + (importance * (weights[place] - start[place]).square()).sum()
        loss.backward()
        adam.step()
        if norm is not None:
            for place, weight in weights.items():
                weight.data = torch.clamp(weight.data, start[place] - norm, start[place] + norm)
    found = {place: weight.detach() - start[place] for place, weight in weights.items()}
    for place, weight in weights.items():
        weight.requires_grad_(False)
        weight.grad = None
        weight.data = start[place]
    return found


def assert_changes(edit: le.Edit, round_: int, expected: Mapping[Place, Tensor]) -> None:
    assert edit.rounds[round_].keys() == expected.keys()
    for place, change in expected.items():
        found = edit.rounds[round_][place].tensors()["weight"]
        assert (found - change).norm() < 1e-6 * change.norm(), (place, found.norm(), change.norm())


@EVERY
@pytest.mark.parametrize("layers", [(0,), (1, 2)], ids=["first", "two"])
@pytest.mark.parametrize("norm", [None, 0.02], ids=["free", "bounded"])
def test_ft_equals_a_plain_loop(name: str, layers: tuple[int, ...], norm: float | None) -> None:
    lm = precise(name)
    method = le.FT(layers=layers, lr=5e-3, epochs=4, stop=0.0, norm=norm)
    expected = plain_training(lm, facts_for(lm), [Place(layer) for layer in layers], 5e-3, 4, norm)
    assert_changes(run(lm, method, facts_for(lm), size=4), 0, expected)


@pytest.mark.parametrize("name", ["t5", "t5-gated"])
def test_ft_of_the_decoder_with_the_end_of_the_text_equals_a_plain_loop(name: str) -> None:
    lm = precise(name)
    method = le.FT(layers=(4,), parts=("mlp_in", "mlp"), lr=5e-3, epochs=4, stop=0.0, end_of_text=True)
    ended = [replace(fact, end_turn=True) for fact in facts_for(lm)]
    expected = plain_training(lm, ended, [Place(4, "mlp_in"), Place(4)], 5e-3, 4)
    assert_changes(run(lm, method, facts_for(lm), size=4), 0, expected)


@EVERY
def test_ft_of_a_whole_block_trains_every_matrix_with_a_place(name: str) -> None:
    lm = precise(name)
    method = le.FT(layers=(1,), parts="block", lr=2e-3, epochs=3, stop=0.0)
    places = method.trained(lm)
    assert {place.name for place in places} == set(lm.architecture.names) - {"embedding", "attention", "block"}
    expected = plain_training(lm, facts_for(lm), places, 2e-3, 3)
    assert_changes(run(lm, method, facts_for(lm), size=4), 0, expected)


@EVERY
def test_ewc_equals_a_plain_loop_with_the_squared_gradients_of_earlier_facts(name: str) -> None:
    lm, facts, place = precise(name), facts_for(precise(name)), Place(1)
    method = le.EWC(layers=(1,), lr=5e-3, epochs=3, stop=0.0, lambda_=20.0)
    edit = run(lm, method, facts, size=2)
    other = precise(name)
    first = plain_training(other, facts[:2], [place], 5e-3, 3)
    weight = of_module(other, place)
    weight.data += first[place]
    fisher = torch.zeros_like(weight)
    for fact in facts[:2]:
        weight.requires_grad_(True)
        (gradient,) = torch.autograd.grad(mean_loss(other, [fact]), weight)
        fisher += gradient.square() / 2
    second = plain_training(other, facts[2:], [place], 5e-3, 3, fisher={place: 20.0 * fisher})
    assert_changes(edit, 0, first)
    assert_changes(edit, 1, second)


@EVERY
def test_retraining_equals_a_plain_loop_from_the_unedited_weights(name: str) -> None:
    lm, facts, place = precise(name), facts_for(precise(name)), Place(1)
    edit = run(lm, le.Retrain(layers=(1,), lr=5e-3, epochs=2, stop=0.0, every=3, passes=4), facts, size=2)
    whole = plain_training(precise(name), facts, [place], 5e-3, 4)
    both = sum(changes[place].tensors()["weight"] for changes in edit.rounds)
    assert (both - whole[place]).norm() < 1e-6 * whole[place].norm()


@EVERY
def test_facts_trained_apart_equal_runs_of_one_fact(name: str) -> None:
    lm = precise(name)
    facts, method = facts_for(lm), le.FT(layers=(1, 2), lr=5e-3, epochs=4, stop=0.05)
    editor = method.editor(lm)
    editor.prepare(facts, None)
    apart = editor.separate(range(len(facts)))
    assert apart is not None
    for index, fact in enumerate(facts):
        edit = run(lm, method, [fact], size=1)
        edit.revert(lm)
        for place, changes in apart.updates.items():
            found, alone = changes[index].tensors()["weight"], edit.rounds[0][place].tensors()["weight"]
            assert (found - alone).norm() < 1e-6 * alone.norm()


# The contract of all methods


@EVERY
@METHOD
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["32", "bf16"])
def test_rounds_are_reverted_saved_and_loaded_to_the_bit(
    tmp_path: Path, name: str, method: le.Method, dtype: torch.dtype
) -> None:
    lm = other_model(name, dtype)
    before = state(lm)
    edit = run(lm, method, facts_for(lm), size=2)
    edited = state(lm)
    assert len(edit.rounds) == 2 and [outcome.fact for outcome in edit.outcomes] == facts_for(lm) and edit.damage
    for place in edit.rounds[0]:
        assert not torch.equal(edited[f"{lm.module_name(place)}.weight"], before[f"{lm.module_name(place)}.weight"])
    edit.save(tmp_path / "edit")
    edit.revert(lm)
    assert_unedited(lm, before)
    other = other_model(name, dtype)
    loaded = le.Edit.load(tmp_path / "edit")
    loaded.apply(other)
    assert (loaded.outcomes, loaded.damage) == (edit.outcomes, edit.damage)
    for parameter, value in state(other).items():
        assert torch.equal(value, edited[parameter]), parameter


@EVERY
@METHOD
def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path: Path, name: str, method: le.Method) -> None:
    lm, stopped, other = (other_model(name) for _ in range(3))
    before, facts = state(stopped), facts_for(lm)
    run(lm, method, facts)
    with pytest.raises(Stopped):
        run(stopped, method, facts, checkpoint=tmp_path / "run", callbacks=[StopAfter()])
    assert_unedited(stopped, before)
    assert len(kept_rounds(tmp_path / "run")) == 1
    run(other, method, facts, checkpoint=tmp_path / "run")
    for parameter, value in state(other).items():
        assert torch.equal(value, state(lm)[parameter]), parameter


@EVERY
@METHOD
def test_the_single_protocol_scores_each_fact_as_if_edited_alone(name: str, method: le.Method) -> None:
    lm = precise(name)
    before, facts = state(lm), facts_for(lm)
    quiet = le.EvaluationSettings(progress_bar=False)
    together = le.evaluate_single(lm, facts, method, settings=quiet)
    assert_unedited(lm, before)
    for fact, record in zip(facts, together.records, strict=True):
        edit = run(lm, method, [fact])
        alone = le.evaluate(lm, [fact], settings=quiet).records[0]
        edit.revert(lm)
        assert record["efficacy"]["nll_wanted"] == pytest.approx(alone["efficacy"]["nll_wanted"], rel=1e-4, abs=1e-4)


@EVERY
@METHOD
def test_its_edit_is_reported_and_exported(tmp_path: Path, name: str, method: le.Method) -> None:
    lm = other_model(name)
    facts, quiet = facts_for(lm), le.EvaluationSettings(progress_bar=False)
    before = le.evaluate(lm, facts, settings=quiet)
    edit = run(lm, method, facts)
    edit.before, edit.after = before, le.evaluate(lm, facts, settings=quiet)
    edit.save(tmp_path / "edit")
    page = le.report(tmp_path / "edit", tmp_path / "report.html").read_text(encoding="utf-8")
    assert type(method).__name__ in page and "London" in page
    le.export_model(lm, tmp_path / "model")
    exported = le.LanguageModel.load(tmp_path / "model", device="cpu")
    assert exported.complete(facts[0].text) == lm.complete(facts[0].text)
    for parameter, value in state(lm).items():
        assert torch.equal(state(exported)[parameter], value), parameter


@EVERY
def test_a_class_that_is_learned_is_held_and_settings_that_do_not_fit_are_refused(name: str) -> None:
    lm = other_model(name)
    before = state(lm)
    with pytest.raises(le.LightEditError, match=f"layers 0 to {lm.n_layers - 1}"):
        le.edit(lm, facts_for(lm), le.FT(layers=(9,)), settings=QUIETLY)
    with pytest.raises(le.LightEditError, match=r"published: .*leave it out"):
        le.edit(lm, facts_for(lm), le.FT(layers=(1,), published=True), settings=QUIETLY)
    assert_unedited(lm, before)
    edit = run(lm, le.FT(layers=(lm.n_layers - 1,), lr=2e-2, epochs=60, end_of_text=lm.kind != "classifier",
                         parts="block"), facts_for(lm), size=4)  # fmt: skip
    held = [outcome.held for outcome in edit.outcomes]
    assert all(held) if lm.kind == "classifier" else sum(held) >= 2
    for outcome in edit.outcomes:
        if lm.kind == "classifier":
            assert outcome.after.strip() == outcome.fact.target_new and outcome.rank == 1
