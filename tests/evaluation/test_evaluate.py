import importlib
import json
import math
import statistics
from dataclasses import replace

import pytest
import torch

from lightedit.data.facts import Fact, FactError, read_facts
from lightedit.evaluation import generation
from lightedit.evaluation.evaluate import Evaluation, evaluate
from lightedit.evaluation.scoring import score_facts
from lightedit.evaluation.settings import EvaluationSettings
from lightedit.lm import LanguageModel, Place
from lightedit.lm.changes import LowRankUpdate
from lightedit.metrics.functional import generation_entropy
from lightedit.runs.folder import ResumeError, kept_chunks
from tests.evaluation.facts import FRANCE, ITALY, QUESTION
from tests.models import tiny_model, tiny_tokenizer

QUIET, WRITING = EvaluationSettings(progress_bar=False), EvaluationSettings(generate=True, progress_bar=False)

COUNTERFACT_KEYS = {"ES", "PS", "NS", "EM", "PM", "NM", "S"}
ACCURACY_KEYS = {"efficacy_accuracy", "paraphrase_accuracy", "neighborhood_accuracy"}

BARE = Fact("{} was born in", "The king", "Spain", target_true="London")


@pytest.fixture(scope="module")
def lm():
    return LanguageModel(tiny_model("gptj"), tiny_tokenizer("bytelevel"))


def score_alone(lm, prompt, target):
    """Mean NLL of the target and which of its tokens are the argmax, from one forward pass over one row."""
    encoding = lm.tokenizer(f"{prompt} {target}", return_offsets_mapping=True)
    ids = torch.tensor(encoding["input_ids"])
    first = next(i for i, (_, end) in enumerate(encoding["offset_mapping"]) if end > len(prompt))
    with torch.no_grad():
        log_p = lm.model(ids[None]).logits[0].log_softmax(-1)[first - 1 : -1]
    wanted = ids[first:]
    return -log_p[torch.arange(len(wanted)), wanted].mean().item(), (log_p.argmax(-1) == wanted).tolist()


def plain_counterfact(lm, facts):
    """The published definitions in plain Python, fact by fact."""
    columns = {key: [] for key in COUNTERFACT_KEYS | ACCURACY_KEYS}
    for fact in facts:
        kinds = {
            "efficacy": ([fact.prompt.replace("{}", fact.subject)], fact.target_new, fact.target_true),
            "paraphrase": (fact.paraphrase_prompts, fact.target_new, fact.target_true),
            "neighborhood": (fact.neighborhood_prompts, fact.target_true, fact.target_new),
        }
        for kind, (prompts, wanted, other) in kinds.items():
            if not prompts:
                continue
            won, margins, right = [], [], []
            for prompt in prompts:
                nll, hits = score_alone(lm, prompt, wanted)
                nll_other, _ = score_alone(lm, prompt, other)
                won.append(nll < nll_other)
                margins.append(math.exp(-nll) - math.exp(-nll_other))
                right.append(all(hits))
            columns[kind[0].upper() + "S"].append(statistics.fmean(won))
            columns[kind[0].upper() + "M"].append(statistics.fmean(margins))
            columns[kind + "_accuracy"].append(statistics.fmean(right))
    scores = {key: 100 * statistics.fmean(column) for key, column in columns.items() if column}
    scores["S"] = statistics.harmonic_mean([scores["ES"], scores["PS"], scores["NS"]])
    return scores


def test_scores_are_the_published_definitions(lm):
    facts = [FRANCE, ITALY, BARE]
    found = evaluate(lm, facts, settings=QUIET)
    assert found.scores == pytest.approx(plain_counterfact(lm, facts), abs=1e-3)


def test_scores_of_real_counterfact_records_are_the_published_definitions(lm, data_dir):
    facts = read_facts(data_dir / "counterfact_1000.json", limit=20)
    expected = plain_counterfact(lm, facts)
    assert 0 < expected["ES"] < 100
    assert 0 < expected["NS"] < 100
    assert evaluate(lm, facts, settings=QUIET).scores == pytest.approx(expected, abs=1e-3)


