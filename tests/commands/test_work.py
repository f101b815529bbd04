"""How often the expensive parts of a run are done: once."""

from collections import Counter
from pathlib import Path

import lightning
import pytest
import torch

import lightedit as le
from lightedit.__main__ import main
from lightedit.data.prompts import ContextSettings
from lightedit.lm import Place
from lightedit.methods.closed_form.keys import KeyWalk
from tests.models import tiny_model, tiny_tokenizer
from tests.runs import FACTS, MEMIT, covariance_of


@pytest.fixture
def lm() -> le.LanguageModel:
    return le.LanguageModel(tiny_model("llama"), tiny_tokenizer("bytelevel"))


@pytest.fixture
def done(lm: le.LanguageModel, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts factorisations of a covariance's size, samplings of contexts, walks for keys, and trainers."""
    counts: Counter[str] = Counter()
    d_in = lm.weight(Place(0)).shape[1]

    def counted(owner, name, what, when=lambda *_: True):
        original = getattr(owner, name)

        def call(*args, **kwargs):
            counts[what] += bool(when(*args))
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    for factorisation in ("cholesky_ex", "cholesky", "eigh"):
        counted(torch.linalg, factorisation, "factorisations", lambda matrix, *_: matrix.shape[-2:] == (d_in, d_in))
    counted(ContextSettings, "sample", "samplings")
    counted(KeyWalk, "__init__", "walks")
    counted(lightning.Trainer, "__init__", "trainers")
    return counts


def test_a_memit_edit_factors_each_matrix_once_samples_once_and_makes_one_trainer(
    lm: le.LanguageModel, done: Counter[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(le.LanguageModel, "load", lambda *_: lm)
    le.write_facts(tmp_path / "facts.jsonl", FACTS)
    covariance_of(lm).save(tmp_path / "stats")
    main(["edit", "--lm", "tiny", "--facts", str(tmp_path / "facts.jsonl"), "--covariance", str(tmp_path / "stats"),
          "--method", "MEMIT", "--method.layers", "[1,2]", "--method.lambda_", "5", "--method.values.steps", "3",
          "--run.outcomes", "false", "--out", str(tmp_path / "edit")])  # fmt: skip
    assert done == {"factorisations": len(MEMIT.layers), "samplings": 1, "walks": 2, "trainers": 1}


def test_a_sweep_over_three_lambdas_factors_each_matrix_three_times_and_samples_once(
    lm: le.LanguageModel, done: Counter[str], tmp_path: Path
) -> None:
    le.sweep(
        lm, FACTS, {"MEMIT": MEMIT}, out=tmp_path / "sweep", covariance=covariance_of(lm),
        grid={"lambda_": [1.0, 5.0, 25.0]}, settings=le.RunSettings(progress_bar=False),
    )  # fmt: skip
    assert done["factorisations"] == 3 * len(MEMIT.layers)
    assert done["samplings"] == 1 and done["trainers"] == 3
