"""`lightedit trace` on a tiny model."""

from pathlib import Path

import pytest

import lightedit as le
from lightedit.__main__ import main
from lightedit.analysis import tracing
from tests.analysis.traces import KNOWN, UNKNOWN, knowing_model

SMALL = ["--settings.samples", "2", "--settings.window", "2", "--fact_figures", "1"]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command, on facts of which the model knows all but one."""
    model = knowing_model()
    monkeypatch.setattr(le.LanguageModel, "load", lambda *_: model)
    le.write_facts(tmp_path / "facts.jsonl", [*KNOWN, UNKNOWN])
    return ["trace", "--lm", "tiny", "--facts", str(tmp_path / "facts.jsonl"), "--out", str(tmp_path / "out"), *SMALL]


def test_the_command_writes_the_table_and_the_figures(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(command)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    figures = {f"{name}.{kind}" for name in ("averages", "layers", "severed", "fact-1") for kind in ("svg", "png")}
    assert names == {"trace.csv", "averages.csv", "trace.json", *figures}
    assert not (tmp_path / "out.run").exists()
    printed = capsys.readouterr()
    assert "3 facts traced, 1 that the model does not know left out" in printed.out
    assert "3 of 4 facts are traced" in printed.err


def test_a_command_that_was_interrupted_goes_on(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right, calls = tracing.run_clean_and_corrupted, []

    def interrupted(lm, prompt, *others):
        calls.append(prompt.fact.text)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return right(lm, prompt, *others)

    monkeypatch.setattr(tracing, "run_clean_and_corrupted", interrupted)
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 130 and "goes on after the facts" in capsys.readouterr().err
    assert (tmp_path / "out.run").is_dir() and not (tmp_path / "out").exists()
    main(command)
    assert calls == [KNOWN[0].text, KNOWN[1].text, KNOWN[1].text, KNOWN[2].text]
    assert len(le.Trace.load(tmp_path / "out").facts) == 3


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (["--limit", "0"], "limit"),
        (["--fact_figures=-1"], "fact_figures"),
        (["--settings.window", "9"], "window: 9 layers"),
        (["--settings.samples", "0"], "samples"),
    ],
)
def test_wrong_input_ends_with_status_2(
    command: list[str], others: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*command, *others])
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.run").exists()


def test_an_earlier_trace_is_replaced_only_if_that_is_asked_for(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "trace.json").write_text("old")
    with pytest.raises(SystemExit):
        main(command)
    assert "holds a trace already" in capsys.readouterr().err
    main([*command, "--overwrite"])
    assert le.Trace.load(tmp_path / "out").facts
