"""Both steps together: the training module, its data, and the `edit` function."""

import csv
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger

import lightedit as le
from benchmarks.published import Request, published_memit, published_values
from lightedit.data.modules import FactsDataModule
from lightedit.data.prompts import ContextSettings
from lightedit.editing.retention import curves
from lightedit.editing.run import prepare
from lightedit.lm import Place
from lightedit.methods.closed_form import keys
from lightedit.methods.closed_form.keys import values_of
from lightedit.methods.closed_form.preservation import Preservation
from tests.models import tiny_model, tiny_tokenizer
from tests.runs import (
    CONTEXTS,
    FACTS,
    LAYERS,
    MEMIT,
    QUIET,
    ROME,
    VALUES,
    assert_unedited,
    covariance_of,
    run,
    scored,
    state,
)


@pytest.fixture
def lm() -> le.LanguageModel:
    return le.LanguageModel(tiny_model("llama"), tiny_tokenizer("bytelevel"))


def test_two_rounds_equal_the_published_procedure_run_twice(lm: le.LanguageModel) -> None:
    before = state(lm)
    contexts = CONTEXTS.sample(lm)
    covariance = covariance_of(lm)
    edit = run(lm, FACTS[:4], facts_per_round=2, covariance=covariance)
    assert edit.facts_in_round == [2, 2]
    after = {layer: lm.weight(Place(layer)).double() for layer in LAYERS}
    edit.revert(lm)
    assert_unedited(lm, before)

    for round_ in (FACTS[:2], FACTS[2:4]):
        requests = [Request(fact.prompt, fact.subject, fact.target_new) for fact in round_]
        zs = [
            published_values(
                lm.model, lm.tokenizer, *request, list(contexts.templates), LAYERS[-1], "block",
                lr=VALUES.lr, steps=VALUES.steps, clamp_norm_factor=VALUES.clamp_norm_factor,
                kl_factor=VALUES.kl_factor, weight_decay=VALUES.weight_decay,
            ).target
            for request in requests
        ]  # fmt: skip
        moments = {layer: covariance[Place(layer)].double() for layer in LAYERS}
        changes = published_memit(
            lm.model, lm.tokenizer, requests, list(contexts.templates), zs, list(LAYERS), moments, 5.0
        )
        for layer, change in changes.items():
            lm.weight(Place(layer)).add_(change.float())
    for layer in LAYERS:
        change = after[layer] - before[f"model.layers.{layer}.mlp.down_proj.weight"].double()
        expected = lm.weight(Place(layer)).double() - before[f"model.layers.{layer}.mlp.down_proj.weight"].double()
        assert expected.norm() > 0.01
        assert (change - expected).norm() < 1e-4 * expected.norm()


