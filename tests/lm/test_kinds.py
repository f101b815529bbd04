"""Classifiers and encoder-decoders as language models: answers, places, and what is refused."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

import lightedit as le
from lightedit.lm import Place
from lightedit.lm.changes import DenseUpdate
from lightedit.lm.rowwise import RowwiseEdits
from lightedit.metrics import score_targets
from tests.kinds import TEXTS, arguments, facts_for, other_model
from tests.models import LABELS, OTHER_KINDS, tiny_model, tiny_other, tiny_other_tokenizer, tiny_tokenizer
from tests.runs import assert_unedited, state

QUIET = le.RunSettings(progress_bar=False)
EVERY = pytest.mark.parametrize("name", list(OTHER_KINDS))
ENCODERS = [name for name in OTHER_KINDS if not name.startswith("t5")]
T5 = [name for name in OTHER_KINDS if name.startswith("t5")]


@EVERY
def test_the_kind_follows_from_the_model_and_layers_are_numbered_through(name: str) -> None:
    lm = other_model(name)
    assert lm.kind == ("encoder-decoder" if name in T5 else "classifier")
    assert lm.labels == (() if name in T5 else LABELS)
    assert lm.n_layers == (3 + 2 if name in T5 else 3) and lm.d_model == 32
    assert {"mlp", "attention_out", "block", "embedding"} <= set(lm.architecture.names)
    if name in T5:
        assert lm.module_name(Place(2)) == "encoder.block.2.layer.1.DenseReluDense.wo"
        assert lm.module_name(Place(3)) == "decoder.block.0.layer.2.DenseReluDense.wo"
        assert lm.module_name(Place(4, "q")) == "decoder.block.1.layer.0.SelfAttention.q"
        assert ("mlp_gate" in lm.architecture.names) == (name == "t5-gated")


@EVERY
def test_scores_are_those_of_transformers_own_loss(name: str) -> None:
    lm = other_model(name)
    for facts in (facts_for(lm), [replace(fact, end_turn=True) for fact in facts_for(lm) if name in T5]):
        if not facts:
            continue
        scores = score_targets(
            lm, TEXTS, [fact.target_new for fact in facts], batch_size=3, servings=[fact.serving for fact in facts]
        )
        for fact, nll, said, rank in zip(facts, scores.nll.tolist(), scores.predicted, scores.rank, strict=True):
            inputs = arguments(lm, fact)
            output = lm.model(**inputs)
            assert nll == pytest.approx(output.loss.item(), rel=1e-4)
            logits = output.logits.flatten(0, -2)
            assert list(said) == logits.argmax(-1).tolist()
            wanted = logits.gather(1, inputs["labels"].view(-1, 1))
            assert rank == 1 + (logits > wanted).sum(-1).max()


@pytest.mark.parametrize("name", ENCODERS)
def test_a_classifier_answers_with_the_name_of_its_class(name: str) -> None:
    lm = other_model(name)
    for text, said in zip(TEXTS, lm.complete(list(TEXTS)), strict=True):
        logits = lm.model(torch.tensor([lm.tokenizer(text)["input_ids"]])).logits
        assert said == " " + LABELS[logits.argmax()]


@pytest.mark.parametrize("name", T5)
def test_an_encoder_decoder_writes_what_transformers_writes(name: str) -> None:
    lm = other_model(name)
    rows = [lm.tokenizer(text)["input_ids"] for text in TEXTS]
    assert all(row[-1] == lm.tokenizer.eos_token_id for row in rows)
    together = lm.generate(list(TEXTS), 7)
    for row, said in zip(rows, together, strict=True):
        whole = lm.model.generate(torch.tensor([row]), max_new_tokens=7, do_sample=False)[0, 1:].tolist()
        end = lm.tokenizer.eos_token_id
        assert said == (whole[: whole.index(end)] if end in whole else whole)


@EVERY
def test_a_batch_of_texts_gives_the_answers_of_each_text_alone(name: str) -> None:
    lm = other_model(name)
    facts = facts_for(lm)
    targets = [fact.target_new for fact in facts]
    together = score_targets(lm, TEXTS, targets)
    alone = [score_targets(lm, [text], [target]).nll[0] for text, target in zip(TEXTS, targets, strict=True)]
    assert torch.allclose(together.nll, torch.stack(alone), rtol=1e-5)


@EVERY
def test_rows_with_edits_of_their_own_score_as_the_edited_weights(name: str) -> None:
    lm = other_model(name)
    places = [Place(0), Place(lm.n_layers - 1)]
    torch.manual_seed(0)
    updates = {place: [DenseUpdate(0.2 * torch.randn(lm.weight(place).shape)) for _ in range(2)] for place in places}
    facts = facts_for(lm)[:2]
    targets = [fact.target_new for fact in facts]
    found = score_targets(lm, TEXTS[:2], targets, edits=RowwiseEdits(updates, torch.tensor([1, 0]))).nll
    before = score_targets(lm, TEXTS[:2], targets).nll
    for index, edit in enumerate((1, 0)):
        for place in places:
            lm.weights.add(("edit", 0), place, updates[place][edit])
        now = score_targets(lm, TEXTS[index : index + 1], targets[index : index + 1]).nll
        lm.weights.remove([("edit", 0)])
        assert found[index] == pytest.approx(now.item(), rel=1e-4)
        assert abs(found[index] - before[index]) > 1e-3


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["32", "bf16"])
def test_changes_are_taken_back_to_the_bit_and_states_are_those_of_the_modules(name: str, dtype: torch.dtype) -> None:
    lm = other_model(name, dtype)
    before = state(lm)
    last = Place(lm.n_layers - 1)
    facts = facts_for(lm)
    batch = lm.batch(lm.encode(TEXTS), [[5, 6]] * len(TEXTS))
    with lm.capture([last], len(TEXTS)) as plain:
        lm.forward(batch)
    update = DenseUpdate(torch.randn(lm.weight(last).shape))
    lm.weights.add(("edit", 0), last, update)
    with lm.capture([last], len(TEXTS), inputs=True) as inputs, lm.capture([last], len(TEXTS)) as outputs:
        lm.forward(batch)
    assert not torch.equal(outputs[last], plain[last])
    expected = F.linear(inputs[last], lm.weight(last), lm.bias(last))
    assert torch.allclose(outputs[last], expected, rtol=1e-4)
    assert facts and lm.weights.edits == ["edit"]
    lm.weights.remove([("edit", 0)])
    assert_unedited(lm, before)


@pytest.mark.parametrize("name", ENCODERS)
def test_a_pass_of_an_encoder_can_start_at_any_block(name: str) -> None:
    lm = other_model(name)
    batch = lm.batch(lm.encode(TEXTS), [])
    whole = lm.forward(batch)
    for layer in range(lm.n_layers):
        block = Place(layer, "block")
        with lm.capture([block], len(TEXTS), inputs=True) as states:
            lm.forward(batch)
        with lm.starting_at(layer, states[block]):
            assert torch.allclose(lm.forward(batch), whole, atol=1e-5)


@EVERY
def test_a_saved_model_is_loaded_as_its_kind_with_the_same_fingerprint(tmp_path: Path, name: str) -> None:
    lm = other_model(name)
    lm.model.save_pretrained(tmp_path / "model")
    lm.tokenizer.save_pretrained(tmp_path / "model")
    loaded = le.LanguageModel.load(tmp_path / "model", device="cpu")
    assert (loaded.kind, loaded.labels, loaded.fingerprint) == (lm.kind, lm.labels, lm.fingerprint)
    assert loaded.complete(list(TEXTS)) == lm.complete(list(TEXTS))


def test_roberta_has_as_many_positions_as_its_table_behind_the_padding_token() -> None:
    lm = other_model("roberta")
    longest = lm.positions
    assert longest == 66 - lm.model.config.pad_token_id - 1
    lm.forward(lm.batch([[5] * longest], []))
    with pytest.raises((IndexError, RuntimeError)):
        lm.forward(lm.batch([[5] * (longest + 1)], []))
    with pytest.raises(le.LightEditError, match=f"has {longest} positions"):
        lm.check_rows([[5] * (longest + 1)])


@EVERY
def test_the_query_token_stands_for_the_prompt(name: str) -> None:
    lm = other_model(name)
    row = lm.encode(["Rome is old"])[0]
    query = lm.answers.query(row)
    assert (query, row[query]) == (
        (0, lm.tokenizer.cls_token_id) if lm.kind == "classifier" else (len(row) - 1, lm.tokenizer.eos_token_id)
    )


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_what_needs_next_tokens_refuses_other_kinds_before_work(tmp_path: Path, name: str) -> None:
    lm = other_model(name)
    facts, before = facts_for(lm), state(lm)
    kind = "a classifier" if name == "bert" else "an encoder-decoder"
    for method in (le.ROME(layers=(1,)), le.MEMIT(layers=(0, 1)), le.KN(layers=(1,))):
        with pytest.raises(le.UnsupportedModelError, match=f"is {kind}, and {type(method).__name__} needs a causal"):
            le.edit(lm, facts, method)
        with pytest.raises(le.UnsupportedModelError, match=kind):
            le.evaluate_single(lm, facts, method)
    studies: dict[str, Callable[[], object]] = {
        "tuning": lambda: le.tune(lm),
        "causal tracing": lambda: le.trace(lm, facts),
        "the attribution to neurons": lambda: le.neurons(lm, facts),
        "the study of hidden states": lambda: le.hidden_states(lm, facts),
        "a localization study": lambda: le.localization_study(lm, facts),
        "held-out text": lambda: le.edit(lm, facts, le.FT(layers=(1,)), callbacks=[le.Health()], settings=QUIET),
        "ROME": lambda: le.sweep(lm, facts, {"r": le.ROME(layers=(1,))}, out=tmp_path / "sweep"),
    }
    for what, study in studies.items():
        with pytest.raises(le.UnsupportedModelError, match=f"is {kind}, and {what} needs a causal language model$"):
            study()
    assert not (tmp_path / "sweep").exists()
    if name == "bert":
        with pytest.raises(le.UnsupportedModelError, match="writing reference texts needs"):
            le.write_references(lm, facts)
    with pytest.raises(le.UnsupportedModelError, match="a run without a method"):
        le.edit(lm, facts)
    with pytest.raises(le.UnsupportedModelError, match=kind):
        le.estimate_covariance(lm, [1])
    with pytest.raises(le.UnsupportedModelError, match=kind):
        le.evaluate(lm, facts, settings=le.EvaluationSettings(text="text.txt"))
    with pytest.raises(le.UnsupportedModelError, match="serves no chat"):
        le.evaluate(lm, facts, chat=True)
    assert_unedited(lm, before)


def test_answers_that_a_model_cannot_give_are_refused_with_what_it_can() -> None:
    lm = other_model("bert")
    with pytest.raises(le.FactError, match=r"'true' is no class; the classes are refutes, supports, not enough info"):
        le.edit(lm, [le.Fact("Rome is old", target_new="true")], le.FT(layers=(1,)))
    with pytest.raises(le.FactError, match="end_turn"):
        le.edit(lm, [le.Fact("Rome is old", target_new="supports", end_turn=True)], le.FT(layers=(1,)))
    with pytest.raises(le.FactError, match=r"separator: ': '.*stands apart"):
        le.edit(lm, [le.Fact("Rome is old", target_new="supports", separator=": ")], le.FT(layers=(1,)))
    with pytest.raises(le.UnsupportedModelError, match="writes no text"):
        le.evaluate(lm, facts_for(lm), settings=le.EvaluationSettings(generate=True))
    with pytest.raises(le.LightEditError, match=r"fact 0: .* has 64 positions"):
        le.edit(lm, [le.Fact("word " * 99 + "end", target_new="supports")], le.FT(layers=(1,)))


def test_models_beyond_these_kinds_are_refused_with_the_reason(tmp_path: Path) -> None:
    config = copy.deepcopy(tiny_other("bert").config)
    config.num_labels = 1
    one = AutoModelForSequenceClassification.from_config(config)
    with pytest.raises(le.UnsupportedModelError, match=r"1 label.*one of several classes"):
        le.LanguageModel(one, tiny_other_tokenizer("bert"))
    config.num_labels = 3
    config.problem_type = "multi_label_classification"
    with pytest.raises(le.UnsupportedModelError, match="multi_label_classification"):
        le.LanguageModel(AutoModelForSequenceClassification.from_config(config), tiny_other_tokenizer("bert"))
    causal = AutoModelForSequenceClassification.from_config(tiny_model("gpt2").config)
    with pytest.raises(le.UnsupportedModelError, match="no linear map gives the logits"):
        le.LanguageModel(causal.eval(), tiny_tokenizer("bytelevel"))
    bart = AutoConfig.for_model("bart", vocab_size=384, d_model=16, encoder_layers=1, decoder_layers=1,
                                encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16,
                                decoder_ffn_dim=16)  # fmt: skip
    with pytest.raises(le.UnsupportedModelError, match=r"whose encoder is not T5's.*expected T5"):
        le.LanguageModel(AutoModelForSeq2SeqLM.from_config(bart).eval(), tiny_other_tokenizer("bert"))
    bart.save_pretrained(tmp_path)
    with pytest.raises(le.UnsupportedModelError, match=r"bart is an encoder-decoder; expected .* or T5"):
        le.LanguageModel.load(tmp_path)


def test_an_mlp_that_does_not_reach_the_end_of_its_block_is_refused() -> None:
    for name in ("bert", "t5"):
        model = tiny_other(name)
        blocks = model.bert.encoder.layer if name == "bert" else model.decoder.block
        after = blocks[1].output.dropout if name == "bert" else blocks[1].layer[2].dropout
        after.register_forward_hook(lambda _, __, output: output.tanh())
        with pytest.raises(le.UnsupportedModelError, match="does not reach the block's output"):
            le.LanguageModel(model, tiny_other_tokenizer("t5" if name == "t5" else "bert"))
