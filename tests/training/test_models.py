"""Small models that the package trains: they learn, load again, and are the same from the same seed."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import lightedit as le
from lightedit.__main__ import main
from lightedit.metrics.answered import answers
from lightedit.runs.folder import state_file
from lightedit.training.fitting import AnswerModule
from lightedit.training.models import byte_tokenizer
from tests.models import tiny_other, tiny_other_tokenizer
from tests.runs import state

QUIET = le.TrainingSettings(progress_bar=False, held_out=0.0)
WORDS = ("river", "city", "king", "song", "winter", "tower", "doctor", "music")
CLAIMS = [
    le.Example(f"The {word} is {old}", "yes" if old == "old" else "no", id=str(number))
    for number, word in enumerate(WORDS)
    for old in ("old", "new")
]
QUESTIONS = [
    le.Example(f"Where is the {word}?", place, rephrasings=(f"The {word} is where?",))
    for word, place in zip(
        WORDS, ("Rome", "Paris", "Berlin", "Tokyo", "New York", "Vienna", "Spain", "Peru"), strict=True
    )
]
SIZE = le.T5Size(layers=1, d_model=32, d_ff=64, heads=2, vocabulary=400)


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A BERT without a classification head."""
    tiny_other("bert").bert.save_pretrained(tmp_path / "encoder")
    tiny_other_tokenizer("bert").save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def test_a_classifier_learns_its_classes_and_loads_again(tmp_path: Path, encoder: Path) -> None:
    settings = replace(QUIET, epochs=30, lr=3e-3, batch_size=8)
    lm, fitted = le.train_classifier(encoder, CLAIMS, tmp_path / "classifier", settings=settings)
    assert lm.kind == "classifier" and lm.labels == ("no", "yes")
    assert fitted.trained == 1.0 and fitted.held_out is None and fitted.epochs[-1].loss < fitted.epochs[0].loss
    assert answers(lm, [claim.text for claim in CLAIMS]) == [claim.answer for claim in CLAIMS]
    again, _ = le.train_classifier(encoder, CLAIMS, tmp_path / "again", settings=settings)
    assert again.fingerprint == lm.fingerprint


def test_a_share_is_held_out_and_long_texts_are_cut(tmp_path: Path, encoder: Path) -> None:
    settings = replace(QUIET, epochs=1, held_out=0.25, most_tokens=8)
    long = [le.Example(claim.text + " and so on" * 100, claim.answer) for claim in CLAIMS]
    _, fitted = le.train_classifier(encoder, long, tmp_path / "classifier", settings=settings)
    assert fitted.held_out in [number / 4 for number in range(5)]


def test_a_t5_learns_its_answers_and_loads_again(tmp_path: Path) -> None:
    settings = replace(QUIET, epochs=60, lr=1e-2, batch_size=16)
    lm, fitted = le.train_t5(QUESTIONS, tmp_path / "t5", size=SIZE, settings=settings)
    assert lm.kind == "encoder-decoder" and lm.n_layers == 2 and "mlp_gate" in lm.architecture.names
    assert fitted.trained == 1.0
    assert answers(lm, [question.text for question in QUESTIONS]) == [question.answer for question in QUESTIONS]
    assert answers(lm, [question.rephrasings[0] for question in QUESTIONS[:2]]) == ["Rome", "Paris"]
    loaded = le.LanguageModel.load(tmp_path / "t5", device="cpu")
    assert loaded.fingerprint == lm.fingerprint


def test_a_byte_tokenizer_spells_everything_and_ends_a_text() -> None:
    one, other = (byte_tokenizer(["the sea of Japan", "the river"], 300) for _ in range(2))
    assert one.get_vocab() == other.get_vocab()
    row = one("東京 ☃")["input_ids"]
    assert row[-1] == one.eos_token_id and one.unk_token_id not in row
    assert one.decode(row, skip_special_tokens=True).strip() == "東京 ☃"
    alone, within = (one(text, add_special_tokens=False)["input_ids"] for text in ("sea", "the sea"))
    assert within[-len(alone) :] == alone


def test_what_cannot_be_trained_is_refused_before_work(tmp_path: Path, encoder: Path) -> None:
    with pytest.raises(le.LightEditError, match="1 class; give examples of at least two"):
        le.train_classifier(encoder, CLAIMS[::2], tmp_path / "out")
    with pytest.raises(le.LightEditError, match="exists already"):
        le.train_classifier(encoder, CLAIMS, tmp_path)
    with pytest.raises(FileNotFoundError, match="without a config"):
        le.train_classifier(tmp_path, CLAIMS, tmp_path / "out")
    with pytest.raises(le.LightEditError, match="the list is empty"):
        le.train_t5([], tmp_path / "out")
    with pytest.raises(le.LightEditError, match="heads divide d_model"):
        le.T5Size(d_model=10, heads=3)
    for wrong, message in (
        ({"held_out": 1.0}, "held_out is a share"),
        ({"epochs": 0}, "epochs and batch_size must be at least 1"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"enough": 1.5}, "enough is a share"),
        ({"patience": 2, "held_out": 0.0}, "patience counts epochs"),
    ):
        with pytest.raises(le.LightEditError, match=message):
            le.TrainingSettings(**wrong)
    with pytest.raises(le.LightEditError, match="leave 2 to train on and 0 to measure"):
        le.train_t5(QUESTIONS[:1], tmp_path / "out", settings=le.TrainingSettings(patience=1, held_out=0.1))
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.run").exists()


