"""Benchmarks: each row times one part of lightedit against its reference, after checking that both agree."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Options:
    """What the command line asks of the rows; each takes what concerns it.

    Attributes:
        facts: how many facts to edit.
        reference_facts: run a slow reference on the first so many of them; None runs it on all.
        quick: measure the ops at a few sizes only.
    """

    facts: int = 32
    reference_facts: int | None = None
    quick: bool = False


@dataclass(frozen=True)
class Result:
    """What one row found.

    Attributes:
        table: its lines of the printed table, each (measure, figure).
        figures: everything measured, ready for JSON; seconds and flop/s unless a name says otherwise.
        notes: what a reader must know beside the figures.
    """

    table: list[tuple[str, str]]
    figures: dict[str, Any]
    notes: list[str]


class WrongResultError(RuntimeError):
    """A row's result differs from its reference's, so that its speed means nothing."""
