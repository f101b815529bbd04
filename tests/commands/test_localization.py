"""`lightedit localization` on a tiny model."""

from pathlib import Path

import pytest

import lightedit as le
from lightedit.__main__ import main
from lightedit.analysis.localization import regressions, study
from tests.analysis.localization.studies import FACTS, LAYER_NUMBERS, UNKNOWN, knowing
from tests.runs import covariance_of

PROBLEMS = ("injection", "erasure")
SMALL = [
    *('--settings.problems=["injection","erasure"]', "--settings.windows=[1]", "--settings.effect_window=1"),
    *("--settings.samples=2", "--settings.essence_tokens=8", "--settings.layers=[0,1]", "--settings.facts_per_chunk=2"),
    *("--settings.continuation_tokens=4", "--settings.min_probability=0"),
]
ROME = '--methods={"own": {"class_path": "ROME", "init_args": {"layers": [0], "values": {"steps": 3}}}}'
NAMES = ["effects", "peaks", "rewrite", "overall", "injection-own", "erasure-own", "r2"]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command, on facts of which the model knows all but one."""
    model = knowing()
    monkeypatch.setattr(le.LanguageModel, "load", lambda *_: model)
    le.write_facts(tmp_path / "facts.jsonl", [*FACTS, UNKNOWN])
    covariance_of(model, LAYER_NUMBERS).save(tmp_path / "covariance")
    facts, out = str(tmp_path / "facts.jsonl"), str(tmp_path / "out")
    covariance = ["--covariance", str(tmp_path / "covariance")]
    return ["localization", "--lm", "tiny", "--facts", facts, "--out", out, *covariance, ROME, *SMALL]


def test_the_command_writes_tables_and_figures(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(command)
    tables = {"localization.csv", "localization.json", "effects.csv", "regressions.csv"}
    figures = {f"{name}.{suffix}" for name in NAMES for suffix in ("svg", "png")}
    assert {path.name for path in (tmp_path / "out").iterdir()} == tables | figures
    assert all((tmp_path / "out" / name).stat().st_size > 1000 for name in figures)
    assert not (tmp_path / "out.run").exists()
    printed = capsys.readouterr()
    assert "3 facts studied, 1 that the model does not know left out, 12 edits at layers 0, 1" in printed.out
    assert "injection, own: R² of the rewrite score by layer" in printed.out
    assert "3 of 4 facts are studied" in printed.err
    found = le.LocalizationStudy.load(tmp_path / "out")
    assert found.methods["own"]["values"]["steps"] == 3 and found.settings.problems == PROBLEMS
    with pytest.raises(SystemExit):
        main(command)
    assert "holds a study already" in capsys.readouterr().err


def test_a_command_that_was_interrupted_goes_on(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right, calls = study.search, []

    def interrupted(editor, *others):
        calls.append(editor)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return right(editor, *others)

    monkeypatch.setattr(study, "search", interrupted)
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 130 and "goes on after the edits" in capsys.readouterr().err
    assert (tmp_path / "out.run").is_dir() and not (tmp_path / "out").exists()
    main(command)
    assert len(calls) == 2 * 2 * 2 + 1
    assert len(le.LocalizationStudy.load(tmp_path / "out").cells) == 12


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (["--limit", "0"], "limit"),
        (["--settings.layers=[7]"], "out of range"),
        (["--settings.windows=[9]", "--settings.effect_window=9"], "windows: 9 layers"),
        (["--settings.effect_window=2"], "effect_window"),
    ],
)
def test_wrong_input_ends_with_status_2(
    command: list[str], others: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*command, *others])
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.run").exists()


def test_without_statsmodels_nothing_is_begun(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(regressions, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 2 and "pip install 'lightedit[study]'" in capsys.readouterr().err
    assert not (tmp_path / "out.run").exists()