def test_flat_counterfact_records_give_neighborhood_scores(lm, data_dir):
    facts = read_facts(data_dir / "counterfact_edits_flat.json", limit=5)
    found = evaluate(lm, facts, settings=QUIET)
    assert set(found.scores) == {"ES", "NS", "EM", "NM", "efficacy_accuracy", "neighborhood_accuracy"}
    for fact, record in zip(facts, found.records, strict=True):
        true = score_alone(lm, fact.neighborhood_prompts[0], fact.target_true)[0]
        new = score_alone(lm, fact.neighborhood_prompts[0], fact.target_new)[0]
        assert record["NS"] == 100 * (true < new)


def test_real_zsre_records_give_token_accuracies_alone(lm, data_dir):
    facts = read_facts(data_dir / "zsre_700.json", limit=20)
    found = evaluate(lm, facts, settings=QUIET)

    def mean(rows):
        return 100 * statistics.fmean(statistics.fmean(score_alone(lm, *row)[1]) for row in rows)

    expected = {
        "efficacy_accuracy": mean([(f.text, f.target_new) for f in facts]),
        "paraphrase_accuracy": mean([(f.paraphrase_prompts[0], f.target_new) for f in facts]),
        "neighborhood_accuracy": mean([(f.neighborhood_prompts[0], f.neighborhood_target) for f in facts]),
    }
    assert found.scores == pytest.approx(expected)


def test_without_a_true_target_accuracy_counts_tokens_and_with_one_whole_answers():
    lm = LanguageModel(tiny_model("gptj"), tiny_tokenizer("bytelevel"))
    tokens = lm.encode([" Rome"])[0]
    lm.model.lm_head.bias[tokens[-1]] += 1000  # now it says nothing else
    untold = Fact(FRANCE.prompt, FRANCE.subject, "Rome")
    assert evaluate(lm, [FRANCE], settings=QUIET).scores["efficacy_accuracy"] == 0
    assert evaluate(lm, [untold], settings=QUIET).scores == pytest.approx({"efficacy_accuracy": 100 / len(tokens)})


def test_neighborhood_with_an_answer_of_its_own_has_no_competitor(lm):
    fact = Fact("{} is in", "Rome", "Spain", "Italy", (), ("The king is in",), neighborhood_target="London")
    found = evaluate(lm, [fact, fact], settings=QUIET)
    assert set(found.scores) == {"ES", "EM", "efficacy_accuracy", "neighborhood_accuracy"}
    nll, _ = score_alone(lm, "The king is in", "London")
    assert found.records[0]["neighborhood"]["nll_wanted"] == pytest.approx([nll], abs=1e-4)
    assert "nll_other" not in found.records[0]["neighborhood"]


def test_each_neighborhood_prompt_is_scored_on_its_own_answer(lm):
    prompts, answers = ("The king is in", "She lives in"), ("London", "Paris")
    fact = Fact("{} is in", "Rome", "Spain", neighborhood_prompts=prompts, neighborhood_answers=answers)
    found = evaluate(lm, [fact], settings=QUIET).records[0]["neighborhood"]
    alone = [score_alone(lm, prompt, answer)[0] for prompt, answer in zip(prompts, answers, strict=True)]
    assert found["nll_wanted"] == pytest.approx(alone, abs=1e-4)


def test_neighborhood_without_a_right_answer_is_not_scored(lm):
    fact = Fact("{} is in", "Rome", "Spain", neighborhood_prompts=("The king is in",))
    assert set(evaluate(lm, [fact], settings=QUIET).scores) == {"efficacy_accuracy"}


def test_edit_score_needs_paraphrases_and_neighborhood(lm):
    assert set(evaluate(lm, [BARE], settings=QUIET).scores) == {"ES", "EM", "efficacy_accuracy"}


