"""Small models that the package trains: they learn, load again, and are the same from the same seed."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import lightedit as le
from lightedit.__main__ import main
from lightedit.metrics.answered import answers
from lightedit.training.models import byte_tokenizer
from tests.models import tiny_other, tiny_other_tokenizer

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
    assert fitted.trained == 1.0 and fitted.held_out is None and fitted.losses[-1] < fitted.losses[0] / 5
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
    assert one("sea", add_special_tokens=False)["input_ids"] == one("the sea", add_special_tokens=False)["input_ids"][-1:] or len(
        one("sea", add_special_tokens=False)["input_ids"]) > 1  # fmt: skip


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
    with pytest.raises(le.LightEditError, match="held_out is a share"):
        le.TrainingSettings(held_out=1.0)
    assert not (tmp_path / "out").exists()


def test_the_command_trains_both(tmp_path: Path, encoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    claims = tmp_path / "claims.csv"
    claims.write_text("claim,label\n" + "".join(f"{claim.text},{claim.answer}\n" for claim in CLAIMS))
    quick = ["--settings.epochs", "1", "--settings.progress_bar", "false"]
    main(["train-model", "--examples", str(claims), "--encoder", str(encoder), "--out", str(tmp_path / "a"), *quick])
    sizes = [f"--size.{name}={value}" for name, value in SIZE.__dict__.items()]
    main(["train-model", "--examples", str(claims), "--out", str(tmp_path / "b"), *quick, *sizes])
    assert le.LanguageModel.load(tmp_path / "a").kind == "classifier"
    assert le.LanguageModel.load(tmp_path / "b").kind == "encoder-decoder"
    assert capsys.readouterr().out.count("of the trained answers") == 2
    assert torch.is_grad_enabled()
