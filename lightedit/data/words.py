"""Words of texts: where a name is mentioned, as a whole word or within one, and how things are counted."""

import re
import unicodedata


def mentions(text: str, subject: str, flags: int = 0) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(start, end) of all mentions, overlapping ones too, and of those that are whole words."""
    found = [match.span(1) for match in re.finditer(f"(?=({re.escape(subject)}))", text, flags)]
    return found, [(start, end) for start, end in found if _is_whole(text, start, end)]


_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "BOPOMOFO")


def _is_whole(text: str, start: int, end: int) -> bool:
    """Whether no word continues over either end of text[start:end]."""
    return not (_joins(text[:start][-1:], text[start]) or _joins(text[end - 1], text[end : end + 1]))


def _joins(left: str, right: str) -> bool:
    """Whether two neighbouring characters, or nothing, belong to one word."""
    if right and unicodedata.category(right).startswith("M"):
        return True  # an accent belongs to the letter before it, in every script
    return all(
        char and (char.isalnum() or char == "_" or unicodedata.category(char).startswith("M")) for char in (left, right)
    ) and not any(unicodedata.name(char, "").startswith(_UNSPACED) for char in (left, right))


def counted(number: int, noun: str = "fact") -> str:
    """The number of things in words.

    >>> counted(1), counted(1200)
    ('1 fact', '1,200 facts')
    """
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
