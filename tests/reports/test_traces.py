from pathlib import Path

import pytest

import lightedit as le
from lightedit.errors import ArgumentError
from lightedit.reports.page import report
from lightedit.reports.reading import read_runs
from lightedit.reports.traces import traces_section
from tests.analysis.traces import made_up_trace


def test_a_trace_is_a_run_with_a_section_of_its_own(tmp_path: Path) -> None:
    made_up_trace().save(tmp_path / "trace")
    text = report([tmp_path / "trace"], tmp_path / "report.html").read_text(encoding="utf-8")
    assert 'href="#traces"' in text and 'id="traces"' in text
    assert "3 facts traced, 1 that the model does not know left out" in text
    assert text.count('class="wide"') == 6  # averages, layers, severed, and three facts
    assert "Tower*" in text and "var(--series-5)" in text


def test_the_largest_average_effect_is_named_with_its_layer(tmp_path: Path) -> None:
    made_up_trace().save(tmp_path)
    section = traces_section(read_runs([tmp_path]))
    assert section is not None
    assert "<td>state</td><td>last subject</td><td>1</td><td>0.460 ± 0.057</td><td>3</td>" in section


def test_a_run_without_a_trace_has_no_such_section(tmp_path: Path) -> None:
    (tmp_path / "health.csv").write_text("round,kl\n1,0.5\n")
    assert traces_section(read_runs([tmp_path])) is None


def test_a_damaged_trace_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "trace.json").write_text("[]")
    with pytest.raises(ArgumentError, match=r"trace\.json is damaged"):
        report([tmp_path], tmp_path / "report.html")


def test_markup_in_tokens_stays_text(tmp_path: Path) -> None:
    trace = made_up_trace(1)
    fact = trace.facts[0].to_dict() | {"tokens": ["<b>", "a", "b", "c", "d", "e", "f"], "fact": "<script>x</script>"}
    marked = le.Trace(**{**vars(trace), "facts": (type(trace.facts[0]).from_dict(fact),)})
    marked.save(tmp_path / "trace")
    text = report([tmp_path / "trace"], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in text and "<b>" not in text.replace("<b><bdi>", "")
