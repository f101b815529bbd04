"""What a report says: its runs, its figures and facts, all text escaped; and what it refuses."""

import doctest
import math
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files

import pytest
import torch

import lightedit as le
from lightedit.evaluation.evaluate import summarize
from lightedit.figures import PALETTE, Axis, Line, Panel
from lightedit.metrics import PromptScores, RecordScores
from lightedit.reports import html
from lightedit.reports.charts import Interval, interval_figure, legend, line_figure
from lightedit.reports.curves import curves_section
from lightedit.reports.facts import EACH, chosen, facts_section, ranked
from lightedit.reports.outcomes import outcomes_section
from lightedit.reports.page import page, report
from lightedit.reports.reading import ReportedRun, read_runs
from lightedit.reports.scores import better, explanation, higher_is_better, scores_section
from lightedit.reports.settings import settings_section
from tests.reports.runs import FACTS, MARKUP, evaluation, records, save_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("runs") / "first")


@pytest.fixture(scope="module")
def run(folder):
    return read_runs([folder])[0]


class _Reader(HTMLParser):
    """Tags, attributes and text as a browser would take them; checks that what is opened is closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self._open = [], [], "", []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in ("meta", "link", "br"):
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data


# Escaping


def test_elements_escape_text_and_attributes():
    assert doctest.testmod(html).failed == 0 and doctest.testmod(html).attempted > 0
    built = html.element("p", MARKUP, html.element("b", "'\"&"), title='"><i>', class_="x")
    assert "<script" not in built and "<i>" not in built
    reader = _Reader(built)
    assert reader.text == MARKUP + "'\"&" and ("title", '"><i>') in reader.attributes
    assert MARKUP not in html.group("a", MARKUP, None)


def test_markup_in_facts_completions_names_and_settings_stays_text(tmp_path):
    folder = save_run(tmp_path / "<b>run", method="<i>METHOD</i>")
    first = _Reader(page(read_runs([folder, save_run(tmp_path / "other")])))
    assert not {"script", "img", "i"} & set(first.tags)
    assert not [name for name, _ in first.attributes if name.startswith("on")]
    assert first.text.count(MARKUP) > 3 and "<b>run" in first.text and "<i>METHOD</i>" in first.text
    assert "a & b &amp; c" in first.text


def test_nothing_is_fetched(folder):
    reader = _Reader(page(read_runs([folder])))
    links = [value for name, value in reader.attributes if name in ("src", "href", "srcset", "data", "action")]
    assert links == ["data:,", "#scores", "#rounds", "#facts", "#settings"]
    assert "url(" not in reader.text and "@import" not in reader.text


def test_half_a_surrogate_pair_does_not_stop_a_report(tmp_path):
    evaluation().save(tmp_path / "scores.json")
    text = (tmp_path / "scores.json").read_text().replace("person 5", "person \\ud800")
    (tmp_path / "scores.json").write_text(text)
    assert "person ?" in report(tmp_path / "scores.json", tmp_path / "x.html").read_text(encoding="utf-8")


# Outcomes


def test_outcomes_come_first_with_every_fact_and_those_that_fail_on_top(tmp_path):
    folder = save_run(tmp_path / "run")
    edit = le.Edit.load(folder)
    edit.outcomes = tuple(
        le.Outcome(fact, f"before {number}", f"after {number}", number != 17, 0.125, number + 1, 0.25)
        for number, fact in enumerate(FACTS)
    )
    edit.damage = (le.Damage("Dear friend, I", "am", MARKUP, 1.5),)
    edit.save(folder, overwrite=True)
    reader = _Reader(page(read_runs([folder])))
    headings = [
        reader.text.index(title) for title in ("19 of 20 facts hold", "Elsewhere, the largest", "How these are chosen")
    ]
    assert headings == sorted(headings)
    assert all(f"before {number}" in reader.text and f"after {number}" in reader.text for number in range(20))
    assert reader.text.index("after 17") < reader.text.index("after 0")
    assert reader.text.count("does not hold") == 1 and "0.125" in reader.text and "Dear friend, I" in reader.text
    assert "script" not in reader.tags and MARKUP in reader.text


def test_many_facts_that_hold_are_folded():
    facts = [replace(FACTS[3], subject=f"person {number}") for number in range(50)]
    outcomes = tuple(le.Outcome(fact, "", "", True, 0.5, 1) for fact in facts)
    built = outcomes_section([ReportedRun("run", le.Edit("tiny", "0", facts=facts, outcomes=outcomes))])
    assert "20 more that hold" in built and all(f"person {number}<" in built for number in range(50))
    assert outcomes_section([ReportedRun("run", le.Edit("tiny", "0"))]) is None


# Runs


def test_a_saved_run_is_read_back(folder, run):
    assert run.name == "first"
    assert run.edit.facts == FACTS and run.after.records[3]["subject"] == FACTS[3].subject
    assert [row["round"] for row in run.health] == [1, 2, 3, 4]
    assert len(run.retention) == 1 + 2 + 3 + 4
    assert le.Edit.load(folder).tables == {}


def test_an_edit_without_evaluations_has_curves_and_settings_alone(folder, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(folder, old, ignore=shutil.ignore_patterns("before.json", "after.json", "*.csv"))
    found = read_runs([old])[0]
    assert found.before is None and found.after is None
    text = _Reader(page([found])).text
    assert "Settings and provenance" in text and "±" not in text


def test_a_file_and_a_folder_of_scores_are_runs(tmp_path):
    evaluation(3.0).save(tmp_path / "b.json")
    evaluation(1.0).save(tmp_path / "a.json")
    assert [run.name for run in read_runs([tmp_path])] == ["a", "b"]
    assert [run.name for run in read_runs([tmp_path / "b.json"])] == ["b"]
    assert read_runs([tmp_path / "b.json"])[0].after.scores == evaluation(3.0).scores


def test_a_file_of_scores_may_hold_those_before(tmp_path):
    evaluation(3.0).save(tmp_path / "scores.json", before=evaluation(-2.0))
    (run,) = read_runs([tmp_path / "scores.json"])
    assert run.before.scores == evaluation(-2.0).scores and run.after.scores == evaluation(3.0).scores
    assert le.Evaluation.load(tmp_path / "scores.json").scores == evaluation(3.0).scores
    text = _Reader(page([run])).text
    assert any(fact.paraphrase_prompts[0] in text for fact in FACTS[1:]) and "every prompt" in text
    assert "before" in text and f"{run.before.scores['ES']:.1f}" in text


def test_a_log_alone_is_a_run(folder, tmp_path):
    shutil.copy(folder / "retention.csv", tmp_path)
    (found,) = read_runs([tmp_path])
    assert found.edit is None and len(found.retention) == 10
    assert curves_section([found]) is not None


def test_rounds_that_were_taken_back_are_left_out(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "x")
    with (tmp_path / "x" / "health.csv").open("a") as file:
        file.write("5,25,9.0,900.0,45.0,80.0,30.0,70.0\n")
    assert [row["round"] for row in read_runs([tmp_path / "x"])[0].health] == [1, 2, 3, 4]


def test_runs_of_one_name_are_told_apart(tmp_path):
    evaluation(3.0).save(tmp_path / "scores.json")
    (tmp_path / "other").mkdir()
    evaluation(3.0).save(tmp_path / "other" / "scores.json")
    names = [run.name for run in read_runs([tmp_path / "scores.json", tmp_path / "other" / "scores.json"])]
    assert names == [f"{tmp_path.name}/scores", "other/scores"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such run.*lightedit edit --out"),
        (lambda path: path.mkdir(), "holds no run: none of edit.json"),
        (lambda path: path.write_text("{}"), "not a saved evaluation"),
        (lambda path: (path.mkdir(), (path / "edit.json").write_text("{}")), "whole edit"),
        (lambda path: (path.mkdir(), (path / "retention.csv").write_text("a,b\n1,2\n")), "retention.csv is damaged"),
        (lambda path: (path.mkdir(), (path / "package.json").write_text("{}")), "package.json is not a saved"),
    ],
)
def test_what_is_no_run_is_refused_by_name(tmp_path, make, message):
    path = tmp_path / "run"
    make(path)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        report([path], tmp_path / "report.html")
    assert "run" in str(error.value) and not (tmp_path / "report.html").exists()


def test_no_run_and_a_run_given_twice_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="none given"):
        report([], tmp_path / "report.html")
    with pytest.raises(ValueError, match="2 times"):
        report([folder, folder / ".." / folder.name], tmp_path / "report.html")


# The file


def test_only_a_report_is_replaced(folder, tmp_path):
    out = tmp_path / "report.html"
    report([folder], out)
    first = out.read_bytes()
    assert report(folder, out) == out and out.read_bytes() == first
    other = tmp_path / "notes.html"
    other.write_text("mine")
    with pytest.raises(ValueError, match=r"notes\.html exists and is no report"):
        report([folder], other)
    assert other.read_text() == "mine"
    report([folder], other, overwrite=True)
    assert other.read_bytes() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.html", "report.html"]


def test_a_missing_folder_is_refused_before_runs_are_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        report(["no such run"], tmp_path / "nowhere" / "report.html")
    with pytest.raises(ValueError, match="is a folder"):
        report(["no such run"], tmp_path)


def test_a_page_holds_only_the_facts_that_it_shows(tmp_path):
    facts = [
        le.Fact("{} was born in", f"subject {number}", "Rome", target_true="Paris", neighborhood_prompts=("a b",) * 10)
        for number in range(300)
    ]
    evaluation(2.0, facts=facts).save(tmp_path / "scores.json")
    text = report(tmp_path / "scores.json", tmp_path / "report.html").read_text()
    assert len(re.findall("subject [0-9]+", text)) == 3 * EACH
    assert len(text) < 60_000 < (tmp_path / "scores.json").stat().st_size


# Scores


def test_better_needs_intervals_that_do_not_overlap():
    assert better([(1.0, 2.0), (2.1, 3.0)], higher=True) == 1
    assert better([(1.0, 2.0), (2.1, 3.0)], higher=False) == 0
    assert better([(1.0, 2.0), (2.0, 3.0)], higher=True) is None
    assert better([(1.0, 2.0), (5.0, 6.0), (5.5, 7.0)], higher=True) is None
    assert better([(8.0, 9.0), (5.0, 6.0), (5.5, 7.0)], higher=True) == 0
    assert better([(1.0, 2.0), (math.nan, math.nan)], higher=True) is None
    assert better([(1.0, 2.0), None], higher=True) is None
    assert better([(1.0, 2.0)], higher=True) is None


def rows_of(section):
    """Row's name -> the text of its cells."""
    rows = re.findall(r'<tr><th scope="row"[^>]*><b>(.*?)</b>.*?</th>(.*?)</tr>', section)
    return {name: [_Reader(cell).text for cell in re.findall("<td.*?</td>", cells)] for name, cells in rows}