def test_mixed_facts_count_where_they_can(lm):
    alone = evaluate(lm, [FRANCE, ITALY], settings=QUIET)
    mixed = evaluate(lm, [FRANCE, QUESTION, ITALY], settings=QUIET)
    for key in COUNTERFACT_KEYS:
        assert mixed.scores[key] == pytest.approx(alone.scores[key], abs=1e-3)
    assert len(mixed.records) == 3
    assert "ES" not in mixed.records[1]


def test_records_hold_each_fact_in_order(lm):
    found = evaluate(lm, [ITALY, FRANCE], settings=QUIET)
    record = found.records[1]
    assert [record[key] for key in ("id", "subject", "prompt", "target_new", "target_true")] == [
        "7",
        "France",
        "The capital of {} is",
        "Rome",
        "Paris",
    ]
    new = [score_alone(lm, prompt, "Rome")[0] for prompt in FRANCE.neighborhood_prompts]
    true = [score_alone(lm, prompt, "Paris")[0] for prompt in FRANCE.neighborhood_prompts]
    assert record["neighborhood"]["nll_wanted"] == pytest.approx(true, abs=1e-4)
    assert record["neighborhood"]["nll_other"] == pytest.approx(new, abs=1e-4)
    assert record["NS"] == pytest.approx(100 * statistics.fmean(t < n for t, n in zip(true, new, strict=True)))
    for key in ("ES", "PS", "NS", "EM"):
        assert found.scores[key] == pytest.approx(statistics.fmean(r[key] for r in found.records))


def test_order_duplicates_and_batch_size_do_not_matter(lm):
    facts = [FRANCE, ITALY, BARE]
    expected = evaluate(lm, facts, settings=QUIET)
    shuffled = evaluate(lm, facts[::-1], settings=EvaluationSettings(batch_size=2, progress_bar=False))
    doubled = evaluate(lm, facts * 2, settings=QUIET)
    assert shuffled.scores == pytest.approx(expected.scores, abs=1e-3)
    assert doubled.scores == pytest.approx(expected.scores)
    assert doubled.records[3:] == doubled.records[:3]


def test_a_checkpoint_of_another_evaluation_is_refused(lm, tmp_path, monkeypatch):
    folder = tmp_path / "scores.run"
    found = evaluate(lm, [FRANCE, ITALY], settings=QUIET, checkpoint=folder)
    assert found == evaluate(lm, [FRANCE, ITALY], settings=QUIET)
    assert found == evaluate(lm, [FRANCE, ITALY], settings=QUIET, checkpoint=folder)
    (kept,) = kept_chunks(folder)
    for changes, name in (({"facts": [FRANCE, BARE]}, "facts"), ({"settings": WRITING}, "generate")):
        with pytest.raises(ResumeError, match=f"differs in {name}"):
            evaluate(lm, **{"facts": [FRANCE, ITALY], "settings": QUIET, "checkpoint": folder} | changes)
    update = LowRankUpdate(torch.ones(lm.d_model, 1), torch.ones(lm.weight(Place(1)).shape[1], 1))
    lm.weights.add("other", Place(1), update)
    try:
        with pytest.raises(ResumeError, match="differs in weights"):
            evaluate(lm, [FRANCE, ITALY], settings=QUIET, checkpoint=folder)
    finally:
        lm.weights.remove(["other"])

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(importlib.import_module("lightedit.evaluation.scoring"), "score_facts", interrupted)
        evaluate(lm, [FRANCE], settings=QUIET, checkpoint=tmp_path / "other.run" / "before")
    assert list(tmp_path.iterdir()) == [folder]  # nothing is left of what never began
    kept.write_text(kept.read_text()[:-5])
    with pytest.raises(ResumeError, match=f"{kept.name} is truncated"):
        evaluate(lm, [FRANCE, ITALY], settings=QUIET, checkpoint=folder)