def test_a_trainer_of_the_users_own_gives_the_same_bits_and_retention_curves(lm: le.LanguageModel, tmp_path) -> None:
    edit = run(lm, facts_per_round=2)
    expected = state(lm)
    edit.revert(lm)
    module = le.EditModule(lm, MEMIT, covariance=covariance_of(lm))
    trainer = Trainer(
        accelerator="cpu", logger=CSVLogger(tmp_path), enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(module, datamodule=le.FactsDataModule(FACTS, facts_per_round=2))
    assert trainer.current_epoch == 3  # it stops by itself after the last round
    for name, parameter in lm.model.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    with (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sum(bool(row["ES"]) for row in rows) == 3
    assert sum(bool(row["loss"]) for row in rows) >= 3 * (VALUES.steps - 1)
    assert [float(row["update_norm/layer_1"]) for row in rows if row["update_norm/layer_1"]] == pytest.approx(
        [updates[Place(1)].norm() for updates in edit.rounds], rel=1e-5
    )
    for step, total in module.edit.record.seconds.items():
        by_round = [float(row[f"seconds/{step}"]) for row in rows if row[f"seconds/{step}"]]
        assert len(by_round) == 3 and min(by_round) > 0
        assert sum(by_round) == pytest.approx(total, rel=1e-3)


def test_validation_scores_this_round_and_earlier_ones(lm: le.LanguageModel) -> None:
    seen: list[list[str]] = []

    class Watch(le.EditModule):
        def validation_step(self, chunk, batch_idx):
            seen.append([fact.subject for fact in chunk.facts])
            super().validation_step(chunk, batch_idx)

    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
                      enable_model_summary=False, num_sanity_val_steps=0)  # fmt: skip
    trainer.fit(
        Watch(lm, MEMIT, covariance=covariance_of(lm)), datamodule=le.FactsDataModule(FACTS[:4], facts_per_round=2)
    )
    first, second = [["France", "Old London Town"], ["Rhine", "Mozart"]]
    assert seen == [first, first, second]


def retention_table(folder: Path) -> list[dict[str, str]]:
    with (folder / "retention.csv").open() as file:
        return list(csv.DictReader(file))


def test_retention_by_origin_equals_scoring_each_rounds_facts_under_the_weights_of_that_moment(
    lm: le.LanguageModel, tmp_path: Path
) -> None:
    expected: list[tuple[int, int, dict[str, float]]] = []

    class Score(Callback):
        def on_validation_end(self, trainer, module):
            for origin in range(0 if trainer.sanity_checking else trainer.current_epoch + 1):
                scores = scored(lm, FACTS[2 * origin : 2 * origin + 2]).scores
                expected.append((trainer.current_epoch + 1, origin + 1, scores))

    module = le.EditModule(lm, MEMIT, covariance=covariance_of(lm))
    trainer = Trainer(accelerator="cpu", logger=CSVLogger(tmp_path, None, ""), callbacks=[Score()],
                      num_sanity_val_steps=2, log_every_n_steps=1, **QUIET)  # fmt: skip
    trainer.fit(module, datamodule=le.FactsDataModule(FACTS, facts_per_round=2))

    assert [(row["round"], row["origin"]) for row in module.retention] == [(r, o) for r, o, _ in expected]
    assert [row["facts"] for row in module.retention if row["round"] == 3] == [2, 2, 1]
    for row, (_, _, scores) in zip(module.retention, expected, strict=True):
        assert {name: row[name] for name in row if name not in ("round", "origin", "facts")} == pytest.approx(scores)
    first = [row["efficacy_accuracy"] for row in module.retention if row["origin"] == 1]
    assert [{k: v and float(v) for k, v in row.items()} for row in retention_table(tmp_path)] == [
        {**dict.fromkeys(retention_table(tmp_path)[0], ""), **row} for row in module.retention
    ]
    with (tmp_path / "metrics.csv").open() as file:
        logged = [value for row in csv.DictReader(file) if (value := row["retention/round_1/efficacy_accuracy"])]
    assert list(map(float, logged)) == pytest.approx(first)


def test_every_second_of_five_rounds_is_validated_and_the_last_one(lm: le.LanguageModel, tmp_path: Path) -> None:
    unwatched = run(lm, facts_per_round=1)
    expected = state(lm)
    unwatched.revert(lm)
    run(lm, facts_per_round=1, validate_every=2, log=tmp_path / "log")
    rows = retention_table(tmp_path / "log")
    assert [(int(row["round"]), int(row["origin"])) for row in rows] == [
        (round_, origin) for round_ in (2, 4, 5) for origin in range(1, round_ + 1)
    ]
    after = scored(lm, FACTS[:1]).scores
    assert {name: float(rows[6][name]) for name in after} == pytest.approx(after)
    with (tmp_path / "log" / "metrics.csv").open() as file:
        assert sum(bool(row["ES"]) for row in csv.DictReader(file)) == 3
    for name, parameter in lm.model.named_parameters():
        assert torch.equal(parameter, expected[name]), name


def test_of_many_rounds_the_first_and_the_latest_have_curves() -> None:
    rows = [{"round": 12, "origin": origin, "facts": 1, "ES": float(origin)} for origin in range(1, 13)]
    assert curves(rows) == {"retention/round_1/ES": 1.0, "retention/latest/ES": 12.0}
    assert curves(rows[:2]) == {"retention/round_1/ES": 1.0, "retention/round_2/ES": 2.0}


def test_validation_outside_of_a_fit_leaves_retention_alone(lm: le.LanguageModel) -> None:
    module, trainer = (
        le.EditModule(lm, MEMIT, covariance=covariance_of(lm)),
        Trainer(accelerator="cpu", logger=False, **QUIET),
    )
    scores = trainer.validate(module, datamodule=le.FactsDataModule(FACTS, facts_per_round=2), verbose=False)[0]
    assert scores == pytest.approx(scored(lm, FACTS).scores)
    assert module.retention == []


@pytest.mark.parametrize("arguments", [{"validate_every": 0}, {"log": Path(__file__)}])
def test_arguments_of_validation_are_checked(lm: le.LanguageModel, arguments) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        run(lm, **arguments)


def test_rolling_back_needs_a_round(lm: le.LanguageModel) -> None:
    with pytest.raises(le.EditError, match="none to roll back"):
        le.EditModule(lm, MEMIT, covariance=covariance_of(lm)).roll_back()


@pytest.mark.parametrize("facts_per_chunk", [1, 2, 100])
def test_chunks_do_not_matter(lm: le.LanguageModel, facts_per_chunk: int) -> None:
    edit = run(lm, facts_per_chunk=3)
    expected = lm.weight(Place(2)).clone()
    edit.revert(lm)
    run(lm, facts_per_chunk=facts_per_chunk)
    base = lm.weights.base(Place(2))
    assert (lm.weight(Place(2)) - expected).norm() < 1e-4 * (expected - base).norm()


def test_rome_writes_one_fact_a_round_and_exactly(lm: le.LanguageModel) -> None:
    module = le.EditModule(lm, ROME, covariance=covariance_of(lm, (1,)))
    targets: list[torch.Tensor] = []
    write = module.editor.write
    module.editor.write = lambda indices, owner: (
        targets.extend(module.editor.results.values()),
        write(indices, owner),
    )[1]
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
                      enable_model_summary=False, limit_val_batches=0)  # fmt: skip
    trainer.fit(module, datamodule=le.FactsDataModule(FACTS[:3], facts_per_round=1))
    assert module.edit is not None and module.edit.facts_in_round == [1, 1, 1]
    keys = last_keys(lm, module)
    value = values_of(lm, Place(1), keys)[:, 0]
    assert (value - targets[-1]).norm() < 1e-5 * targets[-1].norm()


