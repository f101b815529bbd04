"""Checks of arguments that are easily swapped."""

from collections.abc import Sequence
from typing import Any

from lightedit.errors import ArgumentTypeError
from lightedit.lm.model import LanguageModel


def check_model(lm: Any) -> None:
    """Raise ArgumentTypeError unless `lm` is a `LanguageModel`. It catches facts that were given first."""
    if not isinstance(lm, LanguageModel):
        given = f"a {type(lm).__name__} of {len(lm)}" if isinstance(lm, Sequence) else f"a {type(lm).__name__}"
        raise ArgumentTypeError(f"lm: expected a LanguageModel, got {given}; the language model comes first")