def test_intervals_hold_their_scores_and_one_fact_has_none(lm):
    found = evaluate(lm, [FRANCE, ITALY, BARE], settings=QUIET)
    assert found.intervals.keys() == found.scores.keys()
    for key, (low, high) in found.intervals.items():
        assert low - 1e-9 <= found.scores[key] <= high + 1e-9
    values = [record["EM"] for record in found.records]
    half = 1.96 * statistics.stdev(values) / 3**0.5
    assert found.intervals["EM"] == pytest.approx((statistics.fmean(values) - half, statistics.fmean(values) + half))
    alone = evaluate(lm, [FRANCE], settings=QUIET)
    assert alone.intervals.keys() == alone.scores.keys()
    assert all(math.isnan(end) for ends in alone.intervals.values() for end in ends)


def test_model_is_scored_as_it_is_now():
    lm = LanguageModel(tiny_model("gptj"), tiny_tokenizer("bytelevel"))
    before = evaluate(lm, [FRANCE], settings=QUIET)
    lm.weight(Place(2)).mul_(3)
    assert evaluate(lm, [FRANCE], settings=QUIET).scores["EM"] != pytest.approx(before.scores["EM"])


def test_no_facts_are_refused(lm):
    with pytest.raises(FactError, match="empty"):
        evaluate(lm, [])


def test_progress_goes_to_standard_error_only_when_asked(lm, capsys, monkeypatch):
    monkeypatch.setattr("lightedit.progress._LINE_EVERY", 0.0)
    evaluate(lm, [FRANCE], settings=QUIET)
    assert capsys.readouterr() == ("", "")
    evaluate(lm, [FRANCE])
    out, err = capsys.readouterr()
    assert out == ""
    assert "scoring" in err


@pytest.mark.parametrize("facts", [[FRANCE, ITALY], [FRANCE], [QUESTION, QUESTION]], ids=["two", "one", "zsre"])
def test_saved_evaluation_reads_back(lm, tmp_path, facts):
    found = evaluate(lm, facts, settings=QUIET)
    path = tmp_path / "evaluation.json"
    path.write_text("older")
    found.save(path)
    again = Evaluation.load(path)
    assert again.scores == found.scores
    assert again.records == found.records
    assert again.intervals.keys() == found.intervals.keys()
    for key, ends in found.intervals.items():
        assert again.intervals[key] == pytest.approx(ends, nan_ok=True, abs=0)
        assert type(again.intervals[key]) is tuple
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert [file.name for file in tmp_path.iterdir()] == ["evaluation.json"]


def test_failed_save_leaves_the_older_file(lm, tmp_path):
    path = tmp_path / "evaluation.json"
    path.write_text("older")
    with pytest.raises(TypeError):
        Evaluation({"ES": 1.0}, {"ES": (0.0, 2.0)}, [{"id": object()}]).save(path)
    assert path.read_text() == "older"
    assert [file.name for file in tmp_path.iterdir()] == ["evaluation.json"]


@pytest.mark.parametrize("content", ["", '{"scores": {}', '{"scores": {}}', "[1]", '{"intervals": [1]}'])
def test_what_is_no_saved_evaluation_is_named(tmp_path, content):
    path = tmp_path / "evaluation.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"evaluation\.json is not a saved evaluation"):
        Evaluation.load(path)


def test_missing_file_is_said_to_be_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        Evaluation.load(tmp_path / "none.json")


def test_table_shows_every_score_and_aligns():
    after = Evaluation({"ES": 100.0, "S": 66.666}, {"ES": (100.0, 100.0), "S": (60.0, 72.5)}, [{}] * 12)
    before = Evaluation({"ES": 7.5}, {"ES": (math.nan, math.nan)}, [{}] * 12)
    lines = after.table(before).splitlines()
    assert [line.split() for line in lines] == [
        ["%,", "12", "facts", "before", "after"],
        ["ES", "7.5", "100.0", "±", "0.0"],
        ["S", "-", "66.7", "±", "6.2"],
    ]
    assert len({len(line) for line in lines}) == 1
    assert "before" not in after.table()