def last_keys(lm: le.LanguageModel, module: le.EditModule) -> torch.Tensor:
    from lightedit.methods.closed_form.keys import KeyWalk

    return KeyWalk(lm, module.editor.prompts[-1:], Place(1)).keys()


def test_a_round_that_fails_after_its_last_matrix_leaves_nothing(
    lm: le.LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*_) -> None:
        raise MemoryError

    before = state(lm)
    monkeypatch.setattr(Preservation, "remember", out_of_memory)
    method = le.ENCORE(layers=LAYERS, values=MEMIT.values, contexts=MEMIT.contexts)
    with pytest.raises(MemoryError):
        run(lm, method=method)
    assert_unedited(lm, before)


@pytest.mark.parametrize("size", [{"facts_per_round": 0}, {"facts_per_chunk": 0}])
def test_a_size_of_zero_is_refused(lm: le.LanguageModel, size: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(size))} must be at least 1, got 0"):
        run(lm, **size)


def test_rome_refuses_several_facts_a_round(lm: le.LanguageModel) -> None:
    with pytest.raises(ValueError, match="facts_per_round=1"):
        run(lm, method=ROME, covariance=covariance_of(lm, (1,)), facts_per_round=2)


def test_rome_refuses_an_unknown_key() -> None:
    with pytest.raises(ValueError, match="'averaged', 'bare' or 'published', got 'mean'"):
        le.ROME(layers=[1], key="mean")


@pytest.mark.parametrize("layers", [(), (2, 1), (1, 1), (-1,)])
def test_layers_are_checked(layers: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="layers"):
        le.MEMIT(layers=layers)


def test_lambda_is_checked() -> None:
    with pytest.raises(ValueError, match="lambda_"):
        le.MEMIT(layers=(1,), lambda_=0.0)


