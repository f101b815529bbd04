"""The commands on a classifier and an encoder-decoder in a folder: edit, score, ask, report, export, and refusals."""

import io
import json
import sys
from pathlib import Path

import pytest

import lightedit as le
from lightedit.__main__ import main
from tests.kinds import facts_for, other_model
from tests.runs import state

KINDS = pytest.mark.parametrize("name", ["bert", "t5-gated"])
FT = ["--method", "FT", "--method.parts", "block", "--method.lr", "0.02"]
QUIET = ["--run.progress_bar", "false"]


def placed(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> le.LanguageModel:
    """A model and two facts in a folder, which is the working directory."""
    monkeypatch.chdir(folder)
    lm = other_model(name)
    lm.model.save_pretrained("model")
    lm.tokenizer.save_pretrained("model")
    le.write_facts("facts.jsonl", facts_for(lm)[:2])
    return le.LanguageModel.load("model", device="cpu")


@KINDS
def test_an_edit_is_written_scored_asked_reported_and_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    lm = placed(tmp_path, monkeypatch, name)
    fact = facts_for(lm)[0]
    given = ["--lm", "model", "--facts", "facts.jsonl"]
    layers = ["[1,2]"] if name == "bert" else ["[3,4]", "--method.end_of_text", "true"]  # of the decoder
    main(
        [
            "edit",
            *given,
            *FT,
            "--method.layers",
            *layers,
            "--method.epochs",
            "60",
            "--evaluate",
            "--out",
            "edit",
            *QUIET,
        ]
    )
    edit = le.Edit.load("edit")
    assert edit.after is not None and edit.after.scores["efficacy_accuracy"] == 100
    assert [outcome.held for outcome in edit.outcomes] == [True, True]
    main(["evaluate", *given, "--edit", "edit", "--compare", "--out", "scores.json"])
    assert "efficacy" in capsys.readouterr().out and json.loads(Path("scores.json").read_text())
    main(["report", "edit", "--out", "report.html"])
    assert fact.target_new in Path("report.html").read_text(encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.StringIO(fact.text + "\n"))
    capsys.readouterr()
    main(["chat", "model", "--edits", "edit"])
    said = capsys.readouterr().out.splitlines()
    assert f"is {lm.answers.described} and answers each line" in said[0] and said[-1] == f"[edited] {fact.target_new}"
    main(["export", "--lm", "model", "--edits", "edit", "--out", "shipped"])
    shipped = le.LanguageModel.load("shipped", device="cpu")
    edit.apply(lm)
    assert shipped.kind == lm.kind and shipped.complete(fact.text) == lm.complete(fact.text) == f" {fact.target_new}"


@KINDS
def test_a_fact_base_of_it_changes_one_fact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    lm = placed(tmp_path, monkeypatch, name)
    before, facts = state(lm), facts_for(lm)
    method = le.FT(layers=(1, 2), parts="block", lr=2e-2, epochs=60)
    base = le.FactBase(tmp_path / "base", method, settings=le.RunSettings(progress_bar=False))
    base.add(facts[:2])
    base.apply(lm)
    base.replace(facts[0].text, facts[1].target_new)
    edit = base.apply(lm)
    assert [fact.target_new for fact in edit.facts] == 2 * [facts[1].target_new] and lm.weights.edits == [edit.id]
    edit.revert(lm)
    assert all((state(lm)[key] == value).all() for key, value in before.items())


@KINDS
def test_what_cannot_be_done_with_it_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    lm = placed(tmp_path, monkeypatch, name)
    given = ["--lm", "model", "--facts", "facts.jsonl"]
    kind = lm.answers.described
    capsys.readouterr()
    for arguments, message in (
        (["edit", *given, "--method", "ROME", "--method.layers", "[1]", "--out", "x"], f"{kind}, and ROME needs"),
        (["edit", *given, "--out", "x"], f"{kind}, and tuning needs"),
        (["evaluate", *given, "--protocol", "single", "--method", "KN", "--out", "x"], f"{kind}, and KN needs"),
        (["edit", *given, *FT, "--method.layers", "[1]", "--chat", "--out", "x"], f"{kind}, which serves no chat"),
        (["trace", *given, "--out", "x"], f"{kind}, and causal tracing needs"),
        (["covariance", "--lm", "model", "--layers", "[1]", "--out", "x"], f"{kind}, and a covariance needs"),
        (["chat", "model", "--chat"], "serves no chat template"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        said = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2 and message in said[-1] and len(said) == 1, said
    assert not (tmp_path / "x").exists() and not (tmp_path / "x.run").exists()
