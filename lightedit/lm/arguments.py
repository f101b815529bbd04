"""Checks of a language model that is given to a run: arguments that are swapped, adapters that came later."""

from collections.abc import Collection, Sequence
from typing import Any

from lightedit.errors import ArgumentTypeError, UnsupportedModelError
from lightedit.lm.kinds import DESCRIBED, KINDS, KindName
from lightedit.lm.model import LanguageModel
from lightedit.lm.storage import check_storage

_CAUSAL: tuple[KindName, ...] = ("causal",)


def check_model(lm: Any, kinds: Collection[KindName] = _CAUSAL, what: str = "this") -> None:
    """Check that `lm` is a language model of one of these kinds, whose weights are still plain tensors.

    Args:
        lm: the argument.
        kinds: the kinds of models that can be used; `KINDS` are all.
        what: what uses the model, as the subject of the message.

    Raises:
        ArgumentTypeError: `lm` is no `LanguageModel`, such as facts that were given first.
        UnsupportedModelError: it is of another kind; or since it was loaded, a PEFT adapter was added to it, for
            example.
    """
    if not isinstance(lm, LanguageModel):
        given = f"a {type(lm).__name__} of {len(lm)}" if isinstance(lm, Sequence) else f"a {type(lm).__name__}"
        raise ArgumentTypeError(f"lm: expected a LanguageModel, got {given}; the language model comes first")
    if lm.kind not in kinds:
        expected = " or ".join(DESCRIBED[kind] for kind in KINDS if kind in kinds)
        raise UnsupportedModelError(f"{lm.name} is {lm.answers.described}, and {what} needs {expected}")
    check_storage(lm.model)
