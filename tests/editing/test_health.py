"""Health: what is measured equals plain computations, and a limit ends the fit or takes the round back."""

import csv
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning import Callback, Trainer
from torch.nn import functional as F

import lightedit as le
from lightedit.evaluation.held_out_text import POSITIONS
from lightedit.lm import Place
from lightedit.methods.closed_form import editor
from tests.models import tiny_model, tiny_tokenizer
from tests.plain import WINDOWS, distributions, perplexity
from tests.runs import FACTS, LAYERS, MEMIT, QUIET, assert_unedited, covariance_of, run, scored, state

TEXT = "The river is long and the city is old. Paris is the capital of France. " * 40


def language_model(architecture: str = "llama", dtype: torch.dtype = torch.float32) -> le.LanguageModel:
    return le.LanguageModel(tiny_model(architecture, dtype=dtype), tiny_tokenizer("bytelevel"))


@pytest.fixture
def lm() -> le.LanguageModel:
    return language_model()


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_records_equal_plain_computations(architecture: str, tmp_path: Path) -> None:
    lm = language_model(architecture)
    base = {layer: lm.weight(Place(layer)).clone() for layer in LAYERS}
    before = [distributions(lm, window) for window in WINDOWS]
    perplexity_before = perplexity(lm, WINDOWS)
    health = le.Health(WINDOWS, folder=tmp_path)
    edit = run(lm, facts_per_round=3, on_collision="keep", callbacks=[health])  # gemma2's keys are much alike

    assert [(record["round"], record["facts"]) for record in health.records] == [(1, 3), (2, 5)]
    last = health.records[-1]
    assert last["perplexity"] == pytest.approx(perplexity(lm, WINDOWS), rel=1e-5)
    assert last["perplexity_ratio"] == pytest.approx(perplexity(lm, WINDOWS) / perplexity_before, rel=1e-5)
    divergences = [
        F.kl_div(old[:-1], distributions(lm, window)[:-1], log_target=True, reduction="none").sum(-1)
        for window, old in zip(WINDOWS, before, strict=True)
    ]
    assert float(torch.cat(divergences).mean()) > 1e-3
    assert last["kl"] == pytest.approx(float(torch.cat(divergences).mean()), rel=1e-4)
    drifts = {layer: (lm.weight(Place(layer)) - base[layer]).norm() for layer in LAYERS}
    assert last["drift"] == pytest.approx(float(torch.stack(list(drifts.values())).norm()), rel=1e-5)
    for layer in LAYERS:
        assert last[f"weight_norm/layer_{layer}"] == pytest.approx(float(lm.weight(Place(layer)).norm()), rel=1e-5)
        assert last[f"update_norm/layer_{layer}"] == pytest.approx(
            float(edit.rounds[1][Place(layer)].dense().norm()), rel=1e-4
        )
    with (tmp_path / "health.csv").open() as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert rows == health.records
    assert health.reason is None


def test_watching_changes_no_bit_and_an_unwritten_model_shows_no_change(lm: le.LanguageModel) -> None:
    run(lm, facts_per_round=2)
    expected = state(lm)
    watched = language_model()

    class WriteNothing(Callback):
        def on_train_epoch_end(self, trainer, module):
            if trainer.current_epoch == 0:
                with watched.weights.unedited():
                    health.on_round_written(trainer, module)

    health = le.Health(WINDOWS)
    run(watched, facts_per_round=2, callbacks=[WriteNothing(), health])
    assert health.records[0]["kl"] == 0 and health.records[0]["perplexity_ratio"] == 1
    assert health.records[0]["drift"] == 0 < health.records[1]["drift"]
    for name, parameter in watched.model.named_parameters():
        assert torch.equal(parameter, expected[name]), name


def test_an_earlier_edit_counts_as_a_change(lm: le.LanguageModel) -> None:
    run(lm, FACTS[:2])
    health = le.Health(WINDOWS)
    run(lm, FACTS[2:], callbacks=[health])
    lm.weights.remove(lm.weights.owners)
    assert health.records[0]["perplexity"] / health.records[0]["perplexity_ratio"] == pytest.approx(
        perplexity(lm, WINDOWS), rel=1e-5
    )


