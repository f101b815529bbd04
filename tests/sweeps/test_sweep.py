"""Sweeps: rows that equal separate runs, step 1 done once, resuming, and what is refused before work starts."""

import csv
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import lightedit as le
from lightedit.__main__ import main
from lightedit.evaluation import evaluate, scoring
from lightedit.evaluation.kept_scores import KeptScores
from lightedit.figures import PALETTE
from lightedit.lm import Place
from lightedit.runs.folder import locked
from lightedit.sweeps import run as sweeping
from lightedit.sweeps import targets
from lightedit.sweeps.plan import LOG17, Run, plan, shown
from lightedit.sweeps.table import Table, best
from lightedit.sweeps.targets import TargetStore
from tests.models import tiny_model, tiny_tokenizer
from tests.runs import assert_unedited, covariance_of, run, scored, state
from tests.sweeps.runs import CONTEXTS, FACTS, MEMIT, ROME, VALUES, of, sweep

SCORES = ("ES", "PS", "NS", "EM", "PM", "NM", "S")


@pytest.fixture
def lm() -> le.LanguageModel:
    return le.LanguageModel(tiny_model("llama"), tiny_tokenizer("bytelevel"))


def assert_scores(row: dict[str, Any], evaluation: le.Evaluation) -> None:
    for name in SCORES:  # magnitudes show in which batch a fact was scored
        low, high = evaluation.intervals[name]
        assert row[name] == pytest.approx(evaluation.scores[name], rel=1e-5, abs=1e-5)
        assert row[f"{name}_half_width"] == pytest.approx((high - low) / 2, rel=1e-5, abs=1e-5)


def test_rows_equal_separate_runs(lm: le.LanguageModel, tmp_path: Path) -> None:
    before = state(lm)
    rows = sweep(
        lm, tmp_path / "s", {"MEMIT": MEMIT, "ROME": ROME}, counts=[2, 5], facts_per_round=[None, 2],
        grid={"lambda_": [5.0, 1e5]},
    )  # fmt: skip
    assert_unedited(lm, before)
    # MEMIT: λ x (2, 5, and 5 in rounds of 2); ROME, one fact a round and no λ: 2, 5; the unedited model: 2, 5
    assert len(rows) == 6 + 2 + 2
    for row in rows:
        chosen, method = FACTS[: row["facts"]], ROME if row["method"] == "ROME" else MEMIT
        if row["method"] == "unedited":
            assert_scores(row, scored(lm, chosen))
            continue
        if row["lambda_"] is not None:
            method = replace(method, lambda_=row["lambda_"])
        covariance = covariance_of(lm)
        edit = run(lm, chosen, method, covariance=covariance, facts_per_round=row["facts_per_round"])
        assert_scores(row, scored(lm, chosen))
        edit.revert(lm)
    assert of(rows, method="ROME", facts=5)["facts_per_round"] == 1
    seen = {tuple(row[name] for name in SCORES) for row in rows}
    assert len(seen) > 4  # or equal rows would say nothing


def found(folder: Path, lm: le.LanguageModel, facts: list[le.Fact], runs: list[Run]) -> tuple[dict, float]:
    """What a store finds for the first of `runs`."""
    quiet = le.RunSettings(progress_bar=False)
    editor = runs[0].method.editor(lm, covariance=covariance_of(lm), settings=quiet)
    editor.prepare(facts, None)
    return TargetStore(folder, lm, facts, runs, quiet).find(runs[0], editor)


@pytest.mark.parametrize("kind", [le.MEMIT, le.EMMET, le.PMET, le.AlphaEdit, le.ENCORE], ids=lambda kind: kind.__name__)
def test_known_targets_give_the_same_bits_as_a_run_of_its_own(
    lm: le.LanguageModel, tmp_path: Path, kind: type[le.Method]
) -> None:
    stopping = kind(layers=(1,)).values.stopping
    threshold = {"threshold": 0.9} if kind is le.AlphaEdit else {}
    method = kind(layers=(1, 2), values=replace(VALUES, stopping=stopping), contexts=CONTEXTS, **threshold)
    runs = plan({"it": method}, 5)
    for _ in range(2):  # found, then read
        known, seconds = found(tmp_path, lm, FACTS, runs)
        assert sorted(known) == [0, 1, 2, 3, 4] and seconds > 0
        edit = run(lm, FACTS, method, covariance=covariance_of(lm), targets=known)
        weights = {layer: lm.weight(Place(layer)).clone() for layer in (1, 2)}
        assert edit.record.seconds["values"] == 0
        edit.revert(lm)
        own = run(lm, FACTS, method, covariance=covariance_of(lm))
        assert own.record.seconds["values"] > 0
        for layer, weight in weights.items():
            assert torch.equal(lm.weight(Place(layer)), weight) and not torch.equal(
                weight, lm.weights.base(Place(layer))
            )
        own.revert(lm)


