"""What evaluate measures beside the facts' own scores: earlier predictions, held-out facts and text, portability."""

import math
import random
import statistics
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from lightedit.data.facts import Fact, read_facts
from lightedit.editing.health import Health
from lightedit.evaluation.evaluate import evaluate
from lightedit.evaluation.held_out_text import POSITIONS, HeldOutText
from lightedit.evaluation.result import Evaluation
from lightedit.evaluation.settings import EvaluationSettings
from lightedit.lm import LanguageModel, Place
from lightedit.lm.changes import LowRankUpdate
from tests.evaluation.facts import FRANCE, ITALY, QUESTION
from tests.models import tiny_model, tiny_tokenizer
from tests.plain import WINDOWS, distributions, perplexity
from tests.runs import run

QUIET = EvaluationSettings(progress_bar=False)

KNOWLEDGE_EDITOR = {"success_rate", "retain_accuracy", "equivalence_accuracy"}


@pytest.fixture
def lm():
    return LanguageModel(tiny_model("gptj"), tiny_tokenizer("bytelevel"))


def disturb(lm, size=0.1):
    """Edit a model at random, enough to change some of its predictions."""
    generator = torch.Generator().manual_seed(3)
    rows, columns = lm.weight(Place(2)).shape
    left, right = (size * torch.randn(n, 4, generator=generator) for n in (rows, columns))
    lm.weights.add("random", Place(2), LowRankUpdate(left, right))


def say(lm, prompt, answer):
    """The tokens of an answer, and those that the stock model says in their place, from one forward pass."""
    encoding = lm.tokenizer(f"{prompt} {answer}", return_offsets_mapping=True)
    first = next(i for i, (_, end) in enumerate(encoding["offset_mapping"]) if end > len(prompt))
    with torch.no_grad():
        said = lm.model(torch.tensor([encoding["input_ids"]])).logits[0].argmax(-1)
    return encoding["input_ids"][first:], said[first - 1 : -1].tolist()


def right(lm, prompt, answer):
    """Which tokens of the answer the model says."""
    return [wanted == said for wanted, said in zip(*say(lm, prompt, answer), strict=True)]


def mean(rows):
    return 100 * statistics.fmean(map(statistics.fmean, rows))


def neighborhood_answers(lm, facts):
    """What the model says on each neighbourhood prompt, fact by fact."""
    return [
        [say(lm, prompt, fact.neighborhood_target or fact.target_true)[1] for prompt in fact.neighborhood_prompts]
        for fact in facts
    ]


def teach(lm, facts):
    """Make the model say the targets of some facts, so that scores are neither all 0 nor all 100."""
    for fact in facts:
        lm.model.lm_head.bias.data[lm.encode([f" {fact.target_new}"])[0]] += 3


@pytest.mark.parametrize("name", ["counterfact_1000.json", "zsre_700.json"])
def test_knowledge_editors_metrics_on_real_records_are_their_definitions(lm, data_dir, name):
    facts = read_facts(data_dir / name, limit=20)
    teach(lm, facts[:4])
    before = evaluate(lm, facts, settings=QUIET)
    earlier = neighborhood_answers(lm, facts)
    disturb(lm, 0.3)
    plain = evaluate(lm, facts, settings=QUIET)
    found = evaluate(lm, facts, settings=QUIET, before=before)
    assert not KNOWLEDGE_EDITOR & set(before.scores) and set(found.scores) - set(plain.scores) == KNOWLEDGE_EDITOR
    assert {name: found.scores[name] for name in plain.scores} == plain.scores

    now = neighborhood_answers(lm, facts)
    same = [[a == b for a, b in zip(*pair, strict=True)] for pair in zip(now, earlier, strict=True)]
    assert 0 < mean(same) < 100
    assert found.scores["retain_accuracy"] == pytest.approx(mean(same))
    assert found.scores["success_rate"] == pytest.approx(
        mean([[all(right(lm, fact.text, fact.target_new))] for fact in facts])
    )
    paraphrases = [[all(right(lm, p, fact.target_new)) for p in fact.paraphrase_prompts] for fact in facts]
    assert found.scores["equivalence_accuracy"] == pytest.approx(mean(paraphrases))
    for record, kept in zip(found.records, same, strict=True):
        assert record["retain_accuracy"] == pytest.approx(100 * statistics.fmean(kept))
    low, high = found.intervals["retain_accuracy"]
    half = 196 * statistics.stdev(map(statistics.fmean, same)) / len(facts) ** 0.5
    assert (low, high) == pytest.approx((mean(same) - half, mean(same) + half))