def test_text_may_be_a_file_or_the_models_own_and_only_some_positions_are_compared(
    lm: le.LanguageModel, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    from_file, own = le.Health(tmp_path / "text.txt"), le.Health()
    run(lm, callbacks=[from_file, own])
    windows = own._text.windows
    assert sum(map(len, windows)) == 2048 and windows != from_file._text.windows
    assert own.records[0]["perplexity"] == pytest.approx(perplexity(lm, windows), rel=1e-4)
    for health in (from_file, own):
        held = torch.cat(health._text._reference)
        assert held.shape == (POSITIONS, lm.model.config.vocab_size) and held.dtype == torch.float32
        edited = torch.cat([distributions(lm, window)[:-1] for window in health._text.windows])
        with lm.weights.unedited():
            before = torch.cat([distributions(lm, window)[:-1] for window in health._text.windows])
        sampled = health._text._sampled
        expected = F.kl_div(before[sampled], edited[sampled], log_target=True, reduction="sum") / POSITIONS
        assert health.records[0]["kl"] == pytest.approx(float(expected), rel=1e-4)


class Snapshots(Callback):
    """Keeps the weights after each round."""

    def __init__(self) -> None:
        self.states: list[dict[str, torch.Tensor]] = []

    def on_train_epoch_end(self, trainer, module):
        self.states.append(state(module.lm))


def limits_that_round_two_passes(dtype: torch.dtype) -> dict[str, float]:
    health = le.Health(WINDOWS)
    run(language_model(dtype=dtype), facts_per_round=2, callbacks=[health])
    one, two = health.records[:2]
    assert one["kl"] < two["kl"]
    return {"max_kl": (one["kl"] + two["kl"]) / 2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("on_limit", ["stop", "roll_back"])
def test_a_limit_ends_the_run_with_or_without_the_round_bit_for_bit(dtype, on_limit, tmp_path: Path) -> None:
    limits = limits_that_round_two_passes(dtype)
    lm, snapshots = language_model(dtype=dtype), Snapshots()
    unedited = state(lm)
    health = le.Health(WINDOWS, limits=le.HealthLimits(**limits, on_limit=on_limit))
    with pytest.warns(UserWarning, match=r"round 2.*kl is .*max_kl"):
        edit = run(lm, facts_per_round=2, callbacks=[snapshots, health], validate_every=1, log=tmp_path)
    kept = 2 if on_limit == "stop" else 1
    assert len(health.records) == len(snapshots.states) == 2  # there was no third round
    assert len(edit.rounds) == kept and edit.facts_in_round == [2] * kept and edit.facts == FACTS[: 2 * kept]
    assert not torch.equal(snapshots.states[0]["model.layers.1.mlp.down_proj.weight"], lm.weights.base(Place(1)))
    for name, parameter in lm.model.named_parameters():
        assert torch.equal(parameter, snapshots.states[kept - 1][name]), name
    assert edit.record.stopped == health.reason and ("rolled back" in health.reason) == (kept == 1)
    with (tmp_path / "retention.csv").open() as file:
        assert [int(row["round"]) for row in csv.DictReader(file)] == [1, 2, 2][: 2 * kept - 1]
    assert (tmp_path / "health.csv").read_text().count("\n") == 3
    assert edit.tables["health"] == health.records
    assert [row["round"] for row in edit.tables["retention"]] == [1, 2, 2][: 2 * kept - 1]
    edit.revert(lm)
    assert_unedited(lm, unedited)


def test_a_run_that_goes_on_after_its_end_has_its_tables(lm: le.LanguageModel, tmp_path: Path) -> None:
    kept = {"facts_per_round": 2, "validate_every": 1, "log": tmp_path / "log", "checkpoint": tmp_path / "run"}
    first = run(lm, callbacks=[le.Health(WINDOWS)], **kept)
    first.revert(lm)
    again = run(lm, callbacks=[le.Health(WINDOWS)], **kept)
    assert len(first.tables["health"]) == len(first.rounds) == 3
    assert again.tables == first.tables


@pytest.mark.filterwarnings("ignore:stopped in round 2")
def test_a_run_that_a_limit_ended_still_says_so_without_a_log(
    lm: le.LanguageModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = {"facts_per_round": 2, "validate_every": 1, "checkpoint": tmp_path / "run"}
    limits = le.HealthLimits(**limits_that_round_two_passes(torch.float32))
    first = run(lm, callbacks=[le.Health(WINDOWS, limits=limits)], **kept)
    first.revert(lm)
    health = le.Health(WINDOWS)
    again = run(lm, callbacks=[health], **kept)
    assert again.record.stopped == health.reason == first.record.stopped
    assert again.tables == first.tables and len(first.tables["health"]) == 2
    assert [(row["round"], row["origin"]) for row in first.tables["retention"]] == [(1, 1), (2, 1), (2, 2)]
    assert "where the run ended: stopped in round 2" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:stopped in round 2")
@pytest.mark.parametrize("on_limit", ["roll_back", "stop", None])
def test_a_ruined_model_comes_before_its_limit_although_it_cannot_be_validated(
    lm: le.LanguageModel, on_limit: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, write = state(lm), editor.write_facts

    def ruining(lm: le.LanguageModel, *args):
        for matrix, update, keys in write(lm, *args):
            if len(lm.weights.owners) == 2 and matrix.layer == LAYERS[-1]:
                update = replace(update, left=update.left * math.nan)
                lm.weights.remove([args[-1]])
                lm.weights.add(args[-1], matrix, update)
            yield matrix, update, keys

    monkeypatch.setattr(editor, "write_facts", ruining)
    settings = {"facts_per_round": 2, "validate_every": 1}
    if on_limit is None:
        with pytest.raises(FloatingPointError):
            run(lm, **settings)
        assert_unedited(lm, before)
        return
    health = le.Health(WINDOWS, limits=le.HealthLimits(max_kl=1e9, on_limit=on_limit))
    edit = run(lm, callbacks=[health], **settings)
    assert "kl is nan" in health.reason
    assert len(edit.rounds) == (1 if on_limit == "roll_back" else 2)
    assert [(row["round"], row["origin"]) for row in edit.tables["retention"]] == [(1, 1)]


def test_the_round_that_stays_is_validated_even_between_validations(lm: le.LanguageModel, tmp_path: Path) -> None:
    health = le.Health(
        WINDOWS, limits=le.HealthLimits(**limits_that_round_two_passes(torch.float32), on_limit="roll_back")
    )
    with pytest.warns(UserWarning):
        run(lm, facts_per_round=2, callbacks=[health], validate_every=2, log=tmp_path)
    with (tmp_path / "retention.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["round"], row["origin"]) for row in rows] == [("1", "1")]
    after = scored(lm, FACTS[:2]).scores
    assert {name: float(rows[0][name]) for name in after} == pytest.approx(after)


@pytest.mark.parametrize("limit", ["max_kl", "max_perplexity_ratio", "max_update_norm"])
def test_every_limit_is_obeyed_and_a_ruined_model_passes_it(lm: le.LanguageModel, limit: str) -> None:
    before = state(lm)
    calm = le.Health(WINDOWS, limits=le.HealthLimits(**{limit: 1e9}, every=2))
    edit = run(lm, facts_per_round=1, callbacks=[calm])
    assert calm.reason is None and [record["round"] for record in calm.records] == [2, 4, 5]
    edit.revert(lm)
    with pytest.warns(UserWarning, match=f"{limit}=1e-09"):
        edit = run(lm, callbacks=[le.Health(WINDOWS, limits=le.HealthLimits(**{limit: 1e-9}, on_limit="roll_back"))])
    assert edit.facts == [] and edit.rounds == []
    assert_unedited(lm, before)
    assert calm.limits.passed({limit.removeprefix("max_"): math.nan}) is not None


def test_a_trainer_of_the_users_own_can_be_watched(lm: le.LanguageModel, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = le.EditModule(lm, MEMIT, covariance=covariance_of(lm))
    health = le.Health(WINDOWS, limits=le.HealthLimits(max_update_norm=1e-6))
    trainer = Trainer(accelerator="cpu", logger=False, callbacks=[health], **QUIET)
    with pytest.warns(UserWarning, match="update_norm/layer_1"):
        trainer.fit(module, datamodule=le.FactsDataModule(FACTS, facts_per_round=2))
    assert module.edit.facts == FACTS[:2]
    assert {row["round"] for row in module.retention} == {1}
    assert trainer.logged_metrics["health/kl"] == pytest.approx(health.records[0]["kl"], rel=1e-5)
    assert not list(tmp_path.iterdir())  # without a logger or a folder nothing is written


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_kl": 0.0}, "max_kl"),
        ({"max_perplexity_ratio": math.nan}, "max_perplexity_ratio"),
        ({"max_update_norm": -1.0}, "max_update_norm"),
        ({"on_limit": "pause"}, "pause"),
        ({"every": 0}, "every"),
    ],
)
def test_arguments_are_checked(arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        le.HealthLimits(**arguments)


def test_a_missing_text_is_found_at_once(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt"):
        le.Health(tmp_path / "nowhere.txt")


def test_a_text_without_two_tokens_in_a_row(lm: le.LanguageModel) -> None:
    before = state(lm)
    with pytest.raises(ValueError, match="two tokens"):
        run(lm, callbacks=[le.Health([[5]])])
    assert_unedited(lm, before)
