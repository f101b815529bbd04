"""The benchmarks' counts, checks and records, on a tiny model."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import (
    Options,
    Result,
    WrongResultError,
    covariance,
    evaluation,
    ops,
    registry,
    run,
    sequence,
    update,
    values,
)
from benchmarks.figure import draw
from benchmarks.run import RESULTS
from lightedit.data.facts import Fact, read_facts
from lightedit.data.prompts import Contexts, tokenize_facts
from lightedit.lm import LanguageModel
from lightedit.methods import Method
from lightedit.methods.closed_form.value_settings import ValueSettings
from lightedit.ops import implementations
from tests.models import VOCABULARY, tiny_model, tiny_tokenizer
from tests.runs import covariance_of
from tests.sweeps.runs import FACTS as COMPLETE
from tests.sweeps.runs import MEMIT, ROME

CONTEXTS = Contexts(("{}", "The river is long. {}"), (0.5, 0.5))
FACTS = [Fact("The capital of {}", "France", "Rome"), Fact("{} is a city in the north of", "London", "Spain and Italy")]
LAYER, LAYERS = 1, 4
# q and o, k and v, then the three matrices of the MLP, in one block of the tiny llama
MATRICES = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 80


@pytest.fixture(autouse=True)
def _cheap_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "SQUARE", 64)


@pytest.fixture
def lm() -> LanguageModel:
    return LanguageModel(tiny_model("llama", layers=LAYERS), tiny_tokenizer("bytelevel"))


def measure(lm: LanguageModel, reference_facts: int | None = None, threshold: float = 0.0) -> Result:
    settings = ValueSettings(lr=0.3, steps=5, clamp_norm_factor=2.0, loss_threshold=threshold)
    return values.run(lm, FACTS, CONTEXTS, LAYER, settings, reference_facts)


# Without a threshold all 4 steps are taken. A loss below it ends a fact at that evaluation, before its step: here
# none, the second fact before the first, or both at once.
@pytest.mark.parametrize(
    ("threshold", "steps", "evaluations"), [(0.0, [4, 4], [4, 4]), (7.148, [3, 2], [4, 3]), (1e6, [0, 0], [1, 1])]
)
def test_counts_are_those_of_the_rows_and_evaluations(
    lm: LanguageModel, threshold: float, steps: list[int], evaluations: list[int]
) -> None:
    figures = measure(lm, threshold=threshold).figures
    tokens, reads = [], []
    for fact in tokenize_facts(lm.tokenizer, FACTS, CONTEXTS):
        rows = (*fact.rows, fact.subject)
        tokens.append(sum(len(row.ids) - row.lookup for row in rows))
        reads.append(sum(max(1, len(row.targets)) for row in rows))
    assert figures["steps_per_fact"] == figures["reference_steps_per_fact"] == sum(steps) / 2
    assert figures["evaluations"] == sum(evaluations)
    assert figures["tokens_real"] == sum(n * count for n, count in zip(tokens, evaluations, strict=True))
    assert figures["head_reads"] == sum(n * count for n, count in zip(reads, evaluations, strict=True))


def test_derived_figures_follow_from_the_measured_ones(lm: LanguageModel) -> None:
    figures = measure(lm).figures
    ours = sum(figures["ours_seconds"]) / 2 / len(FACTS)
    assert figures["ratio"] == pytest.approx(figures["reference_seconds"] / len(FACTS) / ours)
    assert min(figures["ratios"]) <= figures["ratio"] <= max(figures["ratios"])
    rate = max(figures["matrix_rates"].values())
    blocks = 4 * figures["tokens_real"] * (LAYERS - 1 - LAYER) * MATRICES
    head = 4 * figures["head_reads"] * 32 * VOCABULARY
    assert figures["time_over_floor"] == pytest.approx(ours * len(FACTS) / (blocks / rate))
    assert figures["time_over_floor_with_head"] == pytest.approx(ours * len(FACTS) / ((blocks + head) / rate))


def test_matrix_rate_is_flops_over_the_median_time(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([0.0, 0.5, 1.0, 1.25, 2.0, 9.0] * 2)  # 0.5, 0.25 and 7 s for each size
    monkeypatch.setattr(values, "_REPEATS", 3)
    monkeypatch.setattr(values.time, "perf_counter", lambda: next(readings))
    assert values._matrix_rates(lm) == {
        "[1024, 32] x [32, 80]": 2 * 1024 * 32 * 80 / 0.5,
        "[64, 64] x [64, 64]": 2 * 64**3 / 0.5,
    }


@pytest.mark.parametrize("wrong", [1 + 3e-4, float("nan")])
def test_a_target_unlike_the_reference_ends_the_row(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch, wrong: float
) -> None:
    right = values.published_values
    calls = 0

    def second_is_wrong(*args, **kwargs):
        nonlocal calls
        calls += 1
        value = right(*args, **kwargs)
        return value if calls == 1 else value._replace(target=value.target * wrong)

    monkeypatch.setattr(values, "published_values", second_is_wrong)
    with pytest.raises(WrongResultError, match="Spain and Italy"):
        measure(lm)


def test_the_second_run_is_checked_too(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    right = values.search_values

    def drifted(*args):
        run = right(*args)
        if "after" in args[-1]:
            run.values.targets.mul_(1 + 3e-4)
        return run

    monkeypatch.setattr(values, "search_values", drifted)
    with pytest.raises(WrongResultError, match="France"):
        measure(lm)


def test_a_limited_reference_says_so_and_counts_its_own_facts(lm: LanguageModel) -> None:
    result = measure(lm, reference_facts=1)
    assert result.figures["reference_facts"] == 1
    assert result.figures["reference_seconds_per_fact"] == result.figures["reference_seconds"]
    assert "first 1 of 2 facts only" in result.notes[0]
    assert measure(lm).notes == []


def test_built_in_facts_replace_missing_data_and_say_so(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTEDIT_DATA", str(tmp_path))
    facts, source = values.load_facts(32)
    assert len({fact.subject for fact in facts}) == 32
    assert len({fact.relation for fact in facts}) > 1
    assert "built-in" in source
    with pytest.raises(ValueError, match="100000 facts asked"):
        values.load_facts(100_000)


def test_counterfact_of_the_data_folder_comes_first(data_dir) -> None:
    facts, source = values.load_facts(2)
    assert facts == read_facts(data_dir / "counterfact_1000.json")[:2]
    assert "CounterFact" in source


def test_a_run_prints_the_table_and_writes_where_it_was_measured(
    tmp_path, lm: LanguageModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    monkeypatch.setitem(run.ROWS, "values", lambda options: measure(lm, options.reference_facts))
    assert run.main(["values", "--facts", "2", "--reference-facts", "1"]) == 0
    record = json.loads((tmp_path / "values.json").read_text())
    assert record["figures"]["reference_facts"] == 1
    assert record["versions"]["torch"] == torch.__version__
    assert record["versions"].keys() == {"python", "torch", "transformers", "lightedit"}
    assert record["machine"].keys() == {"cpu", "cores", "threads", "memory_gib"}
    assert record.keys() >= {"commit", "uncommitted_changes", "date", "notes"}
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if "ours over the reference" in line)
    assert line.split("reference")[1].split()[0] == f"{record['figures']['ratio']:.2f}"
    assert "note: values: a quick look" in printed


def test_a_wrong_row_reports_no_speed(
    tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(options: Options) -> Result:
        raise WrongResultError("targets differ")

    monkeypatch.setattr(run, "RESULTS", tmp_path)
    monkeypatch.setitem(run.ROWS, "values", wrong)
    assert run.main(["values"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and "values: targets differ" in captured.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [["speed"], ["--facts", "0"], ["--facts", "2", "--reference-facts", "3"]])
def test_bad_arguments_end_before_any_row(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(run.ROWS, "values", lambda options: pytest.fail("a row ran"))
    with pytest.raises(SystemExit, match="2"):
        run.main(arguments)


# Evaluation


def test_evaluation_row_counts_all_answers_and_checks_them(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = evaluation.run(lm, COMPLETE).figures
    assert figures["records"] == 5 and figures["pairs"] == 5 * 2 * (1 + 2 + 2)
    assert 0 < figures["largest_difference"] < 1e-4
    assert figures["ratio"] == pytest.approx(figures["published_seconds"] / (sum(figures["seconds"]) / 2))
    monkeypatch.setattr(evaluation, "TOLERANCE", 1e-12)
    with pytest.raises(WrongResultError, match="no speed is reported"):
        evaluation.run(lm, COMPLETE)


def in_float64() -> LanguageModel:
    return LanguageModel(tiny_model("llama", layers=LAYERS).double(), tiny_tokenizer("bytelevel"))


@pytest.mark.parametrize("method", [MEMIT, ROME], ids=["MEMIT", "ROME"])
def test_single_row_checks_every_answer_against_both_loops(
    lm: LanguageModel, method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = lm, COMPLETE, method, covariance_of(lm), in_float64, 2
    figures = evaluation.run_single(*arguments).figures
    for loop in (figures["loop"], figures["published"]):
        assert loop["facts"] == loop["same_scores"] == 2 and loop["unstable"] == []
        assert 0 < loop["median_difference"] <= loop["largest_difference"] < 1e-3
        assert loop["ratio"] == pytest.approx(loop["seconds_per_fact"] / figures["seconds_per_fact"])
    monkeypatch.setattr(evaluation, "TOLERANCE", 1e-12)
    with pytest.raises(WrongResultError, match="no speed is reported"):
        evaluation.run_single(*arguments)


def test_facts_of_the_single_row_that_differ_by_rounding_must_agree_in_float64(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "UNSTABLE", 1e-12)
    arguments = lm, COMPLETE, MEMIT, covariance_of(lm)
    result = evaluation.run_single(*arguments, in_float64, reference_facts=2)
    for loop in (result.figures["loop"], result.figures["published"]):
        assert loop["unstable"] == [0, 1] and 1e-12 < loop["largest_difference"] < 1e-3
    assert ("facts beyond 1e-12 nats or of other scores, equal in float64", "number 0, 1") in result.table
    with pytest.raises(WrongResultError, match="no speed is reported"):  # float32 does not serve for float64
        monkeypatch.setattr(evaluation, "EXACT_TOLERANCE", 1e-9)
        evaluation.run_single(*arguments, lambda: lm, reference_facts=2)


def test_a_fact_of_other_scores_must_agree_in_float64_too() -> None:
    fact = replace(COMPLETE[0], paraphrase_prompts=(), neighborhood_prompts=())
    loop = evaluation._loop(lambda _: torch.tensor([1.0002, 1.0]), [fact], [torch.tensor([1.0, 1.0001])], "one")
    assert (loop.same_scores, loop.unstable) == (0, [0]) and loop.largest_difference < evaluation.TOLERANCE


# Ops


def small_cases() -> list[registry.Case]:
    cpu = torch.device("cpu")
    return [
        registry.second_moment_case(70, 50, torch.float32, cpu),
        registry.second_moment_case(70, 50, torch.bfloat16, cpu),
        registry.solve_case(70, 5, cpu),
        registry.single_edits_case(70, 5, cpu),
        registry.add_low_rank_case(80, 5, cpu),
        registry.rowwise_case(3, 80, cpu),
        registry.target_nll_kl_case(50, cpu),
    ]


@pytest.fixture
def _small_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "SQUARE", 32)
    monkeypatch.setattr(ops, "COPY", 64)


@pytest.mark.usefixtures("_small_ceilings")
def test_every_op_is_right_and_its_figures_follow_from_the_times() -> None:
    figures = ops.run(small_cases(), torch.device("cpu")).figures
    for case, figure in zip(small_cases(), figures["cases"], strict=True):
        assert figure["error"] <= case.tolerance
        assert figure["ratios"].keys() >= case.baselines.keys()
        for name, seconds in figure["baseline_seconds"].items():
            assert figure["ratios"][name] == pytest.approx(seconds / figure["seconds"])
    first = figures["cases"][0]
    assert first["shares"]["float32 product"] == pytest.approx(
        50 * 70 * 71 / first["seconds"] / figures["ceilings"]["float32 product"]
    )
    assert json.dumps(figures)


@pytest.mark.usefixtures("_small_ceilings")
@pytest.mark.parametrize("wrong", [1.0, float("nan")])
def test_an_op_with_a_wrong_result_is_not_timed(wrong: float) -> None:
    def work() -> None:
        pytest.fail("it was timed")

    case = registry.Case("add_low_rank_", "tiny", work, lambda: wrong, 0.1, {})
    with pytest.raises(WrongResultError, match="add_low_rank_, tiny: the result is"):
        ops.run([case], torch.device("cpu"))


@pytest.mark.usefixtures("_small_ceilings")
def test_an_op_is_timed_against_its_reference() -> None:
    seen = []
    live = implementations()["add_low_rank_"]["cpu"]
    if live == "reference":
        pytest.skip("nothing else is live here")
    case = registry.Case(
        "add_low_rank_", "tiny", lambda: seen.append(implementations()["add_low_rank_"]["cpu"]), lambda: 0.0, 0.1, {}
    )
    (figure,) = ops.run([case], torch.device("cpu")).figures["cases"]
    assert figure["ratios"].keys() == {"its reference"}
    assert seen[:4] == [live, "reference"] * 2


def test_an_error_is_measured_on_the_op_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(gram: torch.Tensor, keys: torch.Tensor) -> None:
        gram += 1.001 * (keys.float().T @ keys.float())

    monkeypatch.setattr(registry, "second_moment_", too_large)
    for case in small_cases()[:2]:
        assert case.error() > case.tolerance


def test_covariance_row_checks_its_matrices(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = covariance.run(lm, (1, 2), 1000).figures
    assert figures["tokens"] == 1000 and figures["largest_difference"] < 1e-5
    assert len(figures["seconds"]) == 3 and min(figures["seconds"].values()) > 0
    published = covariance._published
    monkeypatch.setattr(covariance, "_published", lambda *args: {n: 1.001 * m for n, m in published(*args).items()})
    with pytest.raises(WrongResultError, match="no speed is reported"):
        covariance.run(lm, (1,), 1000)


def test_update_row_checks_its_changes(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = update.run(lm, FACTS, MEMIT).figures
    assert figures["facts"] == 2 and 0 < figures["largest_difference"] < 1e-4
    assert not lm.weights.owners
    monkeypatch.setattr(update, "TOLERANCE", 1e-12)
    with pytest.raises(WrongResultError, match="no speed is reported"):
        update.run(lm, FACTS, MEMIT)


@pytest.mark.usefixtures("_small_ceilings")
def test_the_ops_figure_has_a_mark_for_every_baseline(tmp_path: Path) -> None:
    cases = ops.run(small_cases(), torch.device("cpu")).figures["cases"]
    draw(tmp_path / "ops.svg", cases, "this machine")
    text = (tmp_path / "ops.svg").read_text()
    for case in cases:
        assert case["shape"] in text
        assert all(name in text for name in case["ratios"])
    assert [path.name for path in tmp_path.iterdir()] == ["ops.svg"]


def test_the_figure_of_sequences_has_every_method_and_round(tmp_path: Path) -> None:
    tables = {name: sequence.read_retention(RESULTS / file) for name, file in sequence.TABLES.items()}
    assert {round_: [origin for origin, _ in scores] for round_, scores in tables["MEMIT"].items()} == {
        5: [1, 2, 3, 4, 5], 10: [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    }  # fmt: skip
    assert tables["ENCORE"][5][0] == (1, pytest.approx(81.358, abs=1e-3))  # as in docs/results.md
    sequence.draw(tmp_path / "sequence.svg", tables)
    text = (tmp_path / "sequence.svg").read_text()
    assert all(f">{name}<" in text for name in tables)
    assert text.count('id="PathCollection') + text.count('id="line2d') >= 2 * len(tables)
    assert [file.name for file in tmp_path.iterdir()] == ["sequence.svg"]


def test_limit_row_times_the_search_and_the_arithmetic_in_it(lm: LanguageModel) -> None:
    methods = {"single-rome": (ROME, CONTEXTS), "single-memit": (MEMIT, CONTEXTS)}
    result = evaluation.run_limit(lm, FACTS, methods)
    assert result.figures["facts"] == 2
    for name in methods:
        parts = result.figures[name]
        assert 0 < parts["the matrix products alone"] < parts["one fact after the other"]
        assert (f"{name}: facts together", f"{parts['facts together']:.2f} s/fact") in result.table
