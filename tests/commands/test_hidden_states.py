"""`lightedit hidden-states` on a tiny model."""

from pathlib import Path

import pytest
import torch

import lightedit as le
from lightedit.__main__ import main
from lightedit.lm import Place
from lightedit.lm.changes import LowRankUpdate
from lightedit.runs.kept import KeptRecords
from tests.models import tiny_model, tiny_tokenizer

FACTS = [
    le.Fact("The capital of the {} is in", "river", "the"),
    le.Fact("{} is in", "The river", "the"),
    le.Fact("In the city {} was", "of the state", "the"),
]
STUDY = {"hidden_states.csv", "hidden_states.json", "hidden_states.svg", "hidden_states.png"}
NORMS = {"update_norms.csv", "update_norms.svg", "update_norms.png"}


@pytest.fixture
def lm(monkeypatch: pytest.MonkeyPatch) -> le.LanguageModel:
    model = le.LanguageModel(tiny_model("llama", layers=2), tiny_tokenizer("bytelevel"))
    monkeypatch.setattr(le.LanguageModel, "load", lambda *_: model)
    return model


@pytest.fixture
def command(lm: le.LanguageModel, tmp_path: Path) -> list[str]:
    le.write_facts(tmp_path / "facts.jsonl", FACTS)
    facts, out = str(tmp_path / "facts.jsonl"), str(tmp_path / "out")
    return ["hidden-states", "--lm", "tiny", "--facts", facts, "--out", out, "--settings.top", "5"]


def save_edit(folder: Path, fingerprint: str) -> str:
    change = LowRankUpdate(torch.ones(32, 1), torch.ones(80, 1))
    edit = le.Edit("tiny", fingerprint, rounds=[{Place(1): change}], facts_in_round=[1])
    return str(edit.save(folder))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_command_writes_the_table_and_the_figure(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*command, "--limit", "2"])
    assert names(tmp_path / "out") == STUDY and not (tmp_path / "out.run").exists()
    assert "2 prompts in model, 2 sequential blocks" in capsys.readouterr().out
    assert [prompt.prompt for prompt in le.HiddenStates.load(tmp_path / "out").prompts] == [f.text for f in FACTS[:2]]


def test_norms_of_saved_edits_are_written_beside_it_or_alone(
    command: list[str], lm: le.LanguageModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edits = [save_edit(tmp_path / name, lm.fingerprint) for name in ("whole", "ablated")]
    main([*command, "--edits", *edits])
    assert names(tmp_path / "out") == STUDY | NORMS
    main(["hidden-states", "--out", str(tmp_path / "alone"), "--edits", *edits])
    assert names(tmp_path / "alone") == NORMS
    assert "whole: layer 1 50.6" in capsys.readouterr().out  # sqrt(32 * 80)


def test_an_edit_of_another_model_is_refused_before_work(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*command, "--edits", save_edit(tmp_path / "other", "another")])
    assert stop.value.code == 2 and "made for tiny with fingerprint another" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.run").exists()


def test_a_command_that_was_interrupted_goes_on(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right, added = KeptRecords.add, []

    def stops_at_the_second(self, index, record):
        if len(added) == 1:
            added.append(None)
            raise KeyboardInterrupt
        added.append(record["prompt"])
        right(self, index, record)

    monkeypatch.setattr(KeptRecords, "add", stops_at_the_second)
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 130 and "goes on after the prompts" in capsys.readouterr().err
    assert (tmp_path / "out.run").is_dir() and not (tmp_path / "out").exists()
    main(command)
    assert sorted(filter(None, added)) == sorted(fact.text for fact in FACTS)  # each once
    assert len(le.HiddenStates.load(tmp_path / "out").prompts) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--limit", "0"], "limit"),
        (["--settings.top", "1000"], "top: 1000 tokens, but the vocabulary"),
        (["--settings.top", "0"], "top"),
        (["--chat"], "chat template"),
    ],
)
def test_wrong_input_ends_with_status_2(
    command: list[str], arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*command, *arguments])
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to do"),
        (["--lm", "tiny"], "--lm and --facts go together"),
        (["--facts", "facts.jsonl"], "--lm and --facts go together"),
    ],
)
def test_a_command_without_a_task_is_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["hidden-states", "--out", str(tmp_path / "out"), *arguments])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_an_earlier_result_is_replaced_only_if_that_is_asked_for(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "hidden_states.json").write_text("old")
    with pytest.raises(SystemExit):
        main(command)
    assert "holds hidden_states.json already" in capsys.readouterr().err
    main([*command, "--overwrite"])
    assert le.HiddenStates.load(tmp_path / "out").prompts
