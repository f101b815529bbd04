import doctest
import math
import random
import statistics
import unicodedata

import pytest
import torch

from lightedit.data.facts import read_facts
from lightedit.metrics import accuracies, functional, generated, scores
from lightedit.metrics.functional import (
    accuracy,
    bootstrap_interval,
    edit_score,
    edit_score_interval,
    generation_entropy,
    generation_success,
    harmonic_mean,
    inverse_document_frequencies,
    magnitude,
    mean_interval,
    reference_score,
    success,
    unchanged,
)
from tests.plain import plain_frequencies, plain_reference_score

NAN = float("nan")


def outcomes(n, seed=0):
    """Records' (ES, PS, NS) as two paraphrases and ten neighbours give them, some without paraphrases."""
    draw = random.Random(seed)
    rows = [
        (
            float(draw.random() < 0.9),
            NAN if draw.random() < 0.2 else sum(draw.random() < 0.7 for _ in range(2)) / 2,
            sum(draw.random() < 0.6 for _ in range(10)) / 10,
        )
        for _ in range(n)
    ]
    return torch.tensor(rows, dtype=torch.float64)


def plain_score(rows):
    means = [statistics.fmean(v for v in column if v == v) for column in zip(*rows, strict=True)]
    return statistics.harmonic_mean(means)


