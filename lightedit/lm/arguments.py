"""Arguments that are easily swapped."""

from collections.abc import Sequence
from typing import Any

from lightedit.lm.model import LanguageModel


def check_model(lm: Any) -> None:
    """Raise TypeError unless `lm` is a language model, such as where the facts were given first."""
    if not isinstance(lm, LanguageModel):
        given = f"a {type(lm).__name__} of {len(lm)}" if isinstance(lm, Sequence) else f"a {type(lm).__name__}"
        raise TypeError(f"lm: expected a LanguageModel, got {given}; the language model comes first")
