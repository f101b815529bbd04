import math

import pytest
import torch

from lightedit.data.fact import FactError, Serving
from lightedit.lm import LanguageModel, Place
from lightedit.metrics import score_targets
from lightedit.metrics.scoring import _rows
from tests.models import ARCHITECTURES, tiny_model, tiny_tokenizer

PAIRS = [
    ("The capital of France is", "Paris"),
    ("The capital of France is", "the city of Rome, in Italy"),
    ("She was born in", "a village near Tokyo"),
    ("In 1985 the king of the old country in the north of the continent, who was a physicist, moved to", "東京"),
    ("He", "is"),
    ("The song was written by the piano player Müller and is played on", "every radio station"),
    ("The official language of the state was", "English"),
]
PROMPTS, TARGETS = map(list, zip(*PAIRS, strict=True))


def build(model_type="llama", kind="bytelevel-bos", **kwargs):
    return LanguageModel(tiny_model(model_type, **kwargs), tiny_tokenizer(kind))


def one_full_forward(lm, prompt, target):
    """Mean NLL, share of argmax tokens, those tokens and the worst rank, from all logits of one unpadded row."""
    encoding = lm.tokenizer(f"{prompt} {target}", return_offsets_mapping=True)
    ids = encoding["input_ids"]
    positions = [i for i, (_, end) in enumerate(encoding["offset_mapping"]) if end > len(prompt)]
    with torch.no_grad():
        logits = lm.model(torch.tensor([ids])).logits[0].double()
    losses, hits, said, ranks = [], [], [], []
    for position in positions:
        scores = logits[position - 1].tolist()
        largest = max(scores)
        log_sum = largest + math.log(sum(math.exp(score - largest) for score in scores))
        losses.append(log_sum - scores[ids[position]])
        hits.append(scores[ids[position]] == largest)
        said.append(scores.index(largest))
        ranks.append(1 + sum(score > scores[ids[position]] for score in scores))
    return sum(losses) / len(losses), sum(hits) / len(hits), tuple(said), max(ranks)


def assert_naive(lm, prompts, targets, **kwargs):
    scores = score_targets(lm, prompts, targets, **kwargs)
    naive = [one_full_forward(lm, *pair) for pair in zip(prompts, targets, strict=True)]
    nll, token_accuracy = torch.tensor([row[:2] for row in naive], dtype=torch.float64).T
    torch.testing.assert_close(scores.nll, nll, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scores.token_accuracy, token_accuracy)
    assert scores.predicted == tuple(row[2] for row in naive)
    assert scores.rank.tolist() == [row[3] for row in naive]


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_padded_batches_score_as_one_full_forward_a_row(model_type):
    assert_naive(build(model_type, "bytelevel"), PROMPTS, TARGETS)


@pytest.mark.parametrize("kind", ["bytelevel", "bytelevel-bos", "sentencepiece", "unigram"])
def test_target_tokens_are_found_with_every_kind_of_tokenizer(kind):
    assert_naive(build(kind=kind), PROMPTS, TARGETS)


