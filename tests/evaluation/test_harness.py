"""Tasks of the lm-evaluation-harness, on one of our own with local data."""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from transformers import GenerationConfig

import lightedit as le
from lightedit.evaluation.harness import _plain_generation, _scores, harness_scores
from lightedit.evaluation.settings import EvaluationSettings
from lightedit.lm import Place
from lightedit.lm.changes import LowRankUpdate
from lightedit.lm.sampling import before_end
from tests.models import EOS, tiny_model, tiny_tokenizer

QUIET = EvaluationSettings(progress_bar=False)

QUESTIONS = [
    ("The capital of France is", ["Paris", "Rome", "Tokyo"], 0),
    ("The river rises in the", ["hills", "north", "music"], 1),
    ("She was born in", ["London", "Berlin"], 1),
    ("He is a native speaker of", ["Spanish", "English"], 0),
    ("The king was never", ["written", "stored", "played"], 2),
    ("They played the", ["piano", "steel"], 0),
]


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The file of a task with these questions."""
    pytest.importorskip("lm_eval", reason="the harness is not installed: pip install 'lightedit[harness]'")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    data = tmp_path / "questions.jsonl"
    rows = [{"question": text, "choices": choices, "answer": right} for text, choices, right in QUESTIONS]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    description = {
        "task": "questions", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
        "dataset_kwargs": {"data_files": {"test": str(data)}}, "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    file = tmp_path / "questions.yaml"
    file.write_text(yaml.safe_dump(description))
    return str(file)


def model() -> le.LanguageModel:
    return le.LanguageModel(tiny_model("llama"), tiny_tokenizer("bytelevel"))


@torch.no_grad()
def share_right(lm: le.LanguageModel) -> float:
    """In percent: how often the right choice is the most probable one, from a full forward pass for each."""
    right = 0
    for text, choices, answer in QUESTIONS:
        scores = []
        for choice in choices:
            prompt, whole = lm.encode([text])[0], lm.encode([f"{text} {choice}"])[0]
            log_p = lm.model(torch.tensor([whole])).logits[0].log_softmax(-1)
            places = range(len(prompt), len(whole))
            scores.append(sum(float(log_p[place - 1, whole[place]]) for place in places))
        right += scores.index(max(scores)) == answer
    return 100 * right / len(QUESTIONS)


def test_scores_are_those_of_a_plain_reading_before_and_after_an_edit(task: str) -> None:
    lm = model()
    pad = lm.tokenizer.pad_token
    seen = set()
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        left, right = torch.randn(32, 1, generator=generator), torch.randn(80, 1, generator=generator)
        lm.weights.add("it", Place(2), LowRankUpdate(left, right))
        state = torch.random.get_rng_state()
        scores, intervals = harness_scores(lm, [task])
        assert torch.equal(torch.random.get_rng_state(), state)
        assert scores == pytest.approx({"questions acc": share_right(lm)})
        low, high = intervals["questions acc"]
        assert (low + high) / 2 == pytest.approx(scores["questions acc"])
        seen.add(scores["questions acc"])
        lm.weights.remove(["it"])
    assert len(seen) > 1 and lm.tokenizer.pad_token == pad


def test_evaluate_has_a_row_for_each_task(task: str) -> None:
    lm, facts = model(), [le.Fact("The capital of {}", "France", "Rome", target_true="Paris")]
    found = le.evaluate(lm, facts, settings=EvaluationSettings(progress_bar=False, harness=[task], harness_limit=2))
    assert "questions acc" in found.table() and found.scores["questions acc"] in (0, 50, 100)
    assert found.scores.keys() > le.evaluate(lm, facts, settings=QUIET).scores.keys()


RULES = [
    {"no_repeat_ngram_size": 1},
    {"num_beams": 3},
    {"repetition_penalty": 1.8},
    {"forced_eos_token_id": 5},
    {"suppress_tokens": list(range(3, 200))},
]


@pytest.mark.parametrize("rules", RULES, ids=lambda rules: next(iter(rules)))
def test_a_checkpoints_generation_config_changes_no_text_of_a_task(rules) -> None:
    lm = model()
    (row,) = lm.encode(["The"])
    expected = lm.generate([row], 12)[0]

    def written() -> list[int]:
        """As the harness lets transformers write."""
        found = lm.model.generate(torch.tensor([row]), max_length=len(row) + 12, do_sample=False, pad_token_id=0)
        return before_end(iter(found[:, len(row) :].T), 12, [EOS])[0]

    lm.model.generation_config = kept = GenerationConfig(eos_token_id=EOS, **rules)
    assert written() != expected
    with _plain_generation(lm):
        assert written() == expected
    assert lm.model.generation_config is kept


def test_wrong_tasks_are_refused_before_work_starts(task: str) -> None:
    facts = [le.Fact("The capital of {}", "France", "Rome")]
    with pytest.raises(ValueError, match="no task 'piqua'"):
        le.evaluate(model(), facts, settings=EvaluationSettings(harness=["piqua"]))
    with pytest.raises(FileNotFoundError, match=r"no task at nowhere\.yaml"):
        le.evaluate(model(), facts, settings=EvaluationSettings(harness=["nowhere.yaml"]))
    with pytest.raises(ValueError, match="limit"):
        le.evaluate(model(), facts, settings=EvaluationSettings(harness=[task], harness_limit=0))


def test_a_task_that_is_no_plain_yaml_is_refused_before_work_starts(task: str, tmp_path: Path) -> None:
    tagged = tmp_path / "tagged.yaml"
    tagged.write_text("task: x\nprocess_docs: !function utils.process_docs\n")
    with pytest.raises(ValueError, match=r"tagged\.yaml is no task in plain YAML"):
        harness_scores(model(), [str(tagged)])


def test_numbers_that_are_none_are_left_out_and_accuracies_are_in_percent() -> None:
    found = {"mine": {"prompt_level_strict_acc,none": 0.5, "ter,none": 0.25, "perplexity,none": math.inf,
                      "prompt_level_strict_acc_stderr,none": 0.125, "alias": "mine"}}  # fmt: skip
    with pytest.warns(UserWarning, match="gives inf as perplexity"):
        scores, intervals = _scores(found)
    assert scores == {"mine prompt_level_strict_acc": 50.0, "mine ter": 0.25}
    assert intervals["mine prompt_level_strict_acc"] == pytest.approx((50 - 24.5, 50 + 24.5))


def test_without_the_harness_an_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightedit.evaluation.harness.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="lightedit\\[harness\\]"):
        le.evaluate(
            model(), [le.Fact("The capital of {}", "France", "Rome")], settings=EvaluationSettings(harness=["piqa"])
        )