def test_one_run_is_set_beside_its_unedited_model(run):
    cells = rows_of(scores_section([run]))["ES"]
    low, high = run.after.intervals["ES"]
    old, new = run.before.scores["ES"], run.after.scores["ES"]
    assert cells[0].startswith(f"{old:.1f} ± ") and "better" not in cells[0]
    assert cells[1] == f"{new:.1f} ± {(high - low) / 2:.1f}better"
    assert cells[2] == f"+{new - old:.1f}"


def test_several_runs_share_the_unedited_model_and_are_compared_with_one_another(run):
    weak = ReportedRun("weak", before=run.before, after=evaluation(-1.0))
    cells = rows_of(scores_section([run, weak]))["PS"]
    assert len(cells) == 3
    assert ["better" in cell for cell in cells] == [False, True, False]
    alike = ReportedRun("alike", before=run.before, after=run.after)
    assert "better</span>" not in scores_section([run, alike])


def test_runs_scored_on_other_facts_are_not_compared(run):
    weak = ReportedRun("weak", after=evaluation(-1.0, facts=FACTS[:15]))
    section = scores_section([run, weak])
    assert "different facts" in section and 'class="better"' not in section


def test_every_metric_is_explained_and_says_which_way_is_better(run):
    assert explanation("ES").startswith("How often the new target is more probable than the true one")
    for name in run.after.scores:
        assert explanation(name) and higher_is_better(name) is True, name
    assert explanation("something new") == "" and higher_is_better("something new") is None


