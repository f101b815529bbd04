"""Distinct items of a list, so that equal work is done once."""

from collections.abc import Hashable, Iterable
from typing import TypeVar

T = TypeVar("T", bound=Hashable)


def distinct(items: Iterable[T]) -> tuple[list[T], list[int]]:
    """The distinct items in order of first occurrence, and for each of `items` its index among them.

    >>> distinct(["Rome", "Paris", "Rome"])
    (['Rome', 'Paris'], [0, 1, 0])
    """
    place_of: dict[T, int] = {}
    places = [place_of.setdefault(item, len(place_of)) for item in items]
    return list(place_of), places