class Killed(Exception):
    """Raised in the middle of a training, as if its process were killed."""


def killed_after(steps: int) -> Callable[..., torch.Tensor]:
    """A training step that raises after this many."""
    step = AnswerModule.training_step

    def training_step(self: AnswerModule, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        if self.global_step == steps:
            raise Killed
        return step(self, batch, batch_idx)

    return training_step


def test_a_killed_training_goes_on_to_the_same_bits(
    tmp_path: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = replace(QUIET, epochs=5, lr=3e-3, batch_size=4, held_out=0.2, keep_every=0.0)
    whole, measured = le.train_classifier(encoder, CLAIMS, tmp_path / "whole", settings=settings)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(AnswerModule, "training_step", killed_after(10))  # in the third epoch of 4 batches
        le.train_classifier(encoder, CLAIMS, tmp_path / "out", settings=settings)
    assert not (tmp_path / "out").exists() and state_file(tmp_path / "out.run").exists()
    with pytest.raises(le.ResumeError, match=r"settings.lr \(0.003 there, 0.004 now\)"):
        le.train_classifier(encoder, CLAIMS, tmp_path / "out", settings=replace(settings, lr=4e-3))
    with pytest.raises(le.ResumeError, match="differs in examples"):
        le.train_classifier(encoder, CLAIMS[1:], tmp_path / "out", settings=settings)
    again, resumed = le.train_classifier(encoder, CLAIMS, tmp_path / "out", settings=settings)
    assert "continuing after epoch 2 of 5" in capsys.readouterr().err
    assert resumed == measured and len(resumed.epochs) == 5
    for name, value in state(whole).items():
        assert torch.equal(value, state(again)[name]), name
    assert not (tmp_path / "out.run").exists()


def test_a_damaged_copy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(QUIET, epochs=3, keep_every=0.0)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(AnswerModule, "training_step", killed_after(1))
        le.train_t5(QUESTIONS, tmp_path / "t5", size=SIZE, settings=settings)
    state_file(tmp_path / "t5.run").write_bytes(b"cut")
    with pytest.raises(le.ResumeError, match=r"training.ckpt is damaged .*delete .*t5.run"):
        le.train_t5(QUESTIONS, tmp_path / "t5", size=SIZE, settings=settings)


def test_a_training_ends_once_enough_is_right_or_nothing_is_gained(tmp_path: Path, encoder: Path) -> None:
    settings = replace(QUIET, epochs=40, lr=3e-3, batch_size=8)
    _, fitted = le.train_classifier(encoder, CLAIMS, tmp_path / "a", settings=replace(settings, enough=0.9))
    rights = [epoch.right for epoch in fitted.epochs]
    assert len(rights) < 40 and rights[-1] >= 0.9 and max(rights[:-1]) < 0.9
    patient = replace(settings, patience=2, held_out=0.25)
    _, fitted = le.train_classifier(encoder, CLAIMS, tmp_path / "b", settings=patient)
    losses = [epoch.held_out_loss for epoch in fitted.epochs]
    assert 2 < len(losses) < 40 and min(losses[-2:]) >= min(losses[:-2])
    record = json.loads((tmp_path / "b" / "training.json").read_text())
    assert record["held_out"] == fitted.held_out and len(record["epochs"]) == len(losses)


def test_the_command_trains_both(tmp_path: Path, encoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    claims = tmp_path / "claims.csv"
    claims.write_text("claim,label\n" + "".join(f"{claim.text},{claim.answer}\n" for claim in CLAIMS))
    quick = ["--settings.epochs", "1", "--settings.progress_bar", "false"]
    main(["train-model", "--examples", str(claims), "--encoder", str(encoder), "--out", str(tmp_path / "a"), *quick])
    sizes = [f"--size.{name}={value}" for name, value in SIZE.__dict__.items()]
    main(["train-model", "--examples", str(claims), "--out", str(tmp_path / "b"), *quick, *sizes])
    assert capsys.readouterr().out.count("of the trained answers") == 2
    with pytest.raises(SystemExit):
        main(["train-model", "--examples", str(claims), "--encoder", "x", "--out", str(tmp_path / "c"), *sizes])
    assert "--encoder x has its own" in capsys.readouterr().err
    assert le.LanguageModel.load(tmp_path / "a").kind == "classifier"
    assert le.LanguageModel.load(tmp_path / "b").kind == "encoder-decoder"
    assert torch.is_grad_enabled()
