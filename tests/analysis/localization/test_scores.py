"""The scores of an edit against figures worked out by hand."""

import pytest

from lightedit.analysis.localization.effects import restored_shares
from lightedit.analysis.localization.scores import (
    Measured,
    essence_score,
    neighborhood_score,
    rewrite_score,
    scores,
)
from tests.analysis.traces import made_up


@pytest.mark.parametrize("problem", ["injection", "reversal", "amplification", "forcing"])
def test_raising_a_probability_counts_as_a_share_of_what_was_missing(problem: str) -> None:
    assert rewrite_score(problem, 0.2, 0.8) == pytest.approx(0.75)
    assert rewrite_score(problem, 0.2, 0.1) == 0  # cut at 0
    assert rewrite_score(problem, 1.0, 1.0) == 0  # nothing was missing


def test_erasing_counts_as_a_share_of_the_probability_that_was_there() -> None:
    assert rewrite_score("erasure", 0.4, 0.1) == pytest.approx(0.75)
    assert rewrite_score("erasure", 0.4, 0.5) == 0
    assert rewrite_score("erasure", 0.0, 0.0) == 0


@pytest.mark.parametrize(
    ("before", "after", "score"),
    [(0.2, 0.2, 1.0), (0.2, 1.0, 0.0), (0.9, 0.0, 0.0), (0.9, 0.45, 0.5), (0.5, 0.75, 0.5)],
)
def test_a_neighbour_loses_the_share_of_its_largest_possible_change(before: float, after: float, score: float) -> None:
    assert neighborhood_score(before, after) == pytest.approx(score)


@pytest.mark.parametrize(("after", "score"), [(20.0, 1.0), (19.0, 1.0), (21.0, 0.8), (25.0, 0.0), (400.0, 0.0)])
def test_essence_falls_with_the_perplexity_of_the_subjects_texts(after: float, score: float) -> None:
    assert essence_score(20.0, after) == pytest.approx(score)


def test_the_overall_score_is_the_mean_of_three_or_four() -> None:
    before, after = Measured(0.2, 0.1, 0.5, 20.0), Measured(0.6, 0.46, 0.75, 22.0)
    found = scores("injection", before, after)
    assert (found.rewrite, found.paraphrase, found.neighborhood, found.essence) == pytest.approx((0.5, 0.4, 0.5, 0.6))
    assert found.overall == pytest.approx((0.5 + 0.4 + 0.5) / 3)
    assert scores("injection", before, after, "four").overall == pytest.approx(0.5)


def test_a_score_without_texts_is_missing_and_so_is_the_overall_score() -> None:
    found = scores("erasure", Measured(0.4, None, 0.5, None), Measured(0.1, None, 0.5, None))
    assert (found.rewrite, found.paraphrase, found.neighborhood, found.essence) == (
        pytest.approx(0.75),
        None,
        1.0,
        None,
    )
    assert found.overall is None


def test_a_tracing_effect_is_the_largest_restored_share_from_the_subject_on() -> None:
    fact = made_up()  # P 0.9, P* 0.1; the effect of token t at layer l is 0.1 t + 0.01 l, and the last token is 6
    assert restored_shares(fact, None) == pytest.approx([0.6 / 0.8, 0.61 / 0.8])
    assert restored_shares(made_up(shift=-1.0), None) == [0.0, 0.0]  # cut at 0
    assert restored_shares(made_up(shift=0.4), 1.0) == [1.0, 1.0] and restored_shares(made_up(shift=0.4), None)[0] > 1
