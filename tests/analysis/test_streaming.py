"""A stream of edits: which facts are edited, the scores by hand, resuming to the same bits, and its files."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import lightedit as le
from lightedit.analysis.streaming import run as streaming
from lightedit.analysis.streaming.figures import save_stream_figure
from lightedit.metrics.functional import answer_f1
from tests.models import tiny_model, tiny_tokenizer
from tests.runs import CONTEXTS, FACTS, MEMIT, ROME, VALUES, assert_unedited, covariance_of, run, state

LONG = le.Fact("word " * 200 + "word", target_new="x")
WORDS = ("the", "of", "and", "in", "to")
STREAM = [replace(fact, target_new=new) for fact, new in zip(FACTS, WORDS, strict=True)]
GRACE = le.GRACE(layer=1, steps=12, lr=0.5, radius=0.5)
QUIET = le.StreamSettings(score="accuracy", score_every=2, progress_bar=False)


def unedited() -> le.LanguageModel:
    return le.LanguageModel(tiny_model("gpt2"), tiny_tokenizer("bytelevel"))


@pytest.fixture
def lm() -> le.LanguageModel:
    return unedited()


def streamed(lm: le.LanguageModel, method: le.Method = GRACE, facts=STREAM, settings=QUIET, **others) -> le.Stream:
    covariance = covariance_of(lm, method.covariance_places)
    return le.stream(lm, facts, method, settings=settings, covariance=covariance, **others)


def spoken(lm: le.LanguageModel, number: int = 0) -> le.Fact:
    """A fact that the model states already, with a target of one token."""
    found = []
    for word in TEXT.split():
        prompt = f"It is said that the {word}"
        (new,) = lm.generate(lm.encode([prompt]), 1, top_k=1, seed=[0])
        target = lm.decode(new)
        separator = " " if target.startswith(" ") else ""
        whole = lm.tokenizer(prompt + target)["input_ids"]
        if (
            target.strip().isascii()
            and target.strip().isalnum()
            and whole == [*lm.tokenizer(prompt)["input_ids"], *new]
        ):
            found.append(le.Fact(prompt, target_new=target.strip(), separator=separator))
    return found[number]


TEXT = "river country city state king of was in born north people winter village steel engine tower"


def test_what_the_model_states_is_skipped_and_the_rest_is_scored_as_by_hand(lm) -> None:
    upstream = [spoken(lm, number) for number in range(3)]
    facts = [upstream[0], *STREAM[:3]]
    found = streamed(lm, facts=facts, upstream=upstream)
    assert [fact.edited for fact in found.facts] == [False, True, True, True]
    assert [(step.edits, step.seen, step.skipped) for step in found.steps] == [(0, 0, 0), (2, 3, 1), (3, 4, 1)]
    assert found.steps[0].ERR is None and found.steps[0].ES is None
    with lm.weights.unedited():
        before = sum(lm.complete(f.text).lstrip().startswith(f.target_new) for f in upstream) / 3
    after = sum(lm.complete(f.text).lstrip().startswith(f.target_new) for f in upstream) / 3
    assert pytest.approx((before, after)) == (found.steps[0].TRR, found.last.TRR) and before == 1.0
    errs = [lm.complete(f.text).lstrip().startswith(f.target_new) for f in facts[1:]]
    assert pytest.approx(sum(errs) / 3) == found.last.ERR
    assert found.last.mean == pytest.approx((found.last.TRR + found.last.ERR) / 2)
    assert pytest.approx(sum(f.score for f in found.facts if f.edited) / 3) == found.last.ES
    assert "4 facts came, 3 edited, 1 skipped" in str(found)


def test_without_the_test_all_facts_are_edited_up_to_a_number(lm) -> None:
    facts = [spoken(lm), *STREAM]
    found = streamed(lm, facts=facts, settings=replace(QUIET, test_first=False, max_edits=2))
    assert [fact.edited for fact in found.facts] == [True, True] and len(found.edit.facts) == 2


@pytest.mark.parametrize("method", [GRACE, ROME, MEMIT], ids=["GRACE", "ROME", "MEMIT"])
def test_a_stream_is_an_edit_of_one_fact_a_round_to_the_bit(lm, method: le.Method) -> None:
    found = streamed(lm, method, settings=replace(QUIET, test_first=False))
    other = unedited()
    edit = run(other, STREAM, method, facts_per_round=1)
    assert_same(lm, other)
    assert [len(r) for r in found.edit.rounds] == [len(r) for r in edit.rounds]
    found.edit.revert(lm)
    assert_unedited(lm, state(unedited()))


def assert_same(lm: le.LanguageModel, other: le.LanguageModel) -> None:
    for name, parameter in other.model.named_parameters():
        assert torch.equal(parameter, lm.model.get_parameter(name)), name
    for fact in STREAM:
        ids = torch.tensor(lm.encode([fact.text]))
        assert torch.equal(lm.model(ids).logits, other.model(ids).logits)


FT = le.FT(layers=(1,), lr=1e-2, epochs=3)
EWC = le.EWC(layers=(1,), lr=1e-2, epochs=3)
RETRAIN = le.Retrain(layers=(1,), lr=1e-2, epochs=3, every=2)
MEMORY = le.Memory(layer=1, steps=4, entries=5)
ENCORE = le.ENCORE(layers=(1, 2), values=VALUES, contexts=CONTEXTS, lambda_=5.0, norm_weight=1.0)


@pytest.mark.parametrize("method", [FT, EWC, RETRAIN, MEMORY], ids=["FT", "EWC", "Retrain", "Memory"])
def test_changes_as_large_as_the_place_are_kept_as_one(lm, method: le.Method) -> None:
    found = streamed(lm, method, settings=replace(QUIET, test_first=False))
    assert len(found.edit.rounds) == 1 and found.edit.facts_in_round == [5] and found.edit.facts == STREAM
    other = unedited()
    run(other, STREAM, method, facts_per_round=1)
    for fact in STREAM:
        ids = torch.tensor(lm.encode([fact.text]))
        torch.testing.assert_close(lm.model(ids).logits, other.model(ids).logits, rtol=1e-3, atol=2e-3)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("method", [GRACE, RETRAIN, MEMORY, ENCORE], ids=["GRACE", "Retrain", "Memory", "ENCORE"])
def test_a_stream_that_was_interrupted_ends_with_the_same_bits(
    lm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: le.Method
) -> None:
    facts = [spoken(lm), *STREAM[:3]]
    upstream = [spoken(lm, 1)]
    whole = streamed(lm, method, facts, upstream=upstream)
    other = unedited()
    before = state(other)
    right, calls = streaming.search, []

    def failing(editor, indices, optimizer):
        calls.append(indices)
        if len(calls) == 3:
            raise Stopped
        right(editor, indices, optimizer)

    monkeypatch.setattr(streaming, "search", failing)
    with pytest.raises(Stopped):
        streamed(other, method, facts, upstream=upstream, checkpoint=tmp_path / "run")
    assert_unedited(other, before)
    resumed = streamed(other, method, facts, upstream=upstream, checkpoint=tmp_path / "run")
    assert calls == [[1], [2], [3], [3]]  # what was stored is not written again
    assert resumed == whole and resumed.edit.id != whole.edit.id
    assert_same(other, lm)
    with pytest.raises(le.ResumeError, match="another run"):
        streamed(unedited(), method, facts[1:], upstream=upstream, checkpoint=tmp_path / "run")


def test_values_that_are_not_finite_end_the_stream_and_earlier_edits_stay(lm, monkeypatch: pytest.MonkeyPatch) -> None:
    right = streaming.search

    def diverging(editor, indices, optimizer):
        if indices == [2]:
            raise streaming.NumericalError("the loss is nan")
        right(editor, indices, optimizer)

    monkeypatch.setattr(streaming, "search", diverging)
    found = streamed(lm)
    assert found.stopped == f"at fact 3, {STREAM[2].text!r}: the loss is nan"
    assert found.last.edits == 2 and found.edit.is_applied(lm) and "ended early" in str(found)


def test_upstream_facts_that_are_unknown_are_told(lm) -> None:
    found = streamed(lm, facts=STREAM[:1], upstream=[replace(STREAM[1], target_new="Bern", target_true=None)])
    assert "knows none of the upstream facts" in str(found) and "skipped" not in str(found)


@pytest.mark.parametrize("score", ["f1", "perplexity"])
def test_each_score_is_that_of_its_own_kind(lm, score: str) -> None:
    found = streamed(lm, settings=replace(QUIET, score=score, max_edits=1))
    assert found.last.ERR > 0.9 if score == "f1" else 1 < found.last.ERR < 5
    assert found.last.generalization is not None


def test_f1_is_that_of_words() -> None:
    said = ["The Amazon, a river", "Rome Rome", "no", "the"]
    assert answer_f1(said, ["Amazon River", "Rome", "yes", "The"]).tolist() == pytest.approx([1, 2 / 3, 0, 1])


def test_what_is_saved_is_loaded_and_drawn(lm, tmp_path: Path) -> None:
    found = streamed(lm, upstream=[spoken(lm)])
    found.save(tmp_path)
    assert le.Stream.load(tmp_path) == found
    lines = (tmp_path / "stream.csv").read_text().splitlines()
    assert lines[0] == "edits,seen,skipped,TRR,ERR,ES,generalization,mean" and len(lines) == 1 + len(found.steps)
    assert [file.name for file in save_stream_figure(found, tmp_path)] == ["stream.svg", "stream.png"]
    assert "TRR" in (tmp_path / "stream.svg").read_text()
    (tmp_path / "stream.json").write_text("{}")
    with pytest.raises(le.LightEditError, match="run the stream again"):
        le.Stream.load(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"facts": []}, "the list is empty"),
        ({"method": le.GRACE(layer=9)}, "layers 0 to 3"),
        ({"facts": [LONG]}, "facts: fact 0"),
        ({"upstream": [LONG]}, "upstream: fact 0"),
    ],
)
def test_wrong_input_is_refused_before_work(lm, tmp_path: Path, arguments: dict, message: str) -> None:
    before = state(lm)
    arguments = {"facts": STREAM, "method": GRACE} | arguments
    with pytest.raises(le.LightEditError, match=message):
        le.stream(lm, arguments.pop("facts"), arguments.pop("method"), **arguments, checkpoint=tmp_path / "run")
    assert_unedited(lm, before)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "value"), [("score", "bleu"), ("max_edits", 0), ("score_every", 0)])
def test_wrong_settings_are_refused(name: str, value: object) -> None:
    with pytest.raises(le.LightEditError, match=name):
        le.StreamSettings(**{name: value})