def test_of_perplexity_and_kl_less_is_better_and_both_have_their_unit():
    columns = [ReportedRun(name, after=le.Evaluation({"kl": kl}, {"kl": (kl - 0.001, kl + 0.001)}, []))
               for name, kl in (("a", 0.0123), ("b", 0.5))]  # fmt: skip
    cells = rows_of(scores_section(columns))["KL (nats per token)"]
    assert cells == ["0.0123 ± 0.0010better", "0.5000 ± 0.0010"]


# Facts


def record(es, ps, ns, margin=1.0):
    kinds = {kind: {"nll_wanted": [1.0], "nll_other": [1.0 + margin], "accuracy": [1.0]} for kind in ("efficacy",)}
    return {"ES": es, "PS": ps, "NS": ns, **kinds}


def test_facts_are_ranked_by_their_harmonic_mean_then_by_margin():
    found = [record(100, 50, 50), record(100, 100, 0, 9.0), record(100, 100, 100, 0.5), record(100, 100, 100, 2.0)]
    assert ranked(found) == [3, 2, 0, 1]


def test_facts_without_a_true_target_are_ranked_by_their_accuracies():
    found = [
        {"efficacy_accuracy": share, "efficacy": {"nll_wanted": [nll], "accuracy": [share / 100]}}
        for share, nll in ((50.0, 1.0), (100.0, 2.0), (100.0, 1.0))
    ]
    assert ranked(found) == [2, 1, 0]