def test_targets_serve_the_first_round_only(lm: le.LanguageModel) -> None:
    expected = run(lm, FACTS[:4], MEMIT, covariance=covariance_of(lm), facts_per_round=2)
    known = {index: torch.zeros(lm.d_model) for index in range(4)}
    expected.revert(lm)
    edit = run(lm, FACTS[:4], MEMIT, covariance=covariance_of(lm), facts_per_round=2, targets=known)
    assert edit.record.seconds["values"] > 0  # the second round searched
    first, second = (edit.rounds[index][Place(2)].left for index in range(2))
    assert not torch.allclose(first, expected.rounds[0][Place(2)].left)  # the zeros were written
    assert (second.norm() / expected.rounds[1][Place(2)].left.norm()).log().abs() < 2  # but not in the second round
    edit.revert(lm)
    # the zeros serve the one fact they are for; the other is searched
    partly = run(lm, FACTS[:4], MEMIT, covariance=covariance_of(lm), facts_per_round=2, targets={0: known[0]})
    left, whole = partly.rounds[0][Place(2)].left, expected.rounds[0][Place(2)].left
    assert not torch.allclose(left[:, 0], whole[:, 0]) and not torch.allclose(left[:, 1], first[:, 1])


def test_merged_facts_are_searched_anew(lm: le.LanguageModel, tmp_path: Path) -> None:
    facts = [*FACTS, replace(FACTS[0], prompt="The capital of {} is near")]
    expected = run(lm, facts, MEMIT, covariance=covariance_of(lm), on_collision="merge")
    expected.revert(lm)
    runs = plan({"MEMIT": MEMIT}, 6)
    known, _ = found(tmp_path, lm, facts, runs)
    edit = run(
        lm, facts, MEMIT, covariance=covariance_of(lm), on_collision="merge",
        targets={0: 0 * known[0], 5: 0 * known[5]},
    )  # fmt: skip
    for one, other in zip(edit.rounds[0].values(), expected.rounds[0].values(), strict=True):
        assert torch.equal(one.left, other.left)


def test_step_1_runs_once_for_settings_it_does_not_depend_on(lm: le.LanguageModel, tmp_path: Path) -> None:
    rows = sweep(lm, tmp_path / "s", counts=[2, 5], grid={"lambda_": [1.0, 10.0, 100.0]})
    edited = [row for row in rows if row["method"] == "MEMIT"]
    assert [row["seconds_values"] > 0 for row in edited] == [True] + [False] * 5
    assert all(row["seconds_values"] == 0 for row in edited[1:])
    assert all(row["seconds_update"] > 0 and row["seconds_evaluation"] > 0 for row in edited)
    assert len(list((tmp_path / "s" / "values").iterdir())) == 1

    rows = sweep(lm, tmp_path / "lr", grid={"values.lr": [0.1, 0.3]})
    assert all(row["seconds_values"] > 0 for row in rows if row["method"] == "MEMIT")
    assert len(list((tmp_path / "lr" / "values").iterdir())) == 2


def test_values_of_the_first_round_only_are_shared_between_batch_sizes(lm: le.LanguageModel, tmp_path: Path) -> None:
    rows = sweep(lm, tmp_path / "s", facts_per_round=[None, 4, 1])
    assert of(rows, facts_per_round=5)["seconds_values"] > 0  # the search, for all five facts
    for size in (4, 1):  # later rounds start from an edited model
        assert of(rows, facts_per_round=size)["seconds_values"] > 0
    assert len(list((tmp_path / "s" / "values").rglob("*.safetensors"))) == 1


