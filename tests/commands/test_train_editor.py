"""`lightedit train-editor`, and `lightedit edit` with what it saved, on a tiny model."""

from pathlib import Path

import pytest

import lightedit as le
from lightedit.__main__ import main
from lightedit.methods.hypernetworks.module import HyperNetworkModule
from tests.models import tiny_model, tiny_tokenizer
from tests.runs import FACTS

SMALL = ["--settings.steps", "4", "--settings.validate_every", "2", "--settings.batch_size", "2",
         "--settings.validation", "1"]  # fmt: skip
MEND = ["--method", "MEND", "--method.rank", "8", "--method.rate", "0.01"]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lm = le.LanguageModel(tiny_model("llama"), tiny_tokenizer("bytelevel"))
    monkeypatch.setattr(le.LanguageModel, "load", lambda *_: lm)
    le.write_facts(tmp_path / "facts.jsonl", FACTS)
    return ["train-editor", "--lm", "tiny", "--facts", str(tmp_path / "facts.jsonl"), "--out", str(tmp_path / "mend")]


def test_a_network_is_trained_and_edits(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([*command, *MEND, *SMALL])
    printed = capsys.readouterr()
    assert {file.name for file in (tmp_path / "mend").iterdir()} == {
        "editor.json", "network.safetensors", "validation.csv",
    }  # fmt: skip
    assert "before training, step 0: loss" in printed.out and "trained for 4 steps" in printed.out
    assert all(f"step {number}: loss" in printed.err for number in (0, 2, 4))
    assert le.MEND.load(tmp_path / "mend").layers == (1, 2, 3)  # the last three
    edit = ["edit", *command[1:5], "--out", str(tmp_path / "edit"), "--method", "MEND"]
    with pytest.warns(UserWarning, match="try a network trained longer"), pytest.raises(SystemExit) as stop:
        main([*edit, "--method.folder", str(tmp_path / "mend"), "--evaluate", "false"])
    assert stop.value.code == 3  # it was trained for four steps, so facts do not hold
    assert le.Edit.load(tmp_path / "edit").layers == [1, 2, 3]


def test_the_single_protocol_and_a_sweep_take_a_trained_network(command: list[str], tmp_path: Path) -> None:
    main([*command, *MEND, *SMALL])
    trained = ["--method", "MEND", "--method.folder", str(tmp_path / "mend")]
    main(["evaluate", *command[1:5], *trained, "--protocol", "single", "--out", str(tmp_path / "single.json")])
    assert (tmp_path / "single.json").is_file()
    methods = f"{{MEND: {{class_path: lightedit.MEND, init_args: {{folder: {tmp_path / 'mend'}}}}}}}"
    main(["sweep", *command[1:5], "--methods", methods, "--facts_per_round", "[2,single]", "--out",
          str(tmp_path / "sweep")])  # fmt: skip
    lines = (tmp_path / "sweep" / "runs.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines[1:]] == ["unedited", "MEND", "MEND"]


def test_a_training_that_was_interrupted_goes_on(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = HyperNetworkModule.training_step

    def interrupted(self, batch, batch_idx):
        if self.global_step == 3:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patched:
        patched.setattr(HyperNetworkModule, "training_step", interrupted)
        with pytest.raises(SystemExit) as stop:
            main([*command, *MEND, *SMALL])
    assert stop.value.code == 130 and "goes on after the last validation" in capsys.readouterr().err
    assert (tmp_path / "mend.run").is_dir() and not (tmp_path / "mend").exists()
    main([*command, *MEND, *SMALL])
    assert "continuing after step 2 of 4" in capsys.readouterr().err
    assert (tmp_path / "mend").is_dir() and not (tmp_path / "mend.run").exists()


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (["--method", "FT", "--method.layers", "[1]"], "expected KE or MEND, got FT"),
        ([*MEND, "--method.layers", "[7]"], "layers 0 to 3"),
        ([*MEND, "--method.parts", "[mlp_gate,mlp_gate]"], "parts are distinct ones of"),
        ([*MEND, "--settings.steps", "0"], "steps must be at least 1, got 0"),
        ([*MEND, "--limit", "1"], "at least 2"),
        ([*MEND, "--settings.validation", "5"], "of which validation holds out 5"),
        ([*MEND, "--chat"], "chat template"),
        ([*MEND, "--method.folder", "nowhere"], "nowhere holds no trained network"),
    ],
)
def test_wrong_input_ends_with_status_2(
    command: list[str], others: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*command, *others])
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "mend").exists() and not (tmp_path / "mend.run").exists()


def test_an_edit_without_a_network_or_of_another_method_is_refused(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*command, *MEND, *SMALL])
    edit = ["edit", *command[1:5], "--out", str(tmp_path / "edit")]
    for method, message in (
        (["MEND"], "MEND edits with a trained network; make one with lightedit train-editor"),
        (["KE", "--method.folder", str(tmp_path / "mend")], "holds a network of MEND, not KE"),
        (["MEND", "--method.folder", str(tmp_path)], "holds no trained network"),
    ):
        with pytest.raises(SystemExit) as stop:
            main([*edit, "--method", *method])
        assert stop.value.code == 2 and message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command, *MEND, *SMALL])
    assert "exists already; choose another folder, or allow overwriting" in capsys.readouterr().err
