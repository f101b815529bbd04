"""The runs of a sweep: all combinations of methods and swept fields, checked before the first run starts."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import product
from typing import Any, Literal

from lightedit.data.words import counted
from lightedit.errors import ArgumentError
from lightedit.methods.protocol import Method

LOG17 = (1, 2, 3, 6, 10, 18, 32, 56, 100, 178, 316, 562, 1000, 1778, 3162, 5623, 10000)
"""17 counts of facts, evenly spaced on a logarithmic scale (PMET, Li et al., 2024, arXiv 2308.08742)."""

Counts = Sequence[int] | Literal["log17"]

RoundLimit = int | Literal["single"] | None
"""Most facts of one round; None for any number, "single" for the single protocol, which scores each fact alone."""


@dataclass(frozen=True)
class Run:
    """One run: a method with its settings writes the sweep's first facts into the unedited model.

    Attributes:
        name: the method's name in the sweep.
        method: the method, with this run's values of the swept fields.
        settings: the swept fields that the method has, with this run's values.
        facts: number of facts, counted from the first.
        round_limit: most facts of one round, as requested or as the method allows; see `RoundLimit`.
    """

    name: str
    method: Method
    settings: dict[str, Any]
    facts: int
    round_limit: RoundLimit

    @property
    def facts_per_round(self) -> int:
        """Number of facts in the first round, whose values are found on the unedited model; all facts for "single"."""
        return min(self.round_limit, self.facts) if isinstance(self.round_limit, int) else self.facts

    @property
    def row(self) -> dict[str, Any]:
        """The cells that identify the run in a table: method, swept fields, facts, facts_per_round, as JSON values."""
        swept = json.loads(json.dumps(self.settings))
        together = "single" if self.round_limit == "single" else self.facts_per_round
        return {"method": self.name, **swept, "facts": self.facts, "facts_per_round": together}

    def __str__(self) -> str:
        settings = [f"{field}={shown(value)}" for field, value in self.settings.items()]
        rounds = [] if self.facts_per_round == self.facts else [f"{self.facts_per_round} a round"]
        rounds += ["each alone"] if self.round_limit == "single" else []
        return ", ".join([self.name, *settings, counted(self.facts), *rounds])


def shown(value: Any) -> str:
    """A swept value for display, such as 15000, 0.5, or 4-8 for successive layers."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        numbers = len(value) > 2 and all(isinstance(entry, int) for entry in value)
        successive = numbers and list(value) == list(range(value[0], value[0] + len(value)))
        return f"{value[0]}-{value[-1]}" if successive else ",".join(map(shown, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def plan(
    methods: Mapping[str, Method],
    available: int,
    counts: Counts | None = None,
    facts_per_round: Sequence[RoundLimit] = (None,),
    grid: Mapping[str, Sequence[Any]] | None = None,
) -> list[Run]:
    """All combinations of methods, fields of the grid, facts per round, and counts; the last varies fastest.

    The list may hold equal runs, because each combination has its place in a figure. Runs are equal if the method
    lacks the field that differs, or if the count is below the facts per round.

    Args:
        methods: name -> method.
        available: number of facts that there are.
        counts: numbers of facts to write; None for all, "log17" for those of `LOG17` up to `available`.
        facts_per_round: numbers of facts written together; None for all, "single" for the single protocol. A
            method's own limit takes precedence.
        grid: field -> values; a dot separates the names of nested fields, such as "values.lr".

    Raises:
        ArgumentError: an argument is empty or out of range, no method has a field, or a method refuses a value.
    """
    grid = dict(grid or {})
    if available < 1:
        raise ArgumentError("facts: there are none; give at least one")
    if not methods:
        raise ArgumentError("methods: none given; give at least one")
    for name, values in {
        "counts": [0] if counts is None else counts,
        "facts_per_round": facts_per_round,
        **grid,
    }.items():
        if not isinstance(values, Sequence) or not values:
            raise ArgumentError(f"{name}: expected a list of at least one value, got {values!r}")
    sizes = _counts(counts, available)
    for limit in facts_per_round:
        if limit not in (None, "single") and not (isinstance(limit, int) and limit >= 1):
            raise ArgumentError(
                f"facts_per_round: {limit!r} facts cannot be a round; give at least 1, null for all, or single"
            )
    known = list(dict.fromkeys(field for method in methods.values() for field in swept_fields(method)))
    for field in grid:
        if field not in known:
            raise ArgumentError(f"grid: no method has a field {field!r}; known are {', '.join(known)}")
    return [
        Run(name, method, settings, count, _round_limit(method, limit))
        for name, base in methods.items()
        for method, settings in _combinations(name, base, grid)
        for limit in facts_per_round
        for count in sizes
    ]


def swept_fields(settings: Any, prefix: str = "") -> list[str]:
    """Names of the fields that a grid can sweep; the names of nested fields contain dots."""
    names = []
    for field in fields(settings):
        value = getattr(settings, field.name)
        names += swept_fields(value, f"{prefix}{field.name}.") if is_dataclass(value) else [prefix + field.name]
    return names


def _counts(counts: Counts | None, available: int) -> list[int]:
    if counts is None:
        return [available]
    if isinstance(counts, str):
        if counts != "log17":
            raise ArgumentError(f"counts: {counts!r} is unknown; give a list of counts, or log17")
        return [count for count in LOG17 if count <= available]
    for count in counts:
        if not 1 <= count <= available:
            raise ArgumentError(
                f"counts: {count} facts asked for, but there are {available}; give counts from 1 to that"
            )
    return sorted(set(counts))


def _round_limit(method: Method, asked: RoundLimit) -> RoundLimit:
    if asked == "single":
        return asked
    return min((limit for limit in (asked, method.facts_per_solve) if limit is not None), default=None)


def _combinations(
    name: str, base: Method, grid: Mapping[str, Sequence[Any]]
) -> Iterator[tuple[Method, dict[str, Any]]]:
    own = set(swept_fields(base))
    for values in product(*grid.values()):
        settings = {field: value for field, value in zip(grid, values, strict=True) if field in own}
        method = base
        for field, value in settings.items():
            try:
                method = _with(method, field.split("."), value)
            except (TypeError, ValueError) as error:
                raise ArgumentError(f"grid: {name} cannot take {field}={value!r}: {error}") from error
        yield method, settings


def _with(settings: Any, path: Sequence[str], value: Any) -> Any:
    """A copy of nested dataclasses with one field set."""
    first, *rest = path
    return replace(settings, **{first: _with(getattr(settings, first), rest, value) if rest else value})