# Generation

TOLD = replace(FRANCE, generation_prompts=("France is", "The towns of France are", "France is"))


def test_generation_adds_entropy_and_success_and_leaves_the_rest(lm):
    facts = [TOLD, ITALY, BARE]
    plain = evaluate(lm, facts, settings=QUIET)
    found = evaluate(lm, facts, settings=WRITING)
    assert set(found.scores) - set(plain.scores) == {"GE", "generation_success"}
    assert {name: found.scores[name] for name in plain.scores} == plain.scores
    # a fact's prompts; its text and paraphrases, where it has none
    prompts = [TOLD.generation_prompts, (ITALY.text, *ITALY.paraphrase_prompts), (BARE.text,)]
    entropies = []
    for fact, asked, record in zip(facts, prompts, found.records, strict=True):
        assert record["generations"] == generation.generate(lm, asked)
        assert record["generations"][0].startswith(asked[0]) and len(record["generations"]) == len(asked)
        entropies.append(100 * generation_entropy(record["generations"]).mean().item())
        assert record["GE"] == pytest.approx(entropies[-1])
        assert (
            fact.text + record["continuation"]
            == generation.generate(lm, [fact.text], max_new_tokens=32, greedy=True)[0]
        )
    assert found.scores["GE"] == pytest.approx(statistics.fmean(entropies))
    half = 1.96 * statistics.stdev(entropies) / 3**0.5
    assert found.intervals["GE"] == pytest.approx((found.scores["GE"] - half, found.scores["GE"] + half))
    assert not {"GE", "generations", "continuation"} & set(plain.records[0])


def test_success_is_the_share_of_facts_that_the_model_states_by_itself(lm):
    said = generation.generate(lm, [FRANCE.text], max_new_tokens=32, greedy=True)[0].removeprefix(FRANCE.text)
    stated = replace(FRANCE, target_new=said.strip()[:3].strip())
    found = evaluate(lm, [stated, ITALY, BARE], settings=WRITING)
    assert [record["generation_success"] for record in found.records] == [100, 0, 0]
    assert found.scores["generation_success"] == pytest.approx(100 / 3)


def test_the_model_writes_as_it_is_now():
    lm = LanguageModel(tiny_model("gptj"), tiny_tokenizer("bytelevel"))
    before = evaluate(lm, [TOLD], settings=WRITING)
    lm.weight(Place(2)).mul_(3)
    after = evaluate(lm, [TOLD], settings=WRITING)
    assert after.records[0]["generations"] != before.records[0]["generations"]


def test_generations_are_saved_and_read_back(lm, tmp_path):
    found = evaluate(lm, [TOLD, ITALY], settings=WRITING)
    found.save(tmp_path / "evaluation.json")
    again = Evaluation.load(tmp_path / "evaluation.json")
    assert again == found


def test_table_tells_the_unit_of_generation_entropy():
    found = Evaluation({"ES": 50.0, "GE": 612.34}, {"ES": (40.0, 60.0), "GE": (600.0, 624.68)}, [{}] * 3)
    lines = found.table().splitlines()
    assert str(found) == found.table()
    assert lines[-1].split() == ["GE", "(bits", "×", "100)", "612.3", "±", "12.3"]
    assert len({len(line) for line in lines[1:]}) == 1


def test_progress_covers_scoring_and_writing(lm):
    seen = []
    asked = EvaluationSettings(generate=True)
    score_facts(lm, [TOLD, ITALY, BARE], settings=asked, report=lambda done, total: seen.append((done, total)))
    assert len({total for _, total in seen}) == 1
    shares = [done / total for done, total in seen]
    assert shares == sorted(shares) and shares[-1] == pytest.approx(1)
    assert sum(share < 0.5 for share in shares) >= 1 and len(shares) >= 3
