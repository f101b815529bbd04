"""How much of a score the layer of an edit explains, how much the tracing effect there, and how much both."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightedit.errors import MissingPackageError

_SAME = 1e-9  # relative size below which what is left of a column is rounding


@dataclass(frozen=True)
class Regression:
    """Three least-squares regressions of one score: by layer, by tracing effect, by both with their interaction.

    A number is NaN where it is not defined, such as all of them if the score is constant.

    Attributes:
        problem: what the edits are for.
        method: name of the method.
        score: name of the score.
        edits: number of edits.
        facts: number of facts.
        layer: R² of score ~ factor(layer).
        effect: R² of score ~ effect.
        both: R² of score ~ factor(layer) * effect.
        layer_adjusted: R² of the first, adjusted for its number of coefficients.
        effect_adjusted: that of the second.
        both_adjusted: that of the third.
        f: F statistic of the third against the first, as published: all edits count as independent.
        p: its p-value.
        f_clustered: Wald's F statistic of the effect's coefficients in the third, with errors clustered by fact.
        p_clustered: its p-value, with as many degrees of freedom as facts less one.
        slope: coefficient of the effect in the second.
        slope_error: its standard error, clustered by fact.
    """

    problem: str
    method: str
    score: str
    edits: int
    facts: int
    layer: float = math.nan
    effect: float = math.nan
    both: float = math.nan
    layer_adjusted: float = math.nan
    effect_adjusted: float = math.nan
    both_adjusted: float = math.nan
    f: float = math.nan
    p: float = math.nan
    f_clustered: float = math.nan
    p_clustered: float = math.nan
    slope: float = math.nan
    slope_error: float = math.nan


def check_statsmodels() -> None:
    """Raise MissingPackageError, with the command that installs it, if statsmodels is not installed."""
    if find_spec("statsmodels") is None:
        raise MissingPackageError("regressions need statsmodels; pip install 'lightedit[study]'")


def regression(
    problem: str,
    method: str,
    score: str,
    values: Sequence[float],
    layers: Sequence[int],
    effects: Sequence[float],
    facts: Sequence[int],
) -> Regression:
    """The regressions of one score.

    Args:
        problem: what the edits are for.
        method: name of the method.
        score: name of the score.
        values: the score of each of n edits.
        layers: the layer of each.
        effects: the tracing effect of each.
        facts: index of the fact of each.

    Raises:
        MissingPackageError: statsmodels is not installed.
    """
    check_statsmodels()
    from statsmodels.regression.linear_model import OLS

    groups = np.asarray(facts)
    found = Regression(problem, method, score, len(values), len(set(facts)))
    y, x = np.asarray(values, dtype=float), np.asarray(effects, dtype=float)
    if len(y) < 2 or y.std() <= _SAME * max(1.0, abs(y).max()):
        return found
    ones = np.ones_like(x)
    levels = sorted(set(layers))
    of_layer = np.stack([np.asarray(layers) == layer for layer in levels], axis=1).astype(float)  # [n, layers]
    first = of_layer  # a column for each layer holds the constant
    third, added = _independent(first, of_layer * x[:, None])
    one, two, both = OLS(y, first).fit(), OLS(y, _independent(ones[:, None], x[:, None])[0]).fit(), OLS(y, third).fit()
    f, p, _ = both.compare_f_test(one) if added and both.df_resid > 0 else (math.nan,) * 3
    numbers: dict[str, Any] = {
        **{name: _r2(fit, y) for name, fit in (("layer", one), ("effect", two), ("both", both))},
        **{f"{name}_adjusted": _adjusted(fit, y) for name, fit in (("layer", one), ("effect", two), ("both", both))},
        "f": f,
        "p": p,
    }
    clusters = {"cov_type": "cluster", "cov_kwds": {"groups": groups}, "use_t": True}
    if two.params.size == 2 and found.facts > 1:
        clustered = OLS(y, two.model.exog).fit(**clusters)
        numbers |= {"slope": clustered.params[1], "slope_error": clustered.bse[1]}
    if added and found.facts > 1 and both.df_resid > 0:
        clustered = OLS(y, third).fit(**clusters)
        # with few facts their covariance is singular, and the test is not defined
        if np.linalg.matrix_rank(clustered.cov_params()[-added:, -added:]) == added:
            wald = clustered.wald_test(np.eye(third.shape[1])[-added:], use_f=True, scalar=True)
            numbers |= {"f_clustered": wald.statistic, "p_clustered": wald.pvalue}
    return Regression(
        found.problem, found.method, found.score, found.edits, found.facts,
        **{name: float(value) for name, value in numbers.items()},
    )  # fmt: skip


def _independent(columns: NDArray[Any], more: NDArray[Any]) -> tuple[NDArray[Any], int]:
    """The columns with those of `more` that are not in the span of earlier ones, and the number of the latter."""
    kept = columns
    for column in more.T:
        rest = column - kept @ np.linalg.lstsq(kept, column, rcond=None)[0]
        if np.linalg.norm(rest) > _SAME * max(1.0, float(np.linalg.norm(column))):
            kept = np.column_stack([kept, column])
    return kept, kept.shape[1] - columns.shape[1]


def _r2(fit: Any, y: NDArray[Any]) -> float:
    """R² around the mean. statsmodels takes that around 0 where it sees no column of ones."""
    return float(1 - fit.ssr / ((y - y.mean()) ** 2).sum())


def _adjusted(fit: Any, y: NDArray[Any]) -> float:
    n, free = len(y), float(fit.df_resid)
    return 1 - (1 - _r2(fit, y)) * (n - 1) / free if free > 0 else math.nan
