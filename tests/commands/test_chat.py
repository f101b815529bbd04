"""`lightedit chat`: a model asked in the terminal, with its edit and without."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

import lightedit as le
from lightedit.__main__ import main
from tests.chat import chat_tokenizer
from tests.models import tiny_model, tiny_tokenizer
from tests.runs import covariance_of

FACTS = [le.Fact("The capital of {}", "France", "Rome"), le.Fact("The king of {}", "Spain", "Ada")]
ASKED = "The capital of France"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, and two edits of which the second stands on the first; also the working directory."""
    monkeypatch.chdir(tmp_path)
    tiny_model("llama").save_pretrained("model")
    tiny_tokenizer("bytelevel").save_pretrained("model")
    lm = le.LanguageModel.load("model")
    method = le.MEMIT(layers=(1, 2), lambda_=0.1, values=le.ValueSettings(lr=0.5, steps=9, clamp_norm_factor=5.0))
    for name, fact in zip(("first", "second"), FACTS, strict=True):
        edit = le.edit(lm, [fact], method, covariance=covariance_of(lm), settings=le.RunSettings(progress_bar=False))
        edit.save(name)
    return tmp_path


def talk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lines: str, *options: str) -> list[str]:
    """What is printed after the first two lines, which greet."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    capsys.readouterr()
    main(["chat", "model", "--max_new_tokens", "6", *options])
    return capsys.readouterr().out.removesuffix("\n").split("\n")[2:]


def expected(*folders: str) -> str:
    lm = le.LanguageModel.load("model")
    for folder in folders:
        le.Edit.load(folder).apply(lm)
    return lm.complete(ASKED, max_new_tokens=6).strip()


def test_edits_are_switched_on_and_off_by_commands_or_an_empty_line(place, monkeypatch, capsys) -> None:
    with_edits, without = expected("first", "second"), expected()
    assert with_edits != without
    lines = f"{ASKED}\n/off\n{ASKED}\n/on\n{ASKED}\n\n{ASKED}\n/both\n{ASKED}\n\n{ASKED}\n/quit\n{ASKED}\n"
    on, off = f"[edited] {with_edits}", f"[unedited] {without}"
    say = "edits of 2 facts: {}".format
    assert talk(monkeypatch, capsys, lines, "--edits", "first", "second") == [
        *(on, say("off"), off, say("on"), on, say("off"), off),
        *(say("both"), on, off, say("on"), on),
    ]


def test_a_list_in_brackets_names_edits_too(place, monkeypatch, capsys) -> None:
    assert talk(monkeypatch, capsys, ASKED, "--edits", "[first,second]") == [f"[edited] {expected('first', 'second')}"]
    assert talk(monkeypatch, capsys, ASKED, "--edits", "first") == [f"[edited] {expected('first')}"]


def test_a_model_without_edits_is_asked_as_it_is(place, monkeypatch, capsys) -> None:
    assert talk(monkeypatch, capsys, f"/on\n{ASKED}\n") == ["no edits were given", expected()]


def test_a_line_that_cannot_be_answered_ends_nothing(place, monkeypatch, capsys) -> None:
    said = talk(monkeypatch, capsys, "/of\n" + "river " * 400 + f"\n{ASKED}\n")
    assert said[0].startswith("A line is answered.") and said[1].startswith("error: ") and "256 positions" in said[1]
    assert said[2] == expected()


def test_a_model_with_a_chat_template_answers_in_it_unless_told_otherwise(place, monkeypatch, capsys) -> None:
    chat_tokenizer("bytelevel").save_pretrained("model")
    lm = le.LanguageModel.load("model")
    in_chat, plain = (lm.complete(ASKED, chat=chat, max_new_tokens=6).strip() for chat in (True, False))
    assert in_chat != plain
    assert talk(monkeypatch, capsys, ASKED) == [in_chat]
    assert talk(monkeypatch, capsys, ASKED, "--plain") == [plain]
    assert talk(monkeypatch, capsys, f"/plain\n{ASKED}\n/chat\n{ASKED}\n") == [
        *("continues lines as plain text", plain, "answers in its chat template", in_chat)
    ]


def test_lines_are_served_as_the_facts_of_the_edits_are(place, monkeypatch, capsys) -> None:
    chat_tokenizer("bytelevel").save_pretrained("model")
    lm = le.LanguageModel.load("model")
    le.Edit.load("first").apply(lm)
    in_chat, plain = (lm.complete(ASKED, chat=chat, max_new_tokens=6).strip() for chat in (True, False))
    assert in_chat != plain
    assert talk(monkeypatch, capsys, ASKED, "--edits", "first") == [f"[edited] {plain}"]
    assert talk(monkeypatch, capsys, ASKED, "--edits", "first", "--chat") == [f"[edited] {in_chat}"]
    served = json.loads((place / "first" / "edit.json").read_text())
    for fact in served["facts"]:
        fact["chat"] = True
    (place / "first" / "edit.json").write_text(json.dumps(served))
    assert talk(monkeypatch, capsys, ASKED, "--edits", "first") == [f"[edited] {in_chat}"]
    assert talk(monkeypatch, capsys, ASKED, "--edits", "first", "--plain") == [f"[edited] {plain}"]


def test_lines_may_come_from_a_pipe(place) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lightedit", "chat", "model", "--edits", "first", "--max_new_tokens", "6"],
        input=ASKED, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.removesuffix("\n").split("\n")[-1] == f"[edited] {expected('first')}"


def test_wrong_arguments_are_refused(place, capsys) -> None:
    for arguments, message in (
        (["--edits", "missing"], "missing"),
        (["--max_new_tokens", "0"], "max_new_tokens: got 0, expected at least 1"),
        (["--chat", "--plain"], "--chat and --plain exclude each other"),
        (["--chat"], "serves no chat template"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["chat", "model", *arguments])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
