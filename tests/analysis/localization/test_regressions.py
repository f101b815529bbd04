"""Regressions of a score by layer and tracing effect, against figures worked out by hand."""

import math

import numpy as np
import pytest

from lightedit.analysis.localization import regressions
from lightedit.analysis.localization.regressions import Regression, regression
from lightedit.errors import MissingPackageError

LAYERS = [0, 0, 0, 1, 1, 1]
EFFECTS = [0.0, 1.0, 2.0, 0.0, 1.0, 2.0]
FACTS = [0, 1, 2, 0, 1, 2]
# layer 0: 1, 2, 4; layer 1: 5, 5, 8. By hand below
SCORES = [1.0, 2.0, 4.0, 5.0, 5.0, 8.0]


def table(values: list[float] = SCORES) -> Regression:
    return regression("injection", "ROME", "rewrite", values, LAYERS, EFFECTS, FACTS)


def test_r2_is_the_explained_share_of_the_squares() -> None:
    found = table()
    mean = 25 / 6
    whole = sum((y - mean) ** 2 for y in SCORES)
    assert whole == pytest.approx(30.8333333)
    # within layers: means 7/3 and 6; squares left 14/3 and 6
    assert found.layer == pytest.approx(1 - (14 / 3 + 6) / whole)
    # slope of the effect: half the difference of the outer means, (12 - 6) / 2 / 2 = 1.5; its squares 1.5² * 4
    assert found.slope == pytest.approx(1.5)
    assert found.effect == pytest.approx(1.5**2 * 4 / whole)
    # each layer has a line of its own: slopes 1.5 and 1.5, squares left 14/3 - 4.5 and 6 - 4.5
    left = (14 / 3 - 4.5) + (6 - 4.5)
    assert found.both == pytest.approx(1 - left / whole)
    assert found.both_adjusted == pytest.approx(1 - (left / 2) / (whole / 5))
    assert found.layer_adjusted == pytest.approx(1 - ((14 / 3 + 6) / 4) / (whole / 5))
    # F of two further coefficients, with 6 - 4 degrees of freedom left; then p = 1 / (1 + F)
    f = ((14 / 3 + 6 - left) / 2) / (left / 2)
    assert found.f == pytest.approx(f)
    assert found.p == pytest.approx(1 / (1 + f))
    assert (found.edits, found.facts) == (6, 3)
    assert math.isnan(found.p_clustered)  # three facts are too few


def test_errors_are_clustered_by_fact() -> None:
    x = np.column_stack([np.ones(6), EFFECTS])
    y = np.array(SCORES)
    inverse = np.linalg.inv(x.T @ x)
    rest = y - x @ inverse @ x.T @ y
    meat = sum(np.outer(own, own) for own in (x.T @ (rest * (np.array(FACTS) == fact)) for fact in range(3)))
    correction = 3 / 2 * 5 / 4  # of G clusters and n observations with k coefficients: G/(G-1) (n-1)/(n-k)
    expected = math.sqrt((correction * inverse @ meat @ inverse)[1, 1])
    assert table().slope_error == pytest.approx(expected)


def test_the_clustered_test_asks_for_the_effects_coefficients() -> None:
    draw = np.random.default_rng(0)
    facts = list(range(30)) * 2
    layers, effects = [0] * 30 + [1] * 30, draw.random(60).tolist()
    noise = draw.normal(size=30)  # of the fact, the same at both layers
    values = [0.5 * layer + noise[fact] for layer, fact in zip(layers, facts, strict=True)]
    unrelated = regression("injection", "ROME", "rewrite", values, layers, effects, facts)
    assert unrelated.p_clustered > 0.05
    related = regression(
        "injection",
        "ROME",
        "rewrite",
        [v + 3 * e for v, e in zip(values, effects, strict=True)],
        layers,
        effects,
        facts,
    )
    assert related.p_clustered < 1e-6 and related.p < 1e-6 and related.both > related.layer + 0.1


def test_what_is_not_defined_is_nan() -> None:
    constant = table([0.5] * 6)
    assert math.isnan(constant.layer) and math.isnan(constant.p)
    without_effects = regression("injection", "ROME", "rewrite", SCORES, LAYERS, [0.3] * 6, FACTS)
    assert without_effects.both == pytest.approx(without_effects.layer) and without_effects.effect == pytest.approx(0)
    assert math.isnan(without_effects.f) and math.isnan(without_effects.slope)
    one_layer = regression("injection", "ROME", "rewrite", SCORES, [4] * 6, EFFECTS, FACTS)
    assert one_layer.layer == pytest.approx(0) and one_layer.both == pytest.approx(one_layer.effect)
    assert math.isnan(regression("injection", "ROME", "rewrite", [], [], [], []).layer)


def test_without_statsmodels_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regressions, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"pip install 'lightedit\[study\]'"):
        table()
