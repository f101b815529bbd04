"""`lightedit stream` on a tiny model."""

from pathlib import Path

import pytest

import lightedit as le
from lightedit.__main__ import main
from lightedit.analysis.streaming import run as streaming
from tests.analysis.test_streaming import STREAM, spoken, unedited

FILES = {"stream.csv", "stream.json", "stream.svg", "stream.png", "edit"}
METHOD = ["--method", "GRACE", "--method.layer", "1", "--method.steps", "12", "--method.lr", "0.5"]
SETTINGS = ["--settings.score", "accuracy", "--settings.score_every", "1", "--settings.paraphrases", "false"]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command, on two facts of which the model states the first, and one upstream fact."""
    model = unedited()
    monkeypatch.setattr(le.LanguageModel, "load", lambda *_: model)
    le.write_facts(tmp_path / "facts.jsonl", [spoken(model), STREAM[0], STREAM[1]])
    le.write_facts(tmp_path / "known.jsonl", [spoken(model, 1)])
    files = ["--facts", str(tmp_path / "facts.jsonl"), "--upstream", str(tmp_path / "known.jsonl")]
    return ["stream", "--lm", "tiny", *files, "--out", str(tmp_path / "out"), *METHOD, *SETTINGS]


def test_an_interrupted_command_goes_on_and_writes_scores_figures_and_the_edit(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = streaming.search

    def interrupted(editor, indices, optimizer):
        if indices == [2]:
            monkeypatch.setattr(streaming, "search", right)
            raise KeyboardInterrupt
        right(editor, indices, optimizer)

    monkeypatch.setattr(streaming, "search", interrupted)
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 130 and "goes on where the stream was" in capsys.readouterr().err
    assert (tmp_path / "out.run").is_dir() and not (tmp_path / "out").exists()
    main(command)
    printed = capsys.readouterr()
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES and not (tmp_path / "out.run").exists()
    assert "3 facts came, 2 edited, 1 skipped" in printed.out and "continuing after 2 facts, 1 edited" in printed.err
    assert le.Stream.load(tmp_path / "out").last.ERR == 1.0
    assert le.Edit.load(tmp_path / "out" / "edit").facts == STREAM[:2]
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 2 and "holds stream.json already" in capsys.readouterr().err


def test_an_edit_that_did_not_hold_says_so(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command[command.index("--method.steps") + 1] = "1"
    with pytest.raises(SystemExit) as stop:
        main(command)
    printed = capsys.readouterr()
    assert stop.value.code == 3 and "not held right after the edit" in printed.out
    assert (tmp_path / "out" / "stream.csv").exists()


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (["--settings.score", "bleu"], "score"),
        (["--method.layer", "9"], "layers 0 to 3"),
        (["--covariance", "stats"], "no method here needs one"),
        (["--upstream", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_wrong_input_is_refused_before_work(
    command: list[str], tmp_path: Path, others: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*command, *others])
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.run").exists()