@pytest.mark.parametrize("field", ["values", "layers", "contexts", "site", "facts"])
def test_values_are_kept_apart_by_all_that_they_depend_on(lm: le.LanguageModel, tmp_path: Path, field: str) -> None:
    other, facts = MEMIT, FACTS
    if field == "values":
        other = replace(MEMIT, values=replace(VALUES, steps=5))
    elif field == "layers":
        other = replace(MEMIT, layers=(1, 2, 3))
    elif field == "contexts":
        other = replace(MEMIT, contexts=replace(CONTEXTS, seed=1))
    elif field == "site":
        other = le.ROME(layers=(2,), values=VALUES, contexts=CONTEXTS)  # type: ignore[assignment]
    else:
        facts = [replace(FACTS[0], target_new="Berlin"), *FACTS[1:]]
    key = TargetStore(tmp_path, lm, FACTS, [], le.RunSettings()).key
    assert TargetStore(tmp_path, lm, facts, [], le.RunSettings()).key(other) != key(MEMIT)
    assert key(replace(MEMIT, lambda_=7.0, layers=(2,))) == key(MEMIT)


def test_generation_adds_columns_for_the_unedited_model_and_every_run(lm: le.LanguageModel, tmp_path: Path) -> None:
    plain = sweep(lm, tmp_path / "plain", counts=[2])
    assert not [name for name in plain[0] if name.startswith("GE")]
    rows = sweep(lm, tmp_path / "s", counts=[2], generate=True)
    columns = list(rows[0])
    assert columns[columns.index("S") + 1] == "GE" and columns[columns.index("S_half_width") + 1] == "GE_half_width"
    for row, other in zip(rows, plain, strict=True):
        assert {name: row[name] for name in SCORES} == {name: other[name] for name in SCORES}
    expected = scored(lm, FACTS[:2], generate=True)
    edit = run(lm, FACTS[:2], MEMIT, covariance=covariance_of(lm))
    after = scored(lm, FACTS[:2], generate=True)
    edit.revert(lm)
    for name in ("GE", "generation_success"):
        assert [row[name] for row in rows] == [expected.scores[name], after.scores[name]]
    assert rows[0]["GE"] != rows[1]["GE"] and all(row["GE_half_width"] > 0 for row in rows)
    text = (tmp_path / "s" / "runs.csv").read_text()
    assert sweep(lm, tmp_path / "s", counts=[2], generate=True) == rows
    assert (tmp_path / "s" / "runs.csv").read_text() == text
    for folder, generate in (("s", False), ("plain", True)):
        with pytest.raises(ValueError, match="a sweep with other generate"):
            sweep(lm, tmp_path / folder, counts=[2], generate=generate)


# Resuming


def test_an_interrupted_sweep_goes_on_where_it_was(
    lm: le.LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = {"lambda_": [1.0, 10.0, 100.0]}
    before = state(lm)
    expected = sweep(lm, tmp_path / "whole", grid=grid)

    score = le.evaluate
    calls = []

    def stop_in_the_second_run(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return score(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(sweeping, "evaluate", stop_in_the_second_run)
        with pytest.raises(KeyboardInterrupt):
            sweep(lm, tmp_path / "s", grid=grid)
    assert_unedited(lm, before)
    with (tmp_path / "s" / "runs.csv").open() as file:
        kept = list(csv.DictReader(file))
    assert [row["method"] for row in kept] == ["unedited", "MEMIT"]
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "s" / "values").rglob("*.safetensors")}

    rows = sweep(lm, tmp_path / "s", grid=grid, progress_bar=True, facts_per_chunk=2)
    assert "run 1 of 2: MEMIT, lambda_=10, 5 facts" in capsys.readouterr().err
    assert rows[1]["seconds_values"] == float(kept[1]["seconds_values"])  # the row as it was
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "s" / "values").rglob("*.safetensors")} == files
    for row, other in zip(rows, expected, strict=True):
        assert {name: row[name] for name in (*SCORES, "lambda_")} == {
            name: other[name] for name in (*SCORES, "lambda_")
        }
    assert not [file for file in (tmp_path / "s").rglob("*.tmp")]

    text = (tmp_path / "s" / "runs.csv").read_text()
    assert sweep(lm, tmp_path / "s", grid=grid) == rows
    assert (tmp_path / "s" / "runs.csv").read_text() == text


