import doctest
import random
import statistics

import pytest
import torch

from lightedit.metrics import functional, metrics
from lightedit.metrics.functional import (
    accuracy,
    edit_score,
    edit_score_interval,
    harmonic_mean,
    magnitude,
    mean_interval,
    success,
)

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


@pytest.mark.parametrize("module", [functional, metrics], ids=["functional", "metrics"])
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