def test_best_median_and_worst_are_distinct_and_few_facts_are_shown_all():
    assert chosen(range(9)) == {"All, best first": list(range(9))}
    assert chosen(range(10)) == {"Best": [0, 1, 2], "Median": [3, 4, 5], "Worst": [9, 8, 7]}
    assert chosen(range(101))["Median"] == [49, 50, 51]


def test_a_fact_shows_its_prompts_its_completions_and_who_wins(run):
    best = ranked(run.after.records)[0]
    shown = run.after.records[best]
    old = next(record for record in run.before.records if record["subject"] == shown["subject"])
    text = _Reader(facts_section([run])).text
    first = text[text.index("Best") : text.index("every prompt")]
    assert shown["subject"] in first and shown["target_new"] in first and shown["target_true"] in first
    assert "before" + " ".join(old["continuation"].split()) in first
    won = [sum(a < b for a, b in zip(r["paraphrase"]["nll_wanted"], r["paraphrase"]["nll_other"], strict=True))
           for r in (old, shown)]  # fmt: skip
    assert re.search(rf"paraphrases{won[0]} of 2 won.*{won[1]} of 2 won", first)
    fact = next(fact for fact in FACTS if fact.subject == shown["subject"])
    for prompt in (*fact.paraphrase_prompts, *fact.neighborhood_prompts):
        assert prompt in text


# Curves and settings


def test_curves_hold_what_the_tables_hold(run):
    section = curves_section([run])
    row = run.retention[-1]
    assert "after each round" in section and f"{row['S']:.4g}" in section
    assert f"{run.health[-1]['kl']:.4g}" in section
    norm = math.hypot(*(update.norm() for update in run.edit.rounds[0].values()))
    assert f"{norm:.4g}" in section


def test_an_edit_in_one_round_has_no_curves(folder):
    edit = le.Edit.load(folder)
    edit.rounds, edit.facts_in_round = edit.rounds[:1], [len(edit.facts)]
    assert curves_section([ReportedRun("one", edit)]) is None


def chart(points):
    return line_figure(Panel("t", [Line("a", points, 0)], Axis("x", whole=True), Axis("y", logarithmic=None)))


def test_charts_stand_values_that_are_not_numbers_alike_or_far_apart():
    for points in ([(1, math.nan), (2, 3.0), (3, math.inf)], [(1, 0.0)], [(1, 1e-3), (2, 1e9)], [(1, -2.0), (2, 5.0)]):
        drawn = chart(points)
        assert not re.search(r"\b(nan|inf)\b", drawn), points
        _Reader(drawn)
    assert ">10<" in chart([(1, 1.0), (2, 1000.0)]) and "logarithmic scale" in chart([(1, 1.0), (2, 1000.0)])
    assert ">ES<" in interval_figure("t", [("ES", [None])])