def test_an_unchanged_model_retains_everything_also_beside_a_saved_evaluation(lm, tmp_path):
    evaluate(lm, [FRANCE, QUESTION], settings=QUIET).save(tmp_path / "before.json")
    before = Evaluation.load(tmp_path / "before.json")
    found = evaluate(lm, [FRANCE, QUESTION], settings=QUIET, before=before)
    assert found.scores["retain_accuracy"] == 100
    # a model that is always wrong retains, too
    assert found.scores["neighborhood_accuracy"] < 100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda records: records[:1], "it evaluated 1 fact, and here are 2"),
        (lambda records: records[::-1], "the subject of its record 0 is 'Italy', that of the fact is 'France'"),
        (lambda records: [records[0] | {"target_new": "Bonn"}, records[1]], "the target_new of its record 0 is 'Bonn'"),
        (
            lambda records: [records[0] | {"target_true": "Bonn"}, records[1]],
            "the target_true of its record 0 is 'Bonn'",
        ),
        (lambda records: [records[0], records[1] | {"neighborhood": {"accuracy": [1.0]}}], "record 1 lacks what was"),
        (lambda records: [records[0], {**records[1], "neighborhood": None}], "record 1 lacks what was"),
        (
            lambda records: [
                records[0],
                {**records[1], "neighborhood": {**records[1]["neighborhood"], "prompts": ["Who?"]}},
            ],
            "record 1 lacks what was",
        ),
    ],
)
def test_an_evaluation_of_other_facts_is_refused_before_any_pass(lm, monkeypatch, change, message):
    before = evaluate(lm, [FRANCE, ITALY], settings=QUIET)
    monkeypatch.setattr(lm, "forward", lambda *_, **__: pytest.fail("a forward pass was run"))
    with pytest.raises(ValueError, match=message):
        evaluate(lm, [FRANCE, ITALY], before=replace(before, records=change(before.records)))


@pytest.mark.parametrize("name", ["counterfact_1000.json", "zsre_700.json"])
def test_trr_and_err_on_real_records_are_their_definitions(lm, data_dir, name):
    facts = read_facts(data_dir / name, limit=30)
    edited, held_out = facts[:20], facts[20:]
    answers = [fact.target_true or fact.target_new for fact in held_out]
    teach(lm, facts[:1] + [replace(fact, target_new=fact.target_true or fact.target_new, target_true=None)
                           for fact in held_out[:1]])  # fmt: skip
    share = statistics.fmean if facts[0].target_true is None else all
    plain = evaluate(lm, edited, settings=QUIET)
    found = evaluate(lm, edited, settings=QUIET, held_out=held_out)
    assert set(found.scores) - set(plain.scores) == {"ERR", "TRR"}
    assert {name: found.scores[name] for name in plain.scores} == plain.scores
    kept = [[share(right(lm, fact.text, answer))] for fact, answer in zip(held_out, answers, strict=True)]
    assert found.scores["TRR"] == pytest.approx(mean(kept))
    assert found.scores["ERR"] == pytest.approx(mean([[share(right(lm, f.text, f.target_new))] for f in edited]))
    assert len(found.records) == len(edited)
    half = 196 * statistics.stdev(value for (value,) in kept) / len(kept) ** 0.5
    assert found.intervals["TRR"] == pytest.approx((mean(kept) - half, mean(kept) + half))


def test_held_out_facts_are_asked_for_the_answer_that_was_right_before():
    lm = LanguageModel(tiny_model("gptj"), tiny_tokenizer("bytelevel"))
    tokens = lm.encode([" the"])[0]
    assert len(tokens) == 1
    lm.model.lm_head.bias.data[tokens[0]] += 1000  # now it says nothing else
    true, new = Fact("{} is", "He", "of", target_true="the"), Fact("{} is", "She", "the")
    wrong = Fact("{} is", "He", "the", target_true="of")
    for held_out, expected in ((true, 100), (new, 100), (wrong, 0)):
        assert evaluate(lm, [FRANCE], settings=QUIET, held_out=[held_out]).scores["TRR"] == expected


def test_a_held_out_fact_that_is_edited_is_refused(lm):
    with pytest.raises(ValueError, match=r"held_out: its fact 1, 'The capital of Italy is', is one of the facts"):
        evaluate(lm, [FRANCE, ITALY], held_out=[Fact("{} is", "He", "of"), replace(ITALY, target_new="Bonn")])


def test_portability_questions_are_scored_where_facts_have_them(lm):
    questions = (("The people of France speak", "Italian"), ("She moved from France to", "Rome"))
    asked = replace(FRANCE, portability=questions)
    teach(lm, [Fact("{}", "x", "Rome")])
    found = evaluate(lm, [asked, ITALY, replace(QUESTION, portability=questions[1:])], settings=QUIET)
    shares = [right(lm, prompt, answer) for prompt, answer in questions]
    # whole answers for a fact with a true target, shares of tokens for one without
    expected = mean([[all(share) for share in shares], [statistics.fmean(shares[1])]])
    assert found.scores["portability_accuracy"] == pytest.approx(expected)
    assert len(found.records[0]["portability"]["accuracy"]) == 2 and "portability" not in found.records[1]
    assert "portability_accuracy" not in evaluate(lm, [FRANCE], settings=QUIET).scores