@pytest.mark.parametrize("module", [functional, scores, accuracies, generated], ids=lambda module: module.__name__)
def test_examples_in_docstrings_hold(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


def test_a_tie_is_no_success():
    assert success(torch.tensor([1.0, 1.0, 2.0]), torch.tensor([1.0, 2.0, 1.0])).tolist() == [0, 1, 0]


def test_magnitude_is_a_difference_of_probabilities():
    probabilities = torch.tensor([[0.9, 0.25], [0.1, 0.5]], dtype=torch.float64)
    wanted, other = -probabilities.log()
    assert magnitude(wanted, other).tolist() == pytest.approx([0.8, -0.25])


def test_accuracy_wants_every_token():
    shares = torch.tensor([3.0, 2.0, 0.0], dtype=torch.float64) / 3
    assert accuracy(shares).tolist() == [1, 0, 0]


def test_harmonic_mean():
    assert harmonic_mean(torch.tensor([0.964, 1.0, 0.754])).item() == pytest.approx(0.892, abs=5e-4)
    assert harmonic_mean(torch.tensor([1.0, 0.0, 1.0])).item() == 0


def test_mean_interval_is_the_textbook_one():
    values = [0.0, 1.0, 1.0, 0.5, 0.25]
    sums = torch.tensor([sum(values), sum(v * v for v in values), len(values)], dtype=torch.float64)
    half = 1.96 * statistics.stdev(values) / len(values) ** 0.5
    mean = statistics.fmean(values)
    assert mean_interval(sums).tolist() == pytest.approx([mean - half, mean + half])


def test_one_record_has_no_interval():
    assert mean_interval(torch.tensor([0.5, 0.25, 1.0])).isnan().all()
    assert edit_score_interval(outcomes(1)).isnan().all()


def test_edit_score_is_taken_on_aggregates_over_the_records_that_count():
    rows = outcomes(50)
    assert edit_score(rows).item() == pytest.approx(plain_score(rows.tolist()))


def test_edit_score_needs_all_three():
    rows = outcomes(10)
    rows[:, 1] = NAN
    assert edit_score(rows).isnan()
    assert edit_score_interval(rows).isnan().all()


def test_bootstrap_agrees_with_a_plain_loop():
    rows = outcomes(80)
    draw, plain = random.Random(1), rows.tolist()
    scores = sorted(plain_score(draw.choices(plain, k=len(plain))) for _ in range(2000))
    expected = [scores[50], scores[1950]]
    assert edit_score_interval(rows, resamples=2000).tolist() == pytest.approx(expected, abs=0.01)


def test_bootstrap_knows_neither_order_nor_chance():
    rows = outcomes(40)
    first = edit_score_interval(rows)
    assert torch.equal(first, edit_score_interval(rows.flip(0)))
    assert not torch.equal(first, edit_score_interval(rows, seed=1))


def test_intervals_hold_the_score_and_shrink_with_records():
    widths = []
    for n in (20, 2000):
        rows = outcomes(n)
        low, high = edit_score_interval(rows).tolist()
        assert low < edit_score(rows).item() < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 5


def test_equal_records_leave_no_doubt():
    rows = torch.tensor([[1.0, 0.5, 0.8]], dtype=torch.float64).expand(30, 3)
    low, high = edit_score_interval(rows).tolist()
    assert low == pytest.approx(high) == pytest.approx(edit_score(rows).item())


def plain_words(text):
    """Character by character: marks of punctuation stand alone unless a few of them join two letters or digits."""

    def inner(char):
        return char.isalnum() or char == "_" or 0x300 <= ord(char) <= 0x36F

    text = unicodedata.normalize("NFKD", text)
    words, grows = [], False
    for i, char in enumerate(text):
        joins = grows and char in "-'’.," and i + 1 < len(text) and inner(text[i + 1])
        if char.isspace():
            grows = False
        elif grows and (inner(char) or joins):
            words[-1] += char
        else:
            words.append(char)
            grows = inner(char)
    return words


def plain_entropy(text):
    words = plain_words(text)
    total = 0.0
    for n, weight in ((2, 2 / 3), (3, 4 / 3)):
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        for gram in set(grams):
            share = grams.count(gram) / len(grams)
            total -= weight * share * math.log2(share) / 2
    return total


TEXTS = [
    "The mother tongue of Danielle Darrieux is French. She was born in Bordeaux, and grew up in Paris; she didn't "
    "leave it until 1938. She was, she said, a well-known actress at 17 - and 3.5 million people saw the film.",
    "Eiffel Tower, Eiffel Tower, Eiffel Tower, Eiffel Tower, Eiffel Tower, Eiffel Tower, Eiffel Tower",
    "The caf\u00e9 in M\u00fcnchen \u2014 \u201copen\u201d since 1,204 \u2014"
    " serves\n\nna\u00efve \ufb01ne food... It\u2019s 20 \u20ac.",
    "a b c",
    "- -- 'tis the players' choice (e.g. U.S.) x_y a-'b",
]


@pytest.mark.parametrize("text", TEXTS, ids=["prose", "loop", "signs", "three", "edges"])
def test_generation_entropy_is_the_published_definition(text):
    expected = plain_entropy(text)
    assert expected > 0
    assert generation_entropy([text]).item() == pytest.approx(expected, abs=1e-12)


def test_generation_entropy_of_each_text():
    found = generation_entropy(TEXTS)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx([plain_entropy(text) for text in TEXTS])
    assert found[0] > 2 * found[1]
    # three words: two bigrams, one trigram
    assert found[3].item() == pytest.approx(1 / 3)
    assert generation_entropy(["", "one", "two words", "no no no no"]).tolist() == [0, 0, 0, 0]
    assert generation_entropy([]).shape == (0,)


def test_generation_entropy_takes_equal_characters_for_one():
    composed = "caf\u00e9 cafe\u0301 caf\u00e9 cafe\u0301"
    assert generation_entropy([composed]).item() == 0


def test_generation_success_wants_the_target_first():
    continuations = [" Rome", "\n\n Rome is", "Romeo", " rome", " The city of Rome", "", " R"]
    assert generation_success(continuations, ["Rome"] * 7).tolist() == [1, 1, 1, 0, 0, 0, 0]
    assert generation_success([" New York City"], ["New York"]).tolist() == [1]


def test_bootstrap_of_a_ratio_agrees_with_a_plain_loop():
    draw = random.Random(2)
    rows = [[draw.expovariate(1) * size, float(size)] for size in (draw.randint(1, 9) for _ in range(60))]
    ratios = []
    for _ in range(2000):
        drawn = draw.choices(rows, k=len(rows))
        ratios.append(sum(row[0] for row in drawn) / sum(row[1] for row in drawn))
    ratios.sort()
    found = bootstrap_interval(torch.tensor(rows), lambda sums: sums[:, 0] / sums[:, 1], resamples=2000)
    assert found.tolist() == pytest.approx([ratios[50], ratios[1950]], rel=0.03)
    assert bootstrap_interval(torch.tensor(rows[:1]), lambda sums: sums[:, 0] / sums[:, 1]).isnan().all()


def test_a_prediction_is_unchanged_only_if_every_token_is():
    assert unchanged([(1, 2), (1, 2), (3,), ()], [[1, 2], [1, 3], (3, 4), ()]).tolist() == [1, 0, 0, 1]
    with pytest.raises(ValueError, match="shorter"):
        unchanged([(1,)], [])


def test_reference_score_on_real_prompts_is_the_cosine_of_tf_idf_vectors(data_dir):
    facts = read_facts(data_dir / "counterfact_1000.json", limit=30)
    documents = [prompt for fact in facts for prompt in fact.attribute_prompts]
    frequencies = inverse_document_frequencies(documents)
    assert frequencies == pytest.approx(plain_frequencies(documents))
    texts = [" ".join(fact.generation_prompts) for fact in facts]
    references = [" ".join(fact.attribute_prompts) for fact in facts]
    expected = [
        plain_reference_score(text, reference, frequencies) for text, reference in zip(texts, references, strict=True)
    ]
    assert len({round(value, 6) for value in expected}) > 20
    assert reference_score(texts, references, frequencies).tolist() == pytest.approx(expected, abs=1e-12)
    alone = plain_frequencies(references)
    expected = [
        plain_reference_score(text, reference, alone) for text, reference in zip(texts, references, strict=True)
    ]
    assert reference_score(texts, references).tolist() == pytest.approx(expected, abs=1e-12)


def test_reference_score_knows_counts_rarity_and_case():
    weights = {"rome": 2.0, "is": 1.0, "old": 3.0}
    assert reference_score(["ROME is"], ["rome IS, is"], weights).item() == pytest.approx(6 / math.sqrt(5 * 8))
    assert reference_score(["Old"], ["Rome is"], weights).item() == 0
    assert reference_score(["a b c", "new", ""], ["rome"] * 3, weights).tolist() == [0, 0, 0]
    assert reference_score(["It is in Rome. Rome!"], ["rome, rome is"], weights).item() == pytest.approx(1)
