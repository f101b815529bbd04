"""The command line, end to end on a tiny model in a folder."""

import json
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import yaml

import lightedit as le
from lightedit.__main__ import EXIT_CODES, main
from lightedit.evaluation import evaluate as evaluating
from lightedit.evaluation import scoring, single
from lightedit.lm import Place
from lightedit.methods import METHODS
from lightedit.methods.closed_form.method import ClosedForm
from tests.chat import chat_tokenizer
from tests.models import tiny_model, tiny_tokenizer
from tests.runs import covariance_of, scored, scored_single

FACTS = [
    le.Fact("The capital of {}", "France", "Rome", target_true="Paris", paraphrase_prompts=("France's capital is",),
            neighborhood_prompts=("The Eiffel Tower is in",)),
    le.Fact("{} is a city in the north of", "Old London Town", "Spain", target_true="England"),
    le.Fact("The river {} flows through", "Rhine", "Paris", target_true="Bonn"),
]  # fmt: skip
QUICK = ["--method", "MEMIT", "--method.layers", "[1,2]", "--method.lambda_", "10", "--method.values.steps", "3"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model and facts; also the working directory and the cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIGHTEDIT_CACHE", str(tmp_path / "cache"))
    tiny_model("llama").save_pretrained("model")
    tiny_tokenizer("bytelevel").save_pretrained("model")
    le.write_facts("facts.jsonl", FACTS)
    Path("text.txt").write_text("The river is long and the city is old. Paris is in France. " * 200)
    return tmp_path


def fails(capsys: pytest.CaptureFixture[str], arguments: list[str], status: int = 2) -> str:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == status
    return capsys.readouterr().err


def edits(arguments: list[str]) -> None:
    """Run an edit that is saved, though facts do not hold: the model is random, and the search short."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 3


def test_covariance_edit_and_evaluate(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["covariance", "--lm", "model", "--layers", "[1,2]", "--text", "text.txt", "--tokens", "900",
          "--sequence_length", "32", "--out", "stats"])  # fmt: skip
    edits(["edit", "--lm", "model", "--facts", "facts.jsonl", *QUICK, "--covariance", "stats", "--out", "edits/first"])
    main(["evaluate", "--lm", "model", "--facts", "facts.jsonl", "--edit", "edits/first", "--out", "scores.json"])
    main(["evaluate", "--lm", "model", "--facts", "facts.jsonl", "--limit", "2"])
    printed = capsys.readouterr().out
    assert "before" in printed and "after" in printed and "ES" in printed

    saved = le.Edit.load("edits/first")
    assert saved.layers == [1, 2] and saved.facts == FACTS
    assert saved.record.method["lambda_"] == 10
    scores = json.loads(Path("scores.json").read_text())["scores"]
    assert saved.after.scores == pytest.approx(scores)
    assert saved.before.scores != pytest.approx(scores)


@pytest.mark.parametrize("wrong", [["--method", "memit"], ["--method=Memit"]])
def test_an_unknown_method_is_named_beside_those_that_are_known(
    place: Path, wrong: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    said = fails(capsys, ["edit", "--lm", "model", "--facts", "facts.jsonl", "--out", "edits/first", *wrong])
    assert f"{wrong[-1].removeprefix('--method=')} is not known; methods are ROME, MEMIT" in said


def test_export_ships_the_edited_model_or_an_adapter(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["covariance", "--lm", "model", "--layers", "[1,2]", "--text", "text.txt", "--tokens", "900",
          "--sequence_length", "32", "--out", "stats"])  # fmt: skip
    edits(["edit", "--lm", "model", "--facts", "facts.jsonl", *QUICK, "--covariance", "stats", "--evaluate", "false",
          "--out", "edits/first"])  # fmt: skip
    export = ["export", "--lm", "model", "--edits", "[edits/first]", "--out"]
    main([*export, "shipped"])
    main(["export", "--lm", "model", "--edits", "edits/first", "--out", "adapter", "--form", "lora"])
    assert "saved the edited model in shipped" in capsys.readouterr().out
    lm = le.LanguageModel.load("model")
    le.Edit.load("edits/first").apply(lm)
    shipped = le.LanguageModel.load("shipped")
    assert all(torch.equal(shipped.weight(Place(layer)), lm.weight(Place(layer))) for layer in range(lm.n_layers))
    assert Path("adapter", "adapter_model.safetensors").is_file()
    assert "shipped exists already" in fails(capsys, [*export, "shipped"])
    assert "--edits names none" in fails(capsys, [*export[:4], "[]", "--out", "other"])
    assert "no edit in absent" in fails(capsys, [*export[:4], "[absent]", "--out", "other"])
    assert "this edit was made for model" in fails(
        capsys, ["export", "--lm", "shipped", "--edits", "[edits/first]", "--out", "other"]
    )
    assert not Path("other").exists()


def test_evaluate_scores_single_edits(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["evaluate", "--lm", "model", "--facts", "facts.jsonl", "--protocol", "single", "--out", "scores.json"]
    main(["covariance", "--lm", "model", "--layers", "[1,2]", "--text", "text.txt", "--tokens", "900",
          "--sequence_length", "32", "--out", "stats"])  # fmt: skip
    capsys.readouterr()
    main([*arguments, *QUICK, "--covariance", "stats"])
    printed = capsys.readouterr().out
    assert "before" in printed and "after" in printed
    lm = le.LanguageModel.load("model")
    method = le.MEMIT(layers=(1, 2), lambda_=10.0, values=le.ValueSettings(steps=3))
    stats, before = le.Covariance.load("stats"), scored(lm, FACTS)
    expected = scored_single(lm, FACTS, method, stats, before=before)
    assert "retain_accuracy" in expected.scores
    assert json.loads(Path("scores.json").read_text())["scores"] == pytest.approx(expected.scores)
    assert not Path("scores.json.run").exists()
    assert "--protocol single and --method go together" in fails(capsys, arguments)
    assert "--protocol single and --method go together" in fails(capsys, [*arguments[:5], *QUICK])
    assert "one edited model" in fails(capsys, [*arguments, *QUICK, "--evaluation.text", "text.txt"])


def test_evaluate_of_single_edits_goes_on_after_ctrl_c(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    covariance_of(le.LanguageModel.load("model")).save("stats")
    arguments = ["evaluate", "--lm", "model", "--facts", "facts.jsonl", "--protocol", "single", "--out", "scores.json",
                 *QUICK, "--covariance", "stats", "--facts_per_chunk", "1"]  # fmt: skip
    score, calls = single.score_facts, []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return score(*args, **kwargs)

    monkeypatch.setattr(single, "score_facts", interrupted)
    with pytest.raises(SystemExit, match="130"):
        main(arguments)
    assert "the same command goes on" in capsys.readouterr().err
    kept = Path("scores.json.run")
    assert len(list(kept.glob("chunk-*.json"))) == 1 and not Path("scores.json").exists()
    other = [*arguments, "--method.lambda_", "11"]
    assert "differs in method.lambda_ (10.0 there, 11.0 now)" in fails(capsys, other)
    message = fails(capsys, [*arguments[:5], "--out", "scores.json"])  # nor is it another protocol's to delete
    assert "scores.json.run holds another run" in message and len(list(kept.glob("chunk-*.json"))) == 1
    main(arguments)
    assert len(calls) == 2 + len(FACTS) - 1 and not kept.exists()
    calls.clear()
    with pytest.raises(SystemExit, match="130"):
        main(arguments)
    main([*other, "--restart"])
    assert not kept.exists()


def test_scoring_goes_on_after_ctrl_c(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    covariance_of(le.LanguageModel.load("model")).save("stats")
    edit = ["edit", "--lm", "model", "--facts", "facts.jsonl", *QUICK, "--covariance", "stats", "--out"]
    evaluate = ["evaluate", "--lm", "model", "--facts", "facts.jsonl", "--compare", "true", "--edit", "whole", "--out"]
    edits([*edit, "whole"])
    main([*evaluate, "whole.json"])
    score, budget = scoring.score_facts, [0]

    def limited(*args, **kwargs):
        if not budget:
            raise KeyboardInterrupt
        budget.pop()
        return score(*args, **kwargs)

    monkeypatch.setattr(scoring, "score_facts", limited)
    monkeypatch.setattr(scoring, "_KEPT_TOGETHER", 1)
    for arguments, out in ((edit, "parts"), (evaluate, "parts.json")):
        for _ in range(2 * len(FACTS) - 1):  # before and after, a fact a process
            budget[:] = [1]
            with pytest.raises(SystemExit, match="130"):
                main([*arguments, out])
            assert not Path(out).exists()
        budget[:] = [1]
        edits([*arguments, out]) if arguments is edit else main([*arguments, out])
        assert not Path(f"{out}.run").exists()
    for name in ("{}/before.json", "{}/after.json", "{}.json"):
        whole, parts = (json.loads(Path(name.format(run)).read_text()) for run in ("whole", "parts"))
        assert parts["scores"] == pytest.approx(whole["scores"], abs=1e-3)
        assert parts["records"][1]["efficacy"]["nll_wanted"] == pytest.approx(
            whole["records"][1]["efficacy"]["nll_wanted"], abs=1e-5
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["edit", "--out", "edits/x", "--facts", "colliding.jsonl", "--run.on_collision", "error"], "nearly equal"),
        (["edit", "--out", "edits/x", "--method", "ROME", "--run.facts_per_round", "2"], "facts_per_round=1"),
        (["edit", "--out", "edits/x", "--run.facts_per_round", "0"], "facts_per_round must be at least 1"),
        (["evaluate", "--protocol", "single", "--covariance", "other"], "covariance"),
        (["evaluate", "--protocol", "single", "--facts_per_chunk", "0"], "facts_per_chunk must be at least 1"),
        (["evaluate", "--edit", "edits/other", "--compare", "true"], "load the model it was made for"),
        (["evaluate", "--out", "stats"], "--out stats is a folder"),
        (["evaluate", "--facts", "stats"], "stats"),
    ],
)
def test_wrong_input_is_found_before_anything_is_scored(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    lm = le.LanguageModel.load("model")
    covariance_of(lm).save("stats")
    other = le.LanguageModel(tiny_model("llama", seed=1), tiny_tokenizer("bytelevel"))
    covariance_of(other).save("other")
    le.Edit(other.name, other.fingerprint, facts=FACTS).save("edits/other")
    le.write_facts("colliding.jsonl", [FACTS[0], replace(FACTS[0], prompt="The capital of {} is", target_new="Bonn")])
    for module in (scoring, evaluating, single):
        monkeypatch.setattr(module, "score_facts", lambda *_, **__: pytest.fail("the model was scored"))
    command, *given = arguments
    defaults = {"--lm": "model", "--facts": "facts.jsonl"}
    if command == "edit" or "single" in given:
        quick = QUICK if "--method" not in given else ["--method", "ROME", "--method.layers", "[1]"]
        defaults |= dict(zip(quick[::2], quick[1::2], strict=True)) | {"--covariance": "stats"}
    defaults |= dict(zip(given[::2], given[1::2], strict=True))
    printed = fails(capsys, [command, *(word for pair in defaults.items() for word in pair)])
    assert message in printed and "Traceback" not in printed
    assert not Path("edits/x").exists()


def test_an_edit_that_ruins_the_model_is_saved_without_scores_after_it(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    score, calls = scoring.score_facts, []

    def ruined_at_last(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise FloatingPointError("the NLL is nan")
        return score(*args, **kwargs)

    monkeypatch.setattr(scoring, "score_facts", ruined_at_last)
    edits(edit())
    assert "cannot be scored, so the edit is saved without: the NLL is nan" in capsys.readouterr().err
    saved = le.Edit.load("edits/x")
    assert saved.facts == FACTS and saved.after is None and saved.before is not None


def test_evaluate_lets_the_model_write_when_asked(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["evaluate", "--lm", "model", "--facts", "facts.jsonl", "--out", "scores.json"]
    main([*arguments, "--evaluation.generate"])
    assert "GE (bits × 100)" in capsys.readouterr().out
    found = le.Evaluation.load("scores.json")
    assert found.scores["GE"] > 0 and 0 <= found.scores["generation_success"] <= 100
    for fact, record in zip(FACTS, found.records, strict=True):
        assert len(record["generations"]) == 1 + len(fact.paraphrase_prompts)
    main(arguments)
    assert "GE" not in capsys.readouterr().out


def test_evaluate_sets_an_edit_beside_the_unedited_model(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = [replace(fact, attribute_prompts=("Spain is in", "The king is in")) for fact in FACTS]
    le.write_facts("facts.jsonl", facts[:2])
    le.write_facts("others.jsonl", facts[2:])
    edits(["edit", "--lm", "model", "--facts", "facts.jsonl", *QUICK, "--evaluate", "false", "--out", "edits/first"])
    capsys.readouterr()
    main(["evaluate", "--lm", "model", "--facts", "facts.jsonl", "--edit", "edits/first", "--out", "scores.json",
          "--compare", "--held_out", "others.jsonl", "--evaluation.text", "text.txt", "--evaluation.generate",
          "--references", "own"])  # fmt: skip
    lm = le.LanguageModel.load("model")
    references = le.write_references(lm, facts[:2], progress_bar=False)
    more = {"held_out": facts[2:], "text": "text.txt", "references": references, "generate": True}
    before = scored(lm, facts[:2], **more)
    le.Edit.load("edits/first").apply(lm)
    expected = scored(lm, facts[:2], before=before, **more)
    names = {"success_rate", "retain_accuracy", "equivalence_accuracy", "ERR", "TRR", "RS_own", "perplexity", "kl"}
    assert names <= set(expected.scores) and expected.scores["kl"] > 0 == before.scores["kl"]
    kept, kept_before = le.Evaluation.load_with_before("scores.json")
    assert kept.scores == pytest.approx(expected.scores)
    assert kept_before is not None and kept_before.scores == pytest.approx(before.scores)
    printed = capsys.readouterr().out
    assert "before" in printed and "KL (nats per token)" in printed and "RS (own references)" in printed


def test_rome_with_statistics_of_the_models_own_writing(place: Path) -> None:
    arguments = ["edit", "--lm", "model", "--facts", "facts.jsonl", "--limit", "1", "--method", "ROME",
                 "--method.layers", "[1]", "--method.values.steps", "3", "--evaluate", "false"]  # fmt: skip
    edits([*arguments, "--out", "edits/one"])
    assert list((place / "cache" / "stats").rglob("covariance.safetensors"))
    edits([*arguments, "--out", "edits/two"])
    one, two = le.Edit.load("edits/one"), le.Edit.load("edits/two")
    assert torch.equal(one.rounds[0][Place(1)].left, two.rounds[0][Place(1)].left)


CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*/*.yaml"))
CONFIGS = [path for path in CONFIGS if path.parent.name not in ("sweeps", "studies")]  # those are for other commands
STUDIES = sorted((Path(__file__).parents[1] / "configs/studies").glob("*.yaml"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_configs_are_complete(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["edit", "--config", str(config), "--facts", "facts.json", "--out", "edits/x", "--print_config"])
    assert not stop.value.code
    printed = yaml.safe_load(capsys.readouterr().out)
    name, settings = printed["method"]["class_path"].rpartition(".")[2], printed["method"]["init_args"]
    assert name.lower() == {"locft-bf": "ft"}.get(config.stem, config.stem).partition("-")[0]
    assert settings.keys() == {field.name for field in fields(METHODS[name])}
    if issubclass(METHODS[name], ClosedForm):
        assert settings["values"]["lr"] > 0
        assert bool(settings["values"]["stopping"]) == (config.stem in ("encore", "pmet"))
    assert printed["run"]["facts_per_chunk"] >= 1


@pytest.mark.parametrize("config", STUDIES, ids=lambda path: path.stem)
def test_configs_of_studies_are_complete(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["localization", "--config", str(config), "--out", "studies/x", "--print_config"])
    assert not stop.value.code
    assert yaml.safe_load(capsys.readouterr().out)["settings"]["windows"] == [5]


def test_a_run_with_rounds_makes_a_report(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edits(
        edit(
            "--run.facts_per_round",
            "1",
            "--run.validate_every",
            "1",
            "--health_text",
            "text.txt",
            "--evaluation.generate",
        )
    )
    assert {"before.json", "after.json", "retention.csv", "health.csv"} < {
        path.name for path in Path("edits/x").iterdir()
    }
    main(["evaluate", "--lm", "model", "--facts", "facts.jsonl", "--out", "scores.json"])
    main(["report", "edits/x", "scores.json", "--out", "two.html"])
    assert "saved the report in two.html" in capsys.readouterr().out
    two = Path("two.html").read_text()
    after = le.Evaluation.load("edits/x/after.json")
    assert f"{after.scores['ES']:.1f}" in two and "France&#x27;s capital is" in two and "ES after each round" in two
    assert "<dt>after</dt>" in two
    main(["report", "--runs", "[edits/x,scores.json]"])
    assert Path("report.html").read_text() == two


def test_env_names_versions_and_methods(capsys: pytest.CaptureFixture[str]) -> None:
    main(["env"])
    printed = capsys.readouterr().out
    assert torch.__version__ in printed and "ROME, MEMIT, EMMET, PMET, AlphaEdit, ENCORE" in printed


def test_a_fact_base_is_filled_changed_listed_and_applied(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    apply = ["facts", "apply", "--base", "base", "--lm", "model"]
    main(["facts", "add", "--base", "base", "--facts", "facts.jsonl"])
    main(["facts", "list", "--base", "base"])
    printed = capsys.readouterr().out
    assert "added 3 facts, 3 now" in printed and "not applied  The capital of France -> Rome" in printed
    edits([*apply, *QUICK])
    main(["facts", "replace", "--base", "base", "--fact", FACTS[0].text, "--target", "Madrid"])
    le.write_facts("one.jsonl", [replace(FACTS[1], target_new="Peru")])
    main(["facts", "replace", "--base", "base", "--fact", FACTS[1].text, "--by", "one.jsonl"])
    main(["facts", "remove", "--base", "base", "--fact", FACTS[2].text])
    capsys.readouterr()
    main(["facts", "list", "--base", "base"])
    printed = capsys.readouterr().out
    assert "not applied  The capital of France -> Madrid" in printed and "2 facts; the edit is in base/edit" in printed
    assert "removed      The river Rhine flows through -> Paris (still in the edit)" in printed
    edits(apply)
    assert "of 2 facts hold" in capsys.readouterr().out
    saved = le.Edit.load("base/edit")
    assert [fact.target_new for fact in saved.facts] == ["Madrid", "Peru"] and saved.record.method["lambda_"] == 10
    for arguments, message in (
        (["remove", "--fact", "The capital of Frence"], "the closest are 'The capital of France'"),
        (["replace", "--fact", FACTS[0].text], "either --target or --by"),
        (["replace", "--fact", FACTS[0].text, "--by", "facts.jsonl"], "facts.jsonl holds 3 facts"),
        (["list", "--base", "model"], "model exists and is no fact base"),
        (["apply", "--lm", "nowhere", "--base", "nothing"], "nothing holds no facts"),
    ):
        assert message in fails(capsys, ["facts", arguments[0], "--base", "base", *arguments[1:]])


@pytest.mark.parametrize("way", ["edit", "facts"])
def test_facts_as_plain_text_in_a_model_with_a_chat_template_are_pointed_out(
    place: Path, capsys: pytest.CaptureFixture[str], way: str
) -> None:
    quick = [*QUICK, "--method.values.steps", "1"]
    note = "note: model has a chat template, and all facts are written as plain text"

    def written(*chat: str) -> str:
        if way == "edit":
            edits(["edit", "--lm", "model", "--facts", "facts.jsonl", *quick, "--out", f"x{len(chat)}", *chat])
        else:
            main(["facts", "add", "--base", f"base{len(chat)}", "--facts", "facts.jsonl", *chat])
            edits(["facts", "apply", "--base", f"base{len(chat)}", "--lm", "model", *quick])
        return capsys.readouterr().err

    assert "chat template" not in written()
    for folder in ("x0", "base0"):
        shutil.rmtree(folder, ignore_errors=True)
    chat_tokenizer("bytelevel").save_pretrained("model")
    assert note in written() and note not in written("--chat")


# How a run ends


@pytest.mark.filterwarnings("ignore:.*hold \\(the model:UserWarning")
def test_an_edit_with_a_fact_that_does_not_hold_is_saved_and_ends_with_3(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = fails(capsys, edit("--evaluate", "false"), 3)
    assert "the edit is saved, but it does less than was asked: 0 of 3 facts hold" in said
    assert not le.Edit.load("edits/x").held and not Path("edits/x.run").exists()
    main(edit("--evaluate", "false", "--overwrite", "--run.outcomes", "false"))  # nobody asked, so nothing failed
    assert le.Edit.load("edits/x").outcomes == ()


def test_an_edit_whose_facts_hold_ends_with_0_and_prints_them(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    le.write_facts("facts.jsonl", [le.Fact("The capital of {}", "France", "a")])
    values = {"steps": "15", "clamp_norm_factor": "20", "kl_factor": "0", "weight_decay": "0"}
    search = [word for name, value in values.items() for word in (f"--method.values.{name}", value)]
    main(edit("--evaluate", "false", "--method.lambda_", "1e-3", "--method.contexts.prefixes", "[]", *search))
    printed = capsys.readouterr().out
    assert "1 of 1 fact holds" in printed and "The capital of France -> a" in printed and "KL (nats)" in printed


def test_a_run_that_a_limit_ended_ends_with_3(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["--run.facts_per_round", "2", "--run.outcomes", "false", "--evaluate", "false"]
    with pytest.warns(UserWarning, match="stopped in round 1"):
        said = fails(capsys, edit(*short, "--health.max_update_norm", "1e-6"), 3)
    assert "stopped in round 1" in said and le.Edit.load("edits/x").facts == FACTS[:2]


def test_a_warning_is_one_line_of_standard_error(place: Path) -> None:
    command = [sys.executable, "-m", "lightedit", *edit("--evaluate", "false")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    (line,) = [line for line in ended.stderr.splitlines() if "warning" in line]
    assert ended.returncode == 3 and line.startswith("lightedit: warning: 0 of 3 facts hold")
    assert "more values.steps (3)" in line


def test_the_help_lists_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and " ".join(EXIT_CODES.split()) in printed
    assert all(f"{status} " in EXIT_CODES for status in (0, 2, 3, 130))


# Wrong input ends with one line and status 2, and leaves nothing behind


def edit(*changes: str) -> list[str]:
    return ["edit", "--lm", "model", "--facts", "facts.jsonl", *QUICK, "--out", "edits/x", *changes]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (edit("--facts", "missing.json"), "missing.json"),
        (edit("--lm", "./missing"), "missing"),
        (edit("--limit", "0"), "limit"),
        (edit("--lm", "nowhere", "--run.facts_per_round", "0"), "facts_per_round"),
        (edit("--lm", "nowhere", "--run.facts_per_chunk", "0"), "facts_per_chunk"),
        (edit("--method.layers", "[3,4]"), "layers 0 to 3"),
        (edit("--method.layers", "[2,1]"), "ascending"),
        (edit("--method.values.lr", "-1"), "lr"),
        (edit("--dtype", "float3"), "float3"),
        (edit("--covariance", "nowhere"), "nowhere"),
        (edit("--method", "MEMOT"), "MEMOT"),
        (edit("--run.on_collision", "maybe"), "merge"),
        (edit("--run.validate_every", "0"), "validate_every"),
        (edit("--log", "facts.jsonl"), "facts.jsonl is a file"),
        (edit("--health.max_kl", "-1"), "max_kl"),
        (edit("--health.max_kl", "1", "--health.on_limit", "pause"), "pause"),
        (edit("--health_text", "missing.txt"), "missing.txt"),
        (["evaluate", "--lm", "model", "--facts", "facts.jsonl", "--edit", "nowhere"], "nowhere"),
        (["evaluate", "--lm", "model", "--facts", "facts.jsonl", "--out", "no/where.json"],
         "/no does not exist"),
        (["evaluate", "--lm", "model", "--facts", "facts.jsonl", "--compare"], "--edit"),
        (["evaluate", "--lm", "model", "--facts", "facts.jsonl", "--held_out", "missing.json"], "missing.json"),
        (["evaluate", "--lm", "model", "--facts", "facts.jsonl", "--held_out", "facts.jsonl"], "its fact 0"),
        (["evaluate", "--lm", "nowhere", "--facts", "facts.jsonl", "--evaluation.batch_size", "0"],
         "batch_size must be at least 1"),
        (["evaluate", "--lm", "model", "--facts", "facts.jsonl", "--evaluation.text", "missing.txt"], "missing.txt"),
        (["evaluate", "--lm", "model", "--facts", "facts.jsonl", "--references", "own"], "--evaluation.generate"),
        (["evaluate", "--lm", "model", "--facts", "facts.jsonl", "--evaluation.generate", "--references", "text.txt"],
         "text.txt does not hold reference texts"),
        (["covariance", "--lm", "model", "--layers", "[9]", "--out", "stats"], "layers 0 to 3"),
        (["covariance", "--lm", "nowhere", "--layers", "[1]", "--out", "facts.jsonl"], "facts.jsonl is a file"),
        (edit("--lm", "nowhere", "--method.contexts.bare_weight", "50"), "bare_weight is a share"),
        (edit("--lm", "nowhere", "--method.lambda_", ".nan"), "lambda_ must be positive"),
        (["demo", "--facts", "0"], "0 cannot be edited"),
        (["covariance", "--lm", "model", "--layers", "[1]", "--text", "missing.txt", "--out", "stats"], "missing.txt"),
        (["covariance", "--lm", "model", "--layers", "[1]", "--tokens", "3", "--out", "stats"], "3 tokens"),
        (["report"], "runs"),
        (["report", "nowhere"], "nowhere"),
        (["report", "model"], "model"),
        (["report", "model", "--out", "no/where.html"], "/no does not exist"),
        (["edt"], "edt"),
    ],
)  # fmt: skip
def test_wrong_input(place: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert message in fails(capsys, arguments)
    assert not Path("edits").exists() and not Path("stats").exists()


def test_a_bug_keeps_its_traceback(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def buggy(*_: object) -> None:
        raise ValueError("a bug of ours")

    monkeypatch.setattr(le, "read_facts", buggy)
    with pytest.raises(ValueError, match="a bug of ours"):
        main(edit())


def test_a_run_that_passes_a_limit_saves_and_scores_what_was_written(place: Path) -> None:
    with pytest.warns(UserWarning, match="max_update_norm=1e-06"):
        edits(
            edit(
                "--run.facts_per_round",
                "2",
                "--health.max_update_norm",
                "1e-6",
                "--log",
                "log",
                "--run.validate_every",
                "5",
            )
        )
    saved = le.Edit.load("edits/x")
    assert saved.facts == FACTS[:2]
    lm = le.LanguageModel.load("model")
    assert saved.before.scores == pytest.approx(scored(lm, FACTS[:2]).scores)
    saved.apply(lm)
    assert saved.after.scores == pytest.approx(scored(lm, FACTS[:2]).scores)
    assert {"metrics.csv", "retention.csv", "health.csv"} <= {path.name for path in Path("log").iterdir()}


@pytest.mark.filterwarnings("ignore:stopped in round 1")
def test_nothing_is_saved_when_the_only_round_is_rolled_back(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = fails(
        capsys, edit("--health.max_kl", "1e-9", "--health.on_limit", "roll_back", "--health_text", "text.txt"), 3
    )
    assert "no facts are left to save" in printed and "max_kl" in printed
    assert list(Path("edits").rglob("*")) == []


def test_an_existing_edit_is_kept_unless_asked(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edits(edit("--evaluate", "false"))
    first = Path("edits/x/edit.json").read_text()
    assert "exists" in fails(capsys, edit("--evaluate", "false"))
    assert Path("edits/x/edit.json").read_text() == first
    edits(edit("--evaluate", "false", "--overwrite"))
    assert Path("edits/x/edit.json").read_text() != first