def test_a_chart_names_its_points_and_says_in_words_what_it_shows():
    reader = _Reader(chart([(1, 20.0), (2, 1234.5)]))
    assert ("aria-label", "t: y by x.") in reader.attributes and ("role", "img") in reader.attributes
    assert "a, 1: 20" in reader.text and "a, 2: 1234" in reader.text
    known = interval_figure("t", [("ES", [Interval("before", 50.0, 40.0, 60.5, None)])])
    assert "before: ES 50.0, from 40.0 to 60.5" in _Reader(known).text
    unknown = interval_figure("t", [("ES", [Interval("before", 50.0, math.nan, math.nan, 0)])])
    assert "before: ES 50.0" in _Reader(unknown).text and "from" not in _Reader(unknown).text


def test_charts_can_stand_together_in_a_page_and_take_its_colours_and_font():
    page_style = files("lightedit.reports").joinpath("style.css").read_text(encoding="utf-8")
    drawn = chart([(1, 2.0), (2, 5.0)]) + legend([("x", None, 1), ("y", 13, 2)])
    reader = _Reader(drawn)
    names = {name for name, _ in reader.attributes}
    assert not names & {"id", "href", "xlink:href", "clip-path", "xmlns"}
    assert not {"style", "defs", "metadata"} & set(reader.tags)
    assert "font-family" not in drawn and "#" not in drawn
    used = set(re.findall(r"var\(--([\w-]+)\)", drawn))
    assert {"text", "faint", "line", "page", "series-0", "series-1"} == used
    light, dark = (dict(re.findall(r"--([\w-]+): (#\w+);", part)) for part in page_style.split("@media")[:2])
    assert PALETTE.items() <= light.items() and PALETTE.keys() <= dark.keys()


def test_settings_of_several_runs_say_where_they_differ(run, tmp_path):
    (other,) = read_runs([save_run(tmp_path / "second", 1.0, "ENCORE")])
    section = settings_section([run, other])
    marked = re.findall(r'<tr class="differs"><th scope="row">(.*?)<', section)
    assert "method.name" in marked and "method.lambda_" in marked
    assert "method.values.lr" not in marked and "model" not in marked
    assert "method.values.lr" in section
    assert 'class="differs"' not in settings_section([run])


def test_a_run_that_was_stopped_says_so(folder):
    edit = le.Edit.load(folder)
    edit.record.stopped = "stopped in round 4, which is kept: kl is 2, past max_kl=1"
    assert "past max_kl=1" in _Reader(page([ReportedRun("x", edit)])).text


def test_zsre_scores_make_a_report(tmp_path):
    facts = [le.Fact("What is {}?", f"thing {n}", "an answer", neighborhood_prompts=("q?",), neighborhood_target="b",
                     paraphrase_prompts=("p?",)) for n in range(12)]  # fmt: skip
    without_other = [
        RecordScores(*(PromptScores(scores.nll, None, scores.accuracy)
                       for scores in (r.efficacy, r.paraphrase, r.neighborhood)))
        for r in records(facts, 1.0)
    ]  # fmt: skip
    summarize(facts, without_other).save(tmp_path / "zsre.json")
    text = _Reader(report(tmp_path / "zsre.json", tmp_path / "x.html").read_text()).text
    assert "efficacy accuracy" in text and "% right" in text and "NaN" not in text


def test_an_evaluation_before_of_other_prompts_is_no_hindrance():
    fewer = evaluation(facts=[replace(fact, paraphrase_prompts=fact.paraphrase_prompts[:1]) for fact in FACTS])
    edit = le.Edit("model", "fingerprint", facts=FACTS)
    text = _Reader(str(facts_section([ReportedRun("x", edit, before=fewer, after=evaluation())]))).text
    assert "every prompt" in text


def test_cards_hold_portability_questions_with_their_answers(tmp_path):
    fact = replace(FACTS[5], portability=(("The neighbours speak", "Dutch"), ("Read in", "Leiden")))
    (scores,) = records([fact], 1.0)
    asked = PromptScores(torch.tensor([0.5, 2.0]), None, torch.tensor([1.0, 0.0]))
    found = summarize([fact], [replace(scores, portability=asked)])
    edit = le.Edit("model", "fingerprint", facts=[fact])
    text = _Reader(str(facts_section([ReportedRun("x", edit, after=found)]))).text
    assert "50 % right" in text and "The neighbours speak → Dutch" in text and "Read in → Leiden" in text
