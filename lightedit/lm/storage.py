"""How a model holds its weights. What cannot be read and written in place is refused before work starts."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightedit.errors import UnsupportedModelError

_MERGE = (
    "merge the adapter into the weights first (model = model.merge_and_unload(), or leave the adapter out) and give "
    "that model"
)
_ON_A_DEVICE = 'such as "cpu" or 0, in device_map'


def check_storage(model: nn.Module) -> None:
    """Check that the weights of a model are plain tensors that its forward pass uses as they are.

    Raises:
        UnsupportedModelError: the model carries a PEFT adapter, computes a weight from others (`torch.nn.utils`), holds
            8-bit floating-point weights, or has its embedding or LM head offloaded.
    """
    if _of_peft(model):
        raise UnsupportedModelError(f"the model is a {type(model).__name__} of PEFT; {_MERGE}")
    for name, module in model.named_modules():
        _check_module(name, module)
    for name, weight in model.named_parameters():
        _check_dtype(name, weight)
    for name, module, what in _ends(model):
        if any(parameter.device.type == "meta" for parameter in module.parameters(recurse=False)):
            raise UnsupportedModelError(
                f"the {what}, {name}, is offloaded, and every text needs it; give {name!r} a device, {_ON_A_DEVICE}"
            )


def check_stored(name: str, module: nn.Module, what: str, tensor: Tensor | None) -> None:
    """Check that a module's weight or bias can be written.

    Args:
        name: name of the module.
        module: the module.
        what: what the tensor is, for the message.
        tensor: the weight or bias; None if the module has none of this name.

    Raises:
        UnsupportedModelError: the module is one of PEFT, computes its weight, or stores it quantised or elsewhere.
    """
    _check_module(name, module)
    if tensor is None:
        raise UnsupportedModelError(
            f"the {what} is not stored as one tensor: {name} is a {type(module).__name__}; load the model without "
            "quantisation"
        )
    if tensor.device.type == "meta":
        raise UnsupportedModelError(f"the {what} is offloaded; give {name!r} a device, {_ON_A_DEVICE}")
    if not tensor.is_floating_point():
        raise UnsupportedModelError(
            f"the {what} is stored as {_shown(tensor.dtype)}; load it in a floating-point dtype on a device"
        )
    _check_dtype(name, tensor)


def _check_module(name: str, module: nn.Module) -> None:
    if _of_peft(module):
        raise UnsupportedModelError(f"{name} is a {type(module).__name__} of PEFT, whose output is not W k; {_MERGE}")
    if parametrize.is_parametrized(module):
        raise UnsupportedModelError(
            f"{name} computes its weight from other tensors (torch.nn.utils.parametrize); call remove_parametrizations "
            "on it first"
        )


def _of_peft(module: nn.Module) -> bool:
    return any(kind.__module__.split(".")[0] == "peft" for kind in type(module).__mro__)


def _check_dtype(name: str, weight: Tensor) -> None:
    if weight.is_floating_point() and weight.dtype.itemsize == 1:
        raise UnsupportedModelError(
            f"{name} is stored as {_shown(weight.dtype)}, in which no edit can be written; load the model in bfloat16 "
            '(dtype="bfloat16"), or its checkpoint from before the quantisation'
        )


def _shown(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _ends(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """The token embedding and the LM head, with their names."""
    names = {module: name for name, module in model.named_modules()}
    for getter, what in (("get_input_embeddings", "token embedding"), ("get_output_embeddings", "LM head")):
        module = getattr(model, getter, lambda: None)()
        if module is not None:
            yield names.get(module, what), module, what