def test_bfloat16_model_is_edited_and_restored_bit_for_bit() -> None:
    lm = le.LanguageModel(tiny_model("llama", dtype=torch.bfloat16), tiny_tokenizer("bytelevel"))
    before = state(lm)
    edit = run(lm, facts_per_round=2)
    assert not torch.equal(lm.weight(Place(1)), before["model.layers.1.mlp.down_proj.weight"])
    edit.revert(lm)
    assert_unedited(lm, before)


# Facts that come again


def test_a_fact_that_is_given_twice_is_written_once_with_a_word(lm: le.LanguageModel) -> None:
    once = run(lm, FACTS[:2])
    after = state(lm)
    once.revert(lm)
    with pytest.warns(UserWarning, match="1 fact repeats an earlier one and is dropped"):
        edit = run(lm, [*FACTS[:2], FACTS[0]])
    assert edit.facts == FACTS[:2]
    for name, weight in state(lm).items():
        assert torch.equal(weight, after[name]), name


def test_a_newer_answer_may_be_written_in_a_later_round(lm: le.LanguageModel) -> None:
    newer = replace(FACTS[0], target_new="Madrid")
    first = run(lm, FACTS[:2])
    [before] = scored(lm, [newer]).records
    first.revert(lm)
    edit = run(lm, [*FACTS[:2], newer], facts_per_round=2)
    [after] = scored(lm, [newer]).records
    assert edit.facts == [*FACTS[:2], newer] and edit.facts_in_round == [2, 1]
    assert after["efficacy"]["nll_wanted"] < before["efficacy"]["nll_wanted"]


# Wrong input: refused before work starts, nothing changed


def test_layer_out_of_range(lm: le.LanguageModel) -> None:
    with pytest.raises(ValueError, match="layers 0 to 3"):
        run(lm, method=replace(MEMIT, layers=(3, 4)), covariance=covariance_of(lm))


def test_two_answers_to_one_text_in_one_round(lm: le.LanguageModel) -> None:
    with pytest.raises(
        le.FactError, match="facts 1 and 6: both complete 'The capital of France', with 'Rome' and 'Mad"
    ):
        run(lm, [*FACTS, replace(FACTS[0], target_new="Madrid")])


def test_no_facts(lm: le.LanguageModel) -> None:
    with pytest.raises(le.FactError, match=r"at least one|empty"):
        run(lm, [])


def test_colliding_keys_name_both_facts(lm: le.LanguageModel) -> None:
    before = state(lm)
    twin = le.Fact("The capital of {} is near", "France", "Madrid")
    other = le.Fact("The capital of {} was", "France", "Berlin")
    named = r"3 pairs.*fact 1 .*Rome.* and fact 6 .*Madrid.*fact 1 .* and fact 7.*fact 6 .* and fact 7.*Berlin.*on_coll"
    with pytest.raises(le.FactError, match=named):
        run(lm, [*FACTS, twin, other], on_collision="error")
    assert_unedited(lm, before)
    assert len(run(lm, [*FACTS, twin], on_collision="keep").facts) == 6
    lm.weights.remove(lm.weights.owners)
    assert run(lm, [*FACTS, twin], facts_per_round=5).facts_in_round == [5, 1]


def test_facts_of_equal_tokens_up_to_the_key_are_refused_before_statistics(lm: le.LanguageModel) -> None:
    twin = le.Fact("The capital of {} is near", "France", "Madrid")
    with pytest.raises(le.FactError, match=r"1 pair .*fact 1 .* and fact 6 "):  # else CovarianceError: there is none
        le.edit(lm, [*FACTS, twin], MEMIT, covariance=None, settings=le.RunSettings(on_collision="error"))


def test_colliding_keys_are_found_a_few_facts_at_a_time(lm: le.LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "_FACTS_AT_ONCE", 2)
    facts = [*FACTS, replace(FACTS[0], prompt="The capital of {} is")]
    settings = le.RunSettings(on_collision="error")
    with pytest.raises(le.FactError, match=r"1 pair .*fact 1 .* and fact 6 "):
        prepare(lm, facts, MEMIT, covariance=covariance_of(lm), settings=settings)