def test_token_accuracy_is_the_share_of_tokens_that_the_model_would_say():
    lm = build("gptj", "bytelevel")
    tokens = lm.encode([" Paris"])[0]
    assert len(set(tokens)) == len(tokens) > 1
    lm.model.lm_head.bias[tokens[-1]] += 1000  # now it says nothing else
    shares = score_targets(lm, ["He is in"] * 2, ["Paris", "Rome"]).token_accuracy
    assert shares.tolist() == pytest.approx([1 / len(tokens), 0])


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])  # padded, and packed
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_scores_depend_on_neither_batch_size_nor_order(batch_size, architecture):
    lm = build(architecture, "bytelevel")
    expected = score_targets(lm, PROMPTS, TARGETS)
    order = torch.randperm(len(PAIRS)).tolist()
    shuffled = score_targets(lm, [PROMPTS[i] for i in order], [TARGETS[i] for i in order], batch_size)
    torch.testing.assert_close(shuffled.nll, expected.nll[order], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(shuffled.token_accuracy, expected.token_accuracy[order])
    assert shuffled.predicted == tuple(expected.predicted[i] for i in order)


@pytest.fixture
def read(monkeypatch):
    """The places where the LM head is read: of each pass, (row, position) pairs; of packed rows, (0, place)."""
    places = []
    before_head = LanguageModel.before_head

    def keep(lm, rows, at):
        places.append(list(zip(*(index.tolist() for index in at), strict=True)))
        return before_head(lm, rows, at)

    monkeypatch.setattr(LanguageModel, "before_head", keep)
    return places


@pytest.mark.parametrize("model_type", ["llama", "gptj"])
def test_equal_pairs_are_scored_once_and_given_everywhere(model_type, read):
    lm = build(model_type)
    scores = score_targets(lm, PROMPTS[:3] * 3, TARGETS[:3] * 3)
    assert scores.nll.tolist() == scores.nll[:3].tolist() * 3 and scores.predicted == scores.predicted[:3] * 3
    (repeated,) = read
    read.clear()
    score_targets(lm, PROMPTS[:3], TARGETS[:3])
    assert read == [repeated]


@pytest.mark.parametrize("model_type", ["llama", "gptj"])
def test_an_answer_that_begins_another_is_read_with_it(model_type, read):
    lm = build(model_type, "bytelevel")
    assert_naive(lm, ["He is in"] * 2, ["R", "Rome"])
    assert sum(map(len, read)) == len(lm.encode([" Rome"])[0])


@pytest.mark.parametrize("branching", [True, False])
def test_rows_hold_the_texts_of_one_prompt_and_edit(branching):
    asked = [(0, "a", "x"), (0, "a", "y"), (1, "a", "x"), (0, "a", "z"), (0, "b", "x")]
    pairs = [(*pair, Serving()) for pair in asked]
    texts = [[1, 2], [1, 2, 3], [1, 2], [1, 2, 4, 3], [5, 2]]
    rows, place = _rows(pairs, texts, [1] * 5, branching)
    assert len(rows) == (3 if branching else 4)
    for (edit, *_), text, (row, tokens) in zip(pairs, texts, place, strict=True):
        assert rows[row].edit == edit
        assert [rows[row].ids[token] for token in tokens] == text
        assert [rows[row].positions[token] for token in tokens] == list(range(len(text)))
        for number, token in enumerate(tokens):
            assert rows[row].seen()[token].nonzero()[0].tolist() == tokens[: number + 1]
    assert sum(len(row.ids) for row in rows) == (5 + 2 + 2 if branching else 4 + 3 + 2 + 2)


def test_a_row_has_one_end_of_its_prompt():
    """Adaptors decide there."""
    pairs = [(0, "a", "b x", Serving()), (0, "a b", "x", Serving())]
    rows, _ = _rows(pairs, [[1, 2, 3], [1, 2, 3]], [1, 2], True)
    assert sorted(row.prompt for row in rows) == [1, 2]


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_answers_that_branch_off_one_prompt(model_type):
    """Longer than the sliding windows of the tiny models, and the answers share a beginning too."""
    lm = build(model_type, "bytelevel")
    prompt = "The river rises in the hills to the north of the city and runs"
    answers = ["through three countries", "through three hundred", "to the sea", "t", "through three countries"]
    calls = []
    assert_naive(lm, [prompt] * 5, answers)
    score_targets(lm, [prompt] * 5, answers, report=lambda *call: calls.append(call))
    texts = {tuple(lm.encode([f"{prompt} {answer}"])[0][:-1]) for answer in answers}
    beginnings = {text[: end + 1] for text in texts for end in range(len(text))}
    tokens = calls[-1][1]
    if lm.architecture.supports_packing:
        assert tokens == len(beginnings)
    else:
        assert len(beginnings) < tokens <= sum(map(len, texts))


def test_bfloat16_logits_are_normalised_in_float32():
    lm = build("gptj", dtype=torch.bfloat16)
    scores = score_targets(lm, PROMPTS[:1], TARGETS[:1])
    prompt, answer = lm.encode([PROMPTS[0]])[0], lm.encode([f" {TARGETS[0]}"])[0][1:]  # without BOS
    with torch.no_grad():
        logits = lm.model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    assert logits.dtype == torch.bfloat16
    expected = -logits.double().log_softmax(-1)[torch.arange(len(answer)), answer].mean()
    assert scores.nll.item() == pytest.approx(expected.item(), rel=1e-5)


def test_progress_reaches_the_total():
    calls = []
    score_targets(build(), PROMPTS, TARGETS, batch_size=2, report=lambda *call: calls.append(call))
    done, totals = zip(*calls, strict=True)
    assert len(calls) > 1
    assert list(done) == sorted(set(done))
    assert set(totals) == {done[-1]}


def test_nothing_to_score_gives_empty_tensors():
    scores = score_targets(build(), [], [])
    assert scores.nll.shape == scores.token_accuracy.shape == (0,) and scores.predicted == ()


def test_prompts_and_targets_must_pair_up():
    with pytest.raises(ValueError, match="shorter"):
        score_targets(build(), PROMPTS, TARGETS[:-1])


def test_untokenisable_target_is_named_before_any_pass(monkeypatch):
    lm = build()
    monkeypatch.setattr(lm, "forward", lambda *_, **__: pytest.fail("a forward pass was run"))
    with pytest.raises(FactError, match="target ''"):
        score_targets(lm, PROMPTS[:2], ["Paris", ""])


def test_ruined_model_is_reported_and_not_scored():
    lm = build()
    lm.weight(Place(0)).fill_(torch.nan)
    with pytest.raises(FloatingPointError, match=r"'Paris' after 'The capital of France is' is nan.*revert"):
        score_targets(lm, PROMPTS[:1], TARGETS[:1])
