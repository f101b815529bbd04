"""Reference texts and the score RS against them."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from lightedit.data.facts import FactError, read_facts
from lightedit.evaluation import generation
from lightedit.evaluation.evaluate import evaluate
from lightedit.evaluation.references import References, read_references, write_references
from lightedit.evaluation.settings import EvaluationSettings
from lightedit.lm import LanguageModel, Place
from lightedit.lm.changes import LowRankUpdate
from tests.evaluation.facts import FRANCE, ITALY
from tests.models import tiny_model, tiny_tokenizer
from tests.plain import plain_frequencies, plain_reference_score

WRITING = EvaluationSettings(generate=True, progress_bar=False)
PASSAGES = [
    {"relation_id": "P36", "target_id": "Q220", "samples": [{"text": "Rome is old.", "name": "Rome"}]},
    {"relation_id": "P36", "target_id": "Q64", "samples": [{"text": "Berlin has the Spree."}, {"text": "It is big."}]},
    {"relation_id": "P36", "target_id": "Q220", "samples": [{"text": "The Tiber runs through Rome"}]},
    {"relation_id": "P17", "target_id": "Q220", "samples": [{"text": "another relation"}]},
]
ROME = replace(FRANCE, relation="P36", target_id="Q220", attribute_prompts=("The king is in", "She was born in"))
BERLIN = replace(ITALY, relation="P36", target_id="Q64", attribute_prompts=("The king is in",))
DOCUMENTS = [sample["text"] for entry in PASSAGES for sample in entry["samples"]]


@pytest.fixture
def lm():
    return LanguageModel(tiny_model("gptj"), tiny_tokenizer("bytelevel"))


@pytest.fixture
def passages(tmp_path):
    path = tmp_path / "attribute_snippets.json"
    path.write_text(json.dumps(PASSAGES))
    return path


def test_passages_are_found_by_relation_and_target_and_all_of_them_are_counted(passages):
    found = read_references(passages, [ROME, BERLIN, FRANCE])
    assert found.texts == {ROME: "Rome is old. The Tiber runs through Rome", BERLIN: "Berlin has the Spree. It is big."}
    assert found.frequencies == pytest.approx(plain_frequencies(DOCUMENTS))
    assert not found.own


def test_published_frequencies_beside_the_file_are_taken(passages):
    np.save(passages.parent / "idf.npy", np.array([1.5, 2.5]))
    with pytest.raises(ValueError, match=r"tfidf_vocab\.json is missing"):
        read_references(passages, [ROME])
    (passages.parent / "tfidf_vocab.json").write_text('{"rome": 1, "old": 0}')
    assert read_references(passages, [ROME]).frequencies == {"rome": 2.5, "old": 1.5}
    (passages.parent / "tfidf_vocab.json").write_text('{"rome": 2}')
    with pytest.raises(ValueError, match="one number a term"):
        read_references(passages, [ROME])


@pytest.mark.parametrize("content", ["", "{}", "[3]", '[{"relation_id": "P1"}]', '{"a": 1}'])
def test_what_holds_no_passages_is_named(passages, content):
    passages.write_text(content)
    with pytest.raises(ValueError, match=r"attribute_snippets\.json"):
        read_references(passages, [ROME])


def test_facts_without_passages_are_refused(passages):
    with pytest.raises(FactError, match="for none of the 2 facts"):
        read_references(passages, [FRANCE, ITALY])
    with pytest.raises(FileNotFoundError):
        read_references(passages.with_name("other.json"), [ROME])


def test_references_are_what_the_unedited_model_writes(lm):
    expected = generation.generate(lm, ["The king is in", "She was born in"])
    left, right = (torch.randn(n, 2) for n in lm.weight(Place(2)).shape)
    lm.weights.add("random", Place(2), LowRankUpdate(left, right))
    edited = lm.weight(Place(2)).clone()
    found = write_references(lm, [ROME, BERLIN, FRANCE], progress_bar=False)
    assert found.texts == {ROME: " ".join(expected), BERLIN: expected[0]}
    assert found.frequencies == pytest.approx(plain_frequencies(expected))
    assert found.own and torch.equal(lm.weight(Place(2)), edited)
    assert generation.generate(lm, ["The king is in"]) != expected[:1]
    with pytest.raises(FactError, match="attribute_prompts"):
        write_references(lm, [FRANCE], progress_bar=False)


@pytest.mark.parametrize(("own", "name"), [(False, "RS"), (True, "RS_own")])
def test_score_on_real_records_is_the_published_definition_and_tells_its_references(lm, data_dir, own, name):
    facts = read_facts(data_dir / "counterfact_1000.json", limit=4)
    texts = {fact: " ".join(fact.attribute_prompts) for fact in facts[:3]}
    frequencies = plain_frequencies([prompt for fact in facts for prompt in fact.attribute_prompts])
    plain = evaluate(lm, facts, settings=WRITING)
    found = evaluate(
        lm,
        facts,
        settings=WRITING,
        references=References(texts, frequencies, own),
    )
    assert set(found.scores) - set(plain.scores) == {name}
    assert {name: found.scores[name] for name in plain.scores} == plain.scores
    expected = [
        100 * plain_reference_score(" ".join(record["generations"]), texts[fact], frequencies)
        for fact, record in zip(facts[:3], found.records[:3], strict=True)
    ]
    assert [record[name] for record in found.records[:3]] == pytest.approx(expected)
    assert name not in found.records[3]
    assert found.scores[name] == pytest.approx(sum(expected) / 3) and 0 < found.scores[name] < 100


def test_real_records_find_their_passages(data_dir, tmp_path):
    facts = read_facts(data_dir / "counterfact_1000.json", limit=50)
    entries = [
        {"relation_id": fact.relation, "target_id": fact.target_id, "samples": [{"text": fact.target_new}]}
        for fact in facts
    ]
    (tmp_path / "passages.json").write_text(json.dumps(entries))
    found = read_references(tmp_path / "passages.json", facts).texts
    assert list(found) == facts and all(set(text.split()) == set(f.target_new.split()) for f, text in found.items())


def test_references_without_generation_are_refused(lm):
    with pytest.raises(ValueError, match="generate=True"):
        evaluate(lm, [ROME], references=References({ROME: "Rome"}, {"rome": 1.0}))