def test_scores_of_the_unedited_model_are_kept(
    lm: le.LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "_KEPT_TOGETHER", 2)
    expected = sweep(lm, tmp_path / "whole")
    score, calls = scoring.score_facts, iter([0, 1])

    def interrupted(*args, **kwargs):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return score(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(scoring, "score_facts", interrupted)
        sweep(lm, tmp_path / "s")
    seconds = KeptScores(tmp_path / "s" / "unedited").seconds
    seen: list[list[le.Fact]] = []
    for module in (scoring, evaluate):
        monkeypatch.setattr(
            module, "score_facts", lambda lm, facts, **rest: seen.append(facts) or score(lm, facts, **rest)
        )
    rows = sweep(lm, tmp_path / "s")
    assert seen == [FACTS[4:], FACTS]  # what was missing of the unedited model, and the run
    for row, other in zip(rows, expected, strict=True):
        assert [row[name] for name in SCORES] == pytest.approx([other[name] for name in SCORES], rel=1e-5, abs=1e-5)
    assert rows[0]["seconds_evaluation"] > seconds > 0
    assert not (tmp_path / "s" / "unedited").exists()


def test_a_sweep_stopped_between_two_rows_of_the_unedited_model_goes_on(
    lm: le.LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add, rows_added = Table.add, iter([0, 1])

    def interrupted(*args, **kwargs):
        if next(rows_added, None) is None:
            raise KeyboardInterrupt
        return add(*args, **kwargs)

    expected = sweep(lm, tmp_path / "whole", counts=[1, 2, 5])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Table, "add", interrupted)
        sweep(lm, tmp_path / "s", counts=[1, 2, 5])
    rows = sweep(lm, tmp_path / "s", counts=[1, 2, 5])
    key = ("method", "facts", *SCORES)
    assert [[row[name] for name in key] for row in rows] == [[row[name] for name in key] for row in expected]
    assert not (tmp_path / "s" / "unedited").exists()


def test_a_folder_in_which_another_process_is_at_work_is_refused(lm: le.LanguageModel, tmp_path: Path) -> None:
    sweep(lm, tmp_path / "s")
    with locked(tmp_path / "s"), pytest.raises(le.ResumeError, match="another process"):
        sweep(lm, tmp_path / "s")


def test_a_sweep_does_not_go_on_with_other_tensors_or_versions(
    lm: le.LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep(lm, tmp_path / "s")
    known = covariance_of(lm)
    other = le.Covariance({matrix: 2 * moment for matrix, moment in known.moments.items()}, known.provenance)
    with pytest.raises(ValueError, match="a sweep with other covariance tensors"):
        sweep(lm, tmp_path / "s", covariance=other)
    monkeypatch.setattr(sweeping, "computing", lambda lm: {"dtype": "float32", "versions": {"torch": "1.0"}})
    with pytest.raises(ValueError, match="a sweep with other versions"):
        sweep(lm, tmp_path / "s")


def test_values_of_finished_chunks_are_kept(
    lm: le.LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched = []
    search = targets.search

    def stop_in_the_third_chunk(editor, indices, *args):
        searched.append(len(indices))
        if len(searched) == 3:
            raise KeyboardInterrupt
        search(editor, indices, *args)

    monkeypatch.setattr(targets, "search", stop_in_the_third_chunk)
    with pytest.raises(KeyboardInterrupt):
        sweep(lm, tmp_path / "s", facts_per_chunk=2)
    sweep(lm, tmp_path / "s", facts_per_chunk=2)
    assert searched == [2, 2, 1, 1]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("grid", {"grid": {"lambda_": [1.0]}}),
        ("counts", {"counts": [4]}),
        ("facts_per_round", {"facts_per_round": [2]}),
        ("methods", {"methods": {"MEMIT": replace(MEMIT, lambda_=6.0)}}),
        ("facts", {"facts": [replace(FACTS[0], target_new="Berlin"), *FACTS[1:]]}),
        ("on_collision", {"on_collision": "merge"}),
    ],
)
def test_another_sweep_in_the_same_folder_is_refused(
    lm: le.LanguageModel, tmp_path: Path, name: str, changes: dict[str, Any]
) -> None:
    sweep(lm, tmp_path / "s")
    text = (tmp_path / "s" / "runs.csv").read_text()
    with pytest.raises(ValueError, match=f"holds a sweep with other .*{name}.*choose another folder"):
        sweep(lm, tmp_path / "s", **changes)
    assert (tmp_path / "s" / "runs.csv").read_text() == text


def test_a_folder_of_something_else_is_refused(lm: le.LanguageModel, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("do not touch")
    with pytest.raises(ValueError, match="holds no sweep"):
        sweep(lm, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_texts_in_the_table_come_back_as_they_were(tmp_path: Path) -> None:
    texts = ["bare", "true", "NaN", "", "1", "[1]", "two words", 'a "quoted", one']
    run = plan({"ROME": ROME}, 1, grid={"key": ["bare"]})[0]
    table = Table(tmp_path / "runs.csv", ["key"])
    for text in texts:
        table.add(replace(run, settings={"key": text}), le.Evaluation({}, {}, []))
    assert [row["key"] for row in Table(tmp_path / "runs.csv", ["key"]).rows] == texts
    assert "ROME,bare,1,1," in (tmp_path / "runs.csv").read_text()


def test_damaged_files_are_named(lm: le.LanguageModel, tmp_path: Path) -> None:
    sweep(lm, tmp_path / "s")
    table = tmp_path / "s" / "runs.csv"
    text = table.read_text()
    table.write_text(text + "MEMIT,5\n")
    with pytest.raises(ValueError, match=r"runs\.csv is damaged"):
        sweep(lm, tmp_path / "s")
    table.unlink()
    (values,) = (tmp_path / "s" / "values").rglob("*.safetensors")
    values.write_bytes(values.read_bytes()[:50])
    with pytest.raises(RuntimeError, match=rf"1 of 1 runs failed[\s\S]*{values.name} is damaged.*delete it"):
        sweep(lm, tmp_path / "s")


@pytest.mark.parametrize("thresholds", [[1e-9, 0.9], [0.9, 1e-9]])
def test_a_run_that_fails_does_not_stop_the_others(
    lm: le.LanguageModel, tmp_path: Path, thresholds: list[float]
) -> None:
    alphaedit = le.AlphaEdit(layers=(1, 2), values=VALUES, contexts=CONTEXTS)
    for _ in range(2):  # no eigenvalue is below the smaller one
        with pytest.raises(RuntimeError, match=r"1 of \d runs failed[\s\S]*threshold=1e-09, 5 facts: layer 1: "):
            sweep(lm, tmp_path / "s", {"AlphaEdit": alphaedit}, grid={"threshold": thresholds})
        with (tmp_path / "s" / "runs.csv").open() as file:
            assert [row["threshold"] for row in csv.DictReader(file)] == ["", "0.9"]
    assert (tmp_path / "s" / "sweep.svg").exists()
    assert not lm.weights.owners


# The plan


def test_log17_goes_as_far_as_there_are_facts() -> None:
    assert len(LOG17) == 17 and tuple(round(10 ** (power / 4)) for power in range(17)) == LOG17
    assert [planned.facts for planned in plan({"MEMIT": MEMIT}, 20, "log17")] == [1, 2, 3, 6, 10, 18]


def test_every_combination_is_planned_once() -> None:
    grid = {"layers": [[1], [1, 2]], "values.lr": [0.1, 0.2, 0.3]}
    runs = plan({"a": MEMIT, "b": MEMIT}, 9, [3, 9], [None, 4], grid)
    assert (
        len(runs) == len({str(planned) for planned in runs}) + 12 == 48
    )  # 3 facts are less than a round of 4: 12 twice
    assert {(planned.method.layers, planned.method.values.lr) for planned in runs} == {
        (layers, lr) for layers in ((1,), (1, 2)) for lr in (0.1, 0.2, 0.3)
    }
    assert MEMIT.values == VALUES


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grid": {"lamda": [1.0]}}, r"no method has a field 'lamda'; known are layers, values\.lr,.*lambda_"),
        ({"grid": {"values": [1.0]}}, "no method has a field 'values'"),
        ({"grid": {"lambda_": []}}, "lambda_: expected a list"),
        ({"grid": {"lambda_": 5.0}}, "lambda_: expected a list"),
        ({"grid": {"lambda_": [1.0, -1.0]}}, r"MEMIT cannot take lambda_=-1\.0: .*positive"),
        ({"grid": {"lambda_": ["much"]}}, "MEMIT cannot take lambda_='much'"),
        ({"grid": {"layers": [[1, 9]]}}, "layers 0 to 3"),
        ({"grid": {"layers": [[0, 1]]}}, "no layer 0"),
        ({"counts": [1, 6]}, "counts: 6 facts asked for, but there are 5"),
        ({"counts": [0]}, "counts: 0"),
        ({"counts": []}, "counts"),
        ({"counts": "log18"}, "log18.*log17"),
        ({"facts_per_round": [0]}, "facts_per_round: 0"),
        ({"facts_per_round": []}, "facts_per_round"),
        ({"methods": {"unedited": MEMIT}}, "unedited"),
        ({"facts": []}, "facts"),
        ({"facts": [le.Fact("The capital of {}", "France", "Rome")]}, "target_true"),
        ({"facts": [*FACTS, replace(FACTS[0], target_new="Bonn")]}, "both complete"),
        (
            {"facts": [*FACTS, replace(FACTS[0], prompt="The capital of {} is near")], "on_collision": "error"},
            "nearly equal keys",
        ),
    ],
)
def test_wrong_arguments_are_refused_before_any_run(
    lm: le.LanguageModel, tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, le.CovarianceError), match=message):
        sweep(lm, tmp_path / "s", **arguments)
    assert not (tmp_path / "s").exists()


