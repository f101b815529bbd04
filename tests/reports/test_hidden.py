from pathlib import Path

import pytest

import lightedit as le
from lightedit.analysis.similarities import Similarities
from lightedit.errors import ArgumentError
from lightedit.reports.hidden import hidden_states_section
from lightedit.reports.page import report
from lightedit.reports.reading import read_runs


def made_up() -> le.HiddenStates:
    prompts = tuple(
        Similarities(
            f"<b>{shift}",
            {"attention": [0.1 + shift, 0.2], "mlp": [0.3, 0.4]},
            {"attention": [0.5, 0.6], "mlp": [0.7, 0.8]},
        )
        for shift in (0.0, 0.2)
    )
    return le.HiddenStates("<i>tiny", 2, True, le.HiddenStateSettings(), prompts)


def test_a_study_is_a_run_with_a_section_of_its_own(tmp_path: Path) -> None:
    made_up().save(tmp_path / "study")
    text = report([tmp_path / "study"], tmp_path / "report.html").read_text(encoding="utf-8")
    assert 'href="#hidden-states"' in text and 'id="hidden-states"' in text
    assert "2 prompts in &lt;i&gt;tiny, 2 parallel blocks" in text and "<i>" not in text
    assert "<td>0</td><td>attention</td><td>0.200</td><td>0.500</td>" in text


def test_a_run_without_a_study_has_no_such_section(tmp_path: Path) -> None:
    (tmp_path / "health.csv").write_text("round,kl\n1,0.5\n")
    assert hidden_states_section(read_runs([tmp_path])) is None


def test_a_damaged_study_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "hidden_states.json").write_text("[]")
    with pytest.raises(ArgumentError, match=r"hidden_states\.json is damaged"):
        report([tmp_path], tmp_path / "report.html")