def test_perplexity_and_kl_are_their_definitions_and_those_of_health():
    lm = LanguageModel(tiny_model("llama"), tiny_tokenizer("bytelevel"))
    then = [distributions(lm, window)[:-1] for window in WINDOWS]
    health = Health(WINDOWS)
    run(lm, callbacks=[health])
    found = evaluate(lm, [FRANCE, ITALY], settings=EvaluationSettings(progress_bar=False, text=WINDOWS))
    now = [distributions(lm, window)[:-1] for window in WINDOWS]
    kl = [F.kl_div(old, new, log_target=True, reduction="none").sum(-1) for old, new in zip(then, now, strict=True)]
    assert found.scores["perplexity"] == pytest.approx(perplexity(lm, WINDOWS), rel=1e-5)
    assert found.scores["kl"] == pytest.approx(torch.cat(kl).mean().item(), rel=1e-4) and found.scores["kl"] > 1e-3
    assert found.scores["perplexity"] == health.records[-1]["perplexity"]
    assert found.scores["kl"] == health.records[-1]["kl"]
    long = [[token % 300 + 3 for token in range(start, start + 120)] for start in range(0, 1500, 500)]
    assert sum(len(window) - 1 for window in long) > POSITIONS  # so that KL is read at some of them only
    with lm.weights.unedited():
        text = HeldOutText(lm, long)
    scores = evaluate(lm, [FRANCE], settings=EvaluationSettings(progress_bar=False, text=long)).scores
    assert (math.log(scores["perplexity"]), scores["kl"]) == pytest.approx(text.measure(), rel=1e-12)
    assert list(found.scores)[-2:] == ["perplexity", "kl"]


def test_intervals_on_text_are_bootstrapped_over_windows(lm):
    draw = random.Random(0)
    windows = [[draw.randrange(3, 300) for _ in range(draw.randint(2, 9))] for _ in range(12)]
    text = HeldOutText(lm, windows)
    disturb(lm)
    sums = text.sums()
    for window, row in zip(windows, sums.tolist(), strict=True):
        assert row[0] / row[2] == pytest.approx(math.log(perplexity(lm, [window])), rel=1e-5)
        assert row[2:] == [len(window) - 1] * 2
    _, intervals = text.perplexity_and_kl()
    perplexities, divergences = [], []
    for _ in range(2000):
        nll, kl, tokens, sampled = map(sum, zip(*draw.choices(sums.tolist(), k=len(windows)), strict=True))
        perplexities.append(math.exp(nll / tokens))
        divergences.append(kl / sampled)
    for name, drawn in {"perplexity": sorted(perplexities), "kl": sorted(divergences)}.items():
        assert intervals[name] == pytest.approx((drawn[50], drawn[1950]), rel=0.05)


def test_an_unedited_model_has_no_kl_and_one_window_no_interval(lm, tmp_path):
    found = evaluate(lm, [FRANCE], settings=EvaluationSettings(progress_bar=False, text=WINDOWS[:1]))
    assert found.scores["kl"] == 0
    assert all(math.isnan(end) for name in ("perplexity", "kl") for end in found.intervals[name])
    found.save(tmp_path / "evaluation.json")
    assert Evaluation.load(tmp_path / "evaluation.json").scores == found.scores


def test_text_that_cannot_be_read_is_refused_before_any_pass(lm, monkeypatch):
    monkeypatch.setattr(lm, "forward", lambda *_, **__: pytest.fail("a forward pass was run"))
    with pytest.raises(ValueError, match="two tokens"):
        evaluate(lm, [FRANCE], settings=EvaluationSettings(text=[[5], []]))
    with pytest.raises(FileNotFoundError, match=r"missing\.txt"):
        evaluate(lm, [FRANCE], settings=EvaluationSettings(text="missing.txt"))


def test_table_keeps_the_order_of_the_metrics_and_shows_small_kl():
    spread = (0.0, 0.0)
    before = Evaluation({"ES": 1.0, "GE": 600.0, "kl": 0.0}, {"ES": spread, "GE": spread, "kl": spread}, [{}] * 3)
    after = Evaluation(
        {"ES": 1.0, "retain_accuracy": 90.0, "GE": 600.0, "RS_own": 30.0, "perplexity": 12.25, "kl": 0.01234},
        {"ES": spread, "retain_accuracy": spread, "GE": spread, "RS_own": spread, "perplexity": spread,
         "kl": (0.01, 0.02)},
        [{}] * 3,
    )  # fmt: skip
    lines = after.table(before).splitlines()[1:]
    assert [line.split()[0] for line in lines] == ["ES", "retain", "GE", "RS", "perplexity", "KL"]
    assert lines[-1].split() == ["KL", "(nats", "per", "token)", "0.0000", "±", "0.0000", "0.0123", "±", "0.0050"]
    assert lines[3].startswith("RS (own references)") and lines[4].startswith("perplexity (no unit)")