def test_a_fact_that_is_given_twice_counts_once(lm: le.LanguageModel, tmp_path: Path) -> None:
    with (
        pytest.warns(UserWarning, match="1 fact repeats an earlier one"),
        pytest.raises(ValueError, match=f"{len(FACTS) + 1} facts asked for, but there are {len(FACTS)}"),
    ):
        sweep(lm, tmp_path / "s", facts=[*FACTS, FACTS[0]], counts=[len(FACTS) + 1])


def test_an_edited_model_is_refused(lm: le.LanguageModel, tmp_path: Path) -> None:
    edit = run(lm, FACTS[:1], MEMIT, covariance=covariance_of(lm))
    with pytest.raises(ValueError, match="carries edits"):
        sweep(lm, tmp_path / "s")
    assert edit.is_applied(lm)


# What comes out


@pytest.mark.parametrize(("value", "text"), [(15000.0, "15000"), (0.5, "0.5"), ([4, 5, 6], "4-6"), ((1, 3), "1,3"),
                                             ([7], "7"), (["The", 1, 10], "The,1,10"),
                                             (None, "None"), (True, "True")])  # fmt: skip
def test_values_are_shown_as_people_write_them(value: Any, text: str) -> None:
    assert shown(value) == text


def test_the_best_of_each_method_on_the_most_facts() -> None:
    def row(method: str, lambda_: float | None, facts: int, score: float | None) -> dict[str, Any]:
        return {"method": method, "lambda_": lambda_, "facts": facts, "facts_per_round": facts, "S": score,
                "S_half_width": 1.25}  # fmt: skip

    rows = [row("unedited", None, 9, 99.0), row("M", 1.0, 3, 98.0), row("M", 1.0, 9, 70.0), row("M", 2.0, 9, 80.0),
            row("M", 3.0, 9, None), row("R", None, 9, 60.0)]  # fmt: skip
    assert best(rows) == [
        "best on 9 facts: M, S 80.0 ± 1.2, with lambda_=2, 9 facts a round",
        "best on 9 facts: R, S 60.0 ± 1.2, with 9 facts a round",
    ]


