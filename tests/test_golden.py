"""Recorded edits: small float64 edits come out as they were recorded, on every architecture.

The models' weights and the covariances are drawn as integers, so that they are the same numbers on every machine and
under every version of transformers. Where a model computes in float32 whatever its dtype (norms, rotary angles,
softmax), it computes in float64 here. What differs between machines is rounding in float64, far below the tolerance.

    python -m tests.test_golden     # records anew; do that only where numbers are meant to change, and say why
"""

import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from transformers import AutoModelForCausalLM

import lightedit as le
from lightedit.data.prompts import ContextSettings
from lightedit.lm.place import Place
from lightedit.statistics.covariance import Provenance
from tests.models import ARCHITECTURES, tiny_model, tiny_tokenizer

RECORDED = Path(__file__).parent / "golden" / "edits.json"
TOLERANCE = 1e-10  # of a change's Frobenius norm
ENTRIES = 8  # of each change, spread over the matrix

# Adam scales a gradient of rounding noise up to a step of lr. So values are found below the last block, and all prompts
# end with their subject: no sliding window parts it from the target.
LAYERS = (1, 2)
FACTS = [
    le.Fact("The capital of {}", "France", "Rome"),
    le.Fact("In the north of {}", "Old London Town", "Spain"),
    le.Fact("It is said of the river {}", "Rhine", "Paris"),
    le.Fact("The music of {}", "Mozart", "loud"),
]

_VALUES = {"lr": 0.3, "steps": 3, "clamp_norm_factor": 2.0}
_COMMON: dict[str, Any] = {
    "layers": LAYERS,
    "contexts": ContextSettings(prefixes=(("The", 1, 5), ("I", 1, 5))),
    "values": le.ValueSettings(**_VALUES),
}
METHODS: dict[str, le.Method] = {
    "ROME": le.ROME(**_COMMON | {"layers": (1,)}),
    "MEMIT": le.MEMIT(**_COMMON, lambda_=5.0),
    "EMMET": le.EMMET(**_COMMON, lambda_=5.0, mu=0.1),
    "PMET": le.PMET(**_COMMON | {"values": le.ValueSettings(**_VALUES, stopping=le.KLBelow())}, lambda_=5.0),
    "PMET with attention": le.PMET(**_COMMON, lambda_=5.0, write_attention=True),
    "AlphaEdit": le.AlphaEdit(**_COMMON, threshold=0.3, ridge=1.0),
    "ENCORE": le.ENCORE(
        **_COMMON | {"values": le.ValueSettings(**_VALUES, stopping=le.MostProbable())}, lambda_=5.0, norm_weight=0.5
    ),
}
# plain blocks, rotary blocks with a gated MLP, and a norm behind the MLP
FEW = ("gpt2", "llama", "gemma2")
CASES = [
    (architecture, method)
    for method in METHODS
    for architecture in (ARCHITECTURES if method in ("ROME", "MEMIT") else FEW)
]


def edited(lm: le.LanguageModel, method: le.Method, covariance: le.Covariance) -> le.Edit:
    """The facts written in two rounds, or in four where the method takes one fact at a time."""
    settings = le.RunSettings(facts_per_round=1 if isinstance(method, le.ROME) else 2)
    return le.edit(lm, FACTS, method, covariance=covariance, settings=settings)


@pytest.mark.parametrize(("architecture", "method"), CASES)
def test_an_edit_is_the_recorded_one(architecture: str, method: str) -> None:
    recorded, found = _recorded()[f"{architecture} {method}"], summary(architecture, method)
    assert found.keys() == recorded.keys()
    for name, change in recorded.items():
        assert math.isclose(found[name]["norm"], change["norm"], rel_tol=TOLERANCE), name
        for entry, expected in zip(found[name]["entries"], change["entries"], strict=True):
            assert abs(entry - expected) <= TOLERANCE * change["norm"], name


def test_every_record_is_checked() -> None:
    assert sorted(_recorded()) == sorted(f"{architecture} {method}" for architecture, method in CASES)


def summary(architecture: str, method: str) -> dict[str, dict[str, Any]]:
    """Norm and some entries of the change of every parameter that the edit changed, by the parameter's name."""
    lm, covariance = _model(architecture), _covariance(architecture)
    before = {name: parameter.detach().clone() for name, parameter in lm.model.named_parameters()}
    edit = edited(lm, METHODS[method], covariance)
    changes = {name: parameter.detach() - before[name] for name, parameter in lm.model.named_parameters()}
    edit.revert(lm)
    return {
        name: {"norm": change.norm().item(), "entries": change.flatten()[_spread(change.numel())].tolist()}
        for name, change in changes.items()
        if change.any()
    }


class _NoFloat32(TorchFunctionMode):
    """Whoever asks for float32 gets float64."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        replaced = [torch.float64 if argument is torch.float32 else argument for argument in args]
        named = {name: torch.float64 if value is torch.float32 else value for name, value in (kwargs or {}).items()}
        return (Tensor.double if function is Tensor.float else function)(*replaced, **named)


def _in_float64(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def wrapped(*args, **kwargs):
        inside = any(isinstance(mode, _NoFloat32) for mode in _get_current_function_mode_stack())
        with nullcontext() if inside else _NoFloat32():
            return forward(*args, **kwargs)

    return wrapped


@lru_cache(1)
def _model(architecture: str) -> le.LanguageModel:
    with _NoFloat32():
        model = AutoModelForCausalLM.from_config(tiny_model(architecture).config, dtype=torch.float64).eval()
    for module in model.modules():
        module.forward = _in_float64(module.forward)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = _uniform(parameter.shape, generator)
            if parameter.ndim == 1:  # norms and biases, which start at 1 or 0
                parameter.add_(noise, alpha=0.25)
            else:
                parameter.copy_(noise / 2)
    return le.LanguageModel(model, tiny_tokenizer("bytelevel"))


@lru_cache(1)
def _covariance(architecture: str) -> le.Covariance:
    lm = _model(architecture)
    moments = {}
    for layer in LAYERS:
        for place in (Place(layer, "attention_out"), Place(layer)):
            generator = torch.Generator().manual_seed(layer)
            keys = _uniform((400, lm.weight(place).shape[1]), generator)
            moments[place] = keys.T @ keys / 400
    return le.Covariance(moments, Provenance(lm.name, lm.fingerprint, "noise", 400, 8, "float64"))


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Numbers from -1 to 1 that every machine draws alike: integers over a power of two, float64."""
    return torch.randint(-(2**20), 2**20, shape, generator=generator).double() / 2**20


def _spread(size: int) -> list[int]:
    return [round((size - 1) * (index + 0.5) / ENTRIES) for index in range(ENTRIES)]


@lru_cache
def _recorded() -> dict[str, dict[str, dict[str, Any]]]:
    return json.loads(RECORDED.read_text())


def record() -> None:
    found = {f"{architecture} {method}": summary(architecture, method) for architecture, method in CASES}
    RECORDED.parent.mkdir(exist_ok=True)
    RECORDED.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    record()
