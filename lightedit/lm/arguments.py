"""Checks of a language model that is given to a run: arguments that are swapped, adapters that came later."""

from collections.abc import Sequence
from typing import Any

from lightedit.errors import ArgumentTypeError
from lightedit.lm.model import LanguageModel
from lightedit.lm.storage import check_storage


def check_model(lm: Any) -> None:
    """Check that `lm` is a language model whose weights are still plain tensors.

    Raises:
        ArgumentTypeError: `lm` is no `LanguageModel`, such as facts that were given first.
        UnsupportedModelError: since the model was loaded, a PEFT adapter was added to it, for example.
    """
    if not isinstance(lm, LanguageModel):
        given = f"a {type(lm).__name__} of {len(lm)}" if isinstance(lm, Sequence) else f"a {type(lm).__name__}"
        raise ArgumentTypeError(f"lm: expected a LanguageModel, got {given}; the language model comes first")
    check_storage(lm.model)