def series(svg: str) -> list[dict[str, int]]:
    """For each panel, colour -> points of the line drawn in it inside the axes."""
    panels = []
    axes, _, _ = svg.partition('<g id="legend')
    for panel in re.split(r'<g id="axes_\d+">', axes)[1:]:
        lines = re.findall(r'<path d="([^"]*)" style="fill: none; [^"]*stroke: (#\w+)', panel)
        panels.append({color: 0 for _, color in lines})
        for points, color in lines:
            panels[-1][color] = max(panels[-1][color], len(re.findall("[ML]", points)))
    return panels


def test_the_figure_shows_every_series(lm: le.LanguageModel, tmp_path: Path) -> None:
    sweep(lm, tmp_path / "s", {"MEMIT": MEMIT, "ROME": ROME}, counts=[1, 2, 5], grid={"lambda_": [5.0, 50.0]})
    svg = (tmp_path / "s" / "sweep.svg").read_text()
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    for label in ("unedited", "MEMIT, λ 5", "MEMIT, λ 50", "ROME", "facts", "Score (S)", "Neighborhood (NS)"):
        assert label in texts, label
    # three counts each; the fourth is the unedited model, and lines of two points are the grid and the intervals
    wanted = {PALETTE["series-0"], PALETTE["series-1"], PALETTE["series-2"]}
    panels = series(svg)
    assert len(panels) == 4
    for panel in panels:
        lines = {color: points for color, points in panel.items() if points == 3}
        assert len(lines) == 4 and wanted < lines.keys(), panel


