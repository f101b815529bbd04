"""GRACE with the option `published` against the literal published loop: codebook and logits, to 1e-5."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import lightedit as le
from benchmarks.published import Request
from benchmarks.published.adaptors import PublishedGRACE, Replaced, published_grace
from lightedit.methods.adaptors.codebook import PAD, Codebook
from tests.models import tiny_model, tiny_tokenizer
from tests.runs import FACTS, run

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
POSITIONS: dict[str, Replaced] = {"last": "replace_last", "prompt": "replace_prompt", "all": "replace_all"}


def build(architecture: str) -> le.LanguageModel:
    return le.LanguageModel(tiny_model(architecture, dtype=torch.float64), tiny_tokenizer("bytelevel"))


def both(lm: le.LanguageModel, facts: list[le.Fact], method: le.GRACE) -> tuple[Codebook, PublishedGRACE]:
    """Our codebook after one fact a round, which the model carries, and the published one."""
    editor = method.editor(lm)
    editor.prepare(facts, [[i] for i in range(len(facts))])
    d_out = lm.anatomy.shape(method.place)[0]

    def cold(index: int) -> Tensor:
        return torch.rand(d_out, generator=editor.generator(index), dtype=torch.float64)

    requests = [Request(fact.prompt, str(fact.subject), fact.target_new) for fact in facts]
    theirs = published_grace(
        lm.model, lm.tokenizer, requests, lm.module(method.place), cold, method.radius, method.lr, method.steps,
        "moving_average" if method.expand == "average" else "coverage", POSITIONS[method.positions or "last"],
    )  # fmt: skip
    edit = run(lm, facts, method, facts_per_round=1)
    ours = lm.weights.adaptor(method.place, edit.id)
    assert isinstance(ours, Codebook)
    return ours, theirs


def assert_equal(lm: le.LanguageModel, method: le.GRACE, ours: Codebook, theirs: PublishedGRACE) -> None:
    assert theirs.keys is not None
    torch.testing.assert_close(ours.keys, theirs.keys, **CLOSE)
    torch.testing.assert_close(ours.radii, torch.tensor(theirs.radii, dtype=torch.float64), **CLOSE)
    torch.testing.assert_close(ours.values, torch.stack(theirs.values), **CLOSE)
    assert [own[own != PAD].tolist() for own in ours.labels] == [label.tolist() for label in theirs.labels]
    for text in [*(fact.text for fact in FACTS), "He is"]:
        ids = torch.tensor([lm.tokenizer(text)["input_ids"]])
        logits = lm.model(ids).logits
        with lm.weights.unedited(), theirs.at(lm.module(method.place)):
            torch.testing.assert_close(logits, lm.model(ids).logits, **CLOSE)


@pytest.mark.parametrize("positions", list(POSITIONS))
@pytest.mark.parametrize(("architecture", "part"), [("gpt2", "mlp_in"), ("llama", "mlp")])
def test_entries_and_logits_are_those_of_the_published_loop(architecture: str, part: str, positions: str) -> None:
    lm = build(architecture)
    method = le.GRACE(layer=1, part=part, steps=4, radius=1e-3, published=True, positions=positions)
    ours, theirs = both(lm, FACTS[:4], method)
    assert len(ours) == 4
    assert_equal(lm, method, ours, theirs)


@pytest.mark.parametrize("expand", ["coverage", "average"])
def test_expanding_and_splitting_are_those_of_the_published_loop(expand: str) -> None:
    lm = build("gpt2")
    # at this place Peru and Berlin are 3.4 apart, Spain 5.5 from Peru, Tokyo 7 and more from all
    facts = [replace(FACTS[0], subject=name, target_new="Rome") for name in ("Peru", "Berlin", "Spain", "Tokyo")]
    facts[2] = replace(facts[2], target_new="Bern")
    method = le.GRACE(layer=1, steps=4, radius=3.0, published=True, expand=expand)
    ours, theirs = both(lm, facts, method)
    assert len(ours) == 3 and [bool(radius < 3.0) for radius in ours.radii] == [True, True, False]
    assert_equal(lm, method, ours, theirs)


def test_one_label_is_told_by_its_mean_prompt_included() -> None:
    lm = build("gpt2")
    texts = [("The capital of {}", "Peru"), ("The capital of {}", "Vienna")]  # of 7 and 9 tokens
    facts = [le.Fact(prompt, subject, "Rome") for prompt, subject in texts]
    method = le.GRACE(layer=1, steps=2, radius=1e3, published=True)
    ours, theirs = both(lm, facts, method)
    assert len(ours) == 2  # though both have one target
    assert_equal(lm, method, ours, theirs)