def test_keys_that_cannot_be_written_exactly_are_refused_before_values_are_found(lm: le.LanguageModel) -> None:
    facts = [*FACTS, replace(FACTS[0], prompt="The capital of {} is")]
    exact = le.EMMET(layers=LAYERS, values=VALUES, contexts=CONTEXTS)
    with pytest.raises(le.FactError, match=r"round 1 of 1: the keys of 6 facts are linearly dependent.*mu above 0"):
        prepare(
            lm, facts, exact, covariance=covariance_of(lm), settings=le.RunSettings(on_collision="keep")
        )  # it finds no values
    for settings in ({"facts_per_round": 5, "on_collision": "keep"}, {"on_collision": "merge"}):
        prepare(lm, facts, exact, covariance=covariance_of(lm), settings=le.RunSettings(**settings))
    prepare(
        lm, facts, replace(exact, mu=0.1), covariance=covariance_of(lm), settings=le.RunSettings(on_collision="keep")
    )


def test_an_edit_names_those_that_it_was_made_on_top_of(lm: le.LanguageModel) -> None:
    first = run(lm, FACTS[:1], MEMIT, covariance=covariance_of(lm))
    second = run(lm, FACTS[1:2], MEMIT, covariance=covariance_of(lm))
    assert first.record.on_top_of == () and second.record.on_top_of == (first.id,)
    for edit in (first, second):
        edit.revert(lm)
    with pytest.warns(UserWarning, match=f"edit {second.id} was made in a model that carried edit {first.id}"):
        second.apply(lm)
    second.revert(lm)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first.apply(lm)
        second.apply(lm)


def test_covariance_of_another_model_or_layer(lm: le.LanguageModel) -> None:
    other = le.LanguageModel(tiny_model("llama", seed=1), tiny_tokenizer("bytelevel"))
    with pytest.raises(le.CovarianceError, match=r"another|not on"):
        run(lm, covariance=covariance_of(other))
    with pytest.raises(le.CovarianceError, match="no layer 2"):
        run(lm, covariance=covariance_of(lm, (1,)))


def test_covariance_that_is_not_positive_definite(lm: le.LanguageModel) -> None:
    covariance = covariance_of(lm)
    covariance.moments[Place(2)].sub_(10 * torch.eye(len(covariance[Place(2)])))
    with pytest.raises(le.CovarianceError, match=r"layer 2.*positive definite.*tokens"):
        run(lm, covariance=covariance)


def test_facts_must_come_from_a_facts_data_module(lm: le.LanguageModel) -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    with pytest.raises(TypeError, match="FactsDataModule"):
        trainer.fit(le.EditModule(lm, MEMIT, covariance=covariance_of(lm)), [FACTS])


@pytest.mark.parametrize("size", [{"facts_per_round": 0}, {"facts_per_chunk": 0}])
def test_sizes_are_checked(size: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(size))):
        FactsDataModule(FACTS, **size)


def test_nan_in_the_loss_leaves_the_model_unedited(lm: le.LanguageModel) -> None:
    token = lm.encode([" loud"])[0][0]  # only the second round meets it
    lm.model.lm_head.weight.data[token] = torch.nan
    before = {name: value for name, value in state(lm).items() if name != "lm_head.weight"}
    bare = replace(MEMIT, contexts=ContextSettings(prefixes=()))  # such a model cannot sample contexts
    with pytest.raises(FloatingPointError, match="the loss of fact"):
        run(lm, method=bare, facts_per_round=2)
    assert not lm.weights.owners
    for name, value in before.items():
        assert torch.equal(lm.model.get_parameter(name), value)


def test_a_failure_in_the_middle_of_a_round_leaves_nothing_of_it(
    lm: le.LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = state(lm)
    solve, calls = Preservation.solve, []

    def fail_at_the_second_layer(self, keys):
        calls.append(keys)
        if len(calls) == 2:  # layer 1, layer 2
            raise KeyboardInterrupt
        return solve(self, keys)

    monkeypatch.setattr(Preservation, "solve", fail_at_the_second_layer)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(lm)
    assert len(calls) == 2
    assert_unedited(lm, before)