def test_a_method_without_the_swept_field_is_a_level_line(lm: le.LanguageModel, tmp_path: Path) -> None:
    sweep(lm, tmp_path / "s", {"MEMIT": MEMIT, "ROME": ROME}, facts=FACTS[:2], grid={"lambda_": [5.0, 50.0, 500.0]})
    svg = (tmp_path / "s" / "sweep.svg").read_text()
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    assert {"unedited", "MEMIT", "ROME", "λ"} <= set(texts)
    for panel in series(svg):
        assert panel[PALETTE["series-0"]] == 3 and panel[PALETTE["series-1"]] == 2


def test_lists_of_lists_are_swept_too(lm: le.LanguageModel, tmp_path: Path) -> None:
    prefixes = [[["The", 1, 4]], [["The", 1, 4], ["I", 1, 4]], [["Because", 1, 4]]]
    rows = sweep(lm, tmp_path / "s", facts=FACTS[:2], grid={"contexts.prefixes": prefixes})
    assert [row["contexts.prefixes"] for row in rows[1:]] == prefixes
    assert "The,1,4,I,1,4" in (tmp_path / "s" / "sweep.svg").read_text()


def test_equal_tables_give_equal_figures(lm: le.LanguageModel, tmp_path: Path) -> None:
    sweep(lm, tmp_path / "s", counts=[1, 2])
    first = (tmp_path / "s" / "sweep.svg").read_bytes()
    (tmp_path / "s" / "sweep.svg").unlink()
    sweep(lm, tmp_path / "s", counts=[1, 2])
    assert (tmp_path / "s" / "sweep.svg").read_bytes() == first


# The command


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lm: le.LanguageModel) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny_model("llama").save_pretrained("model")
    tiny_tokenizer("bytelevel").save_pretrained("model")
    covariance_of(lm).save("stats")
    le.write_facts("facts.jsonl", [le.Fact("{} was", "Nobody", "here", target_true="there"), *FACTS])
    return tmp_path


def config(**changes: Any) -> str:
    settings = {"layers": [1, 2], "values": {"steps": 3}, "contexts": {"prefixes": [["The", 1, 5]]}}
    content = {
        "lm": "model", "facts": "facts.jsonl", "skip": 1, "limit": 4, "covariance": "stats", "out": "out",
        "counts": "log17", "facts_per_round": [None, 2], "grid": {"lambda_": [1e1, 1e3]},
        "methods": {"MEMIT": {"class_path": "lightedit.MEMIT", "init_args": settings}}, **changes,
    }  # fmt: skip
    Path("sweep.yaml").write_text(yaml.safe_dump(content))
    return "sweep.yaml"


def test_the_command_runs_a_file_of_settings(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["sweep", "--config", config()])
    printed = capsys.readouterr()
    assert "best on 3 facts: MEMIT, S " in printed.err and "sweep.svg in out" in printed.out
    with Path("out/runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["facts"] for row in rows} == {"1", "2", "3"}
    assert len(rows) == 3 + 2 * 4  # unedited; for each λ: 1, 2, 3, and 3 in rounds of 2
    main(["sweep", "--config", config()])
    assert "8 runs are finished already" in capsys.readouterr().err  # the unedited model is no run


def test_the_command_refuses_wrong_settings(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for changes, message in (
        ({"grid": {"gama": [1]}}, "known are"),
        ({"skip": -1}, "skip"),
        ({"skip": 6, "limit": None}, "none"),
        ({"counts": "log16"}, "log16"),
        ({"methods": {"MEMIT": {"class_path": "lightedit.MEMOT"}}}, "MEMOT"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["sweep", "--config", config(**changes)])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
        assert not Path("out").exists()


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "configs/sweeps").glob("*.yaml")), ids=lambda p: p.stem
)
def test_configurations_are_complete(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["sweep", "--config", str(path), "--print_config"])
    assert not stop.value.code
    assert {"MEMIT", "PMET", "ROME", "GRACE", "FT"} & yaml.safe_load(capsys.readouterr().out)["methods"].keys()
