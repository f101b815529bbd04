"""What a study needs from a method: `Method.at` for every problem, `Method.erasing` for erasure, `Editor.served` for
forcing. It asks for nothing else of it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from lightedit.analysis.localization.settings import Problem
from lightedit.analysis.restoring import window_around
from lightedit.errors import ArgumentError, ArgumentTypeError
from lightedit.lm import LanguageModel
from lightedit.methods import MEMIT, ROME, Method

METHODS: Mapping[str, Method] = {"ROME": ROME(layers=(0,)), "MEMIT": MEMIT(layers=(0, 1, 2, 3, 4), share=0.9)}
"""The methods of a study by default; only the number of their layers counts."""

FORCING: Mapping[str, Method] = {"ROME": ROME(layers=(0,), values=replace(ROME(layers=(0,)).values, steps=25))}
"""Their settings for fact forcing, where these differ. The published learning rate, 0.05, is for GPT-J."""


def placed(method: Method, lm: LanguageModel, layer: int) -> Method:
    """The method moved to as many layers as it has, centred on `layer` and cut at the first and the last one."""
    size = len({place.layer for place in method.places})
    return method.at(tuple(window_around(layer, size, lm.n_layers)))


def check_methods(
    lm: LanguageModel,
    methods: Mapping[str, Method],
    forcing: Mapping[str, Method],
    layers: Sequence[int],
    problems: Sequence[Problem],
) -> None:
    """Check that methods do what the problems need.

    Args:
        lm: the model.
        methods: name -> method.
        forcing: name -> its settings for fact forcing.
        layers: the layers of the study.
        problems: its problems.

    Raises:
        ArgumentError: there are no methods; or one cannot be moved to a layer, erase facts, or edit under noise.
        ArgumentTypeError: one is no method.
    """
    if not methods:
        raise ArgumentError("methods: there is none; give at least one, such as {'ROME': ROME(layers=[0])}")
    for name, method in [*methods.items(), *forcing.items()]:
        if not isinstance(method, Method):
            raise ArgumentTypeError(f"methods: {name}: expected a Method, got a {type(method).__name__}")
        for layer in layers:
            placed(method, lm, layer).check(lm)
        if "erasure" in problems:
            method.erasing()
        if "forcing" in problems and not method.editor_type.can_serve:
            raise ArgumentError(
                f"methods: {name}: {type(method).__name__} cannot edit a noised subject; leave forcing out of problems"
            )
