"""`lightedit neurons` on a tiny model."""

from pathlib import Path

import pytest

import lightedit as le
from lightedit.__main__ import main
from lightedit.analysis import neurons
from tests.analysis.traces import KNOWN, UNKNOWN, knowing_model

SMALL = ["--settings.search.points", "3", "--settings.search.prompts", "prompt"]
FILES = {"neurons.csv", "neurons.json"} | {f"{n}.{kind}" for n in ("layers", "attributions") for kind in ("svg", "png")}


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command, on facts of which the model knows all but one."""
    model = knowing_model()
    monkeypatch.setattr(le.LanguageModel, "load", lambda *_: model)
    le.write_facts(tmp_path / "facts.jsonl", [*KNOWN, UNKNOWN])
    facts, out = str(tmp_path / "facts.jsonl"), str(tmp_path / "out")
    return ["neurons", "--lm", "tiny", "--facts", facts, "--out", out, *SMALL]


def test_the_command_prints_neurons_and_writes_the_table_and_the_figures(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(command)
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES and not (tmp_path / "out.run").exists()
    printed = capsys.readouterr()
    assert "3 facts in model, 1 that the model does not know left out" in printed.out
    assert f"{KNOWN[0].text} -> the: " in printed.out and "saved neurons.csv and 4 figures" in printed.out
    assert "3 of 4 facts are searched" in printed.err


def test_a_command_that_was_interrupted_goes_on(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right, calls = neurons.find_neurons, []

    def interrupted(*arguments, **named):
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return right(*arguments, **named)

    monkeypatch.setattr(neurons, "find_neurons", interrupted)
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 130 and "goes on after the facts" in capsys.readouterr().err
    assert (tmp_path / "out.run").is_dir() and not (tmp_path / "out").exists()
    main(command)
    assert len(calls) == 4 and len(le.Neurons.load(tmp_path / "out").facts) == 3


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (["--settings.search.points", "0"], "points"),
        (["--settings.layers", "[7]"], "layers 0 to 2"),
        (["--chat"], "chat template"),
    ],
)
def test_wrong_input_ends_with_status_2(
    command: list[str], others: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*command, *others])
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.run").exists()


def test_an_earlier_result_is_replaced_only_if_that_is_asked_for(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "neurons.json").write_text("old")
    with pytest.raises(SystemExit):
        main(command)
    assert "holds neurons.json already" in capsys.readouterr().err
    main([*command, "--overwrite"])
    assert le.Neurons.load(tmp_path / "out").facts
