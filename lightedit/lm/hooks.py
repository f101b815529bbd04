"""All forward hooks of the package.

They work on modules that return a tensor and on modules that return a tuple. They also work on modules that get all
rows' tokens as one list, such as OPT's MLP. Hooks run in the order in which their contexts were entered, so a later
one sees what an earlier one changed.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightedit.lm.architectures import Features

_Key = TypeVar("_Key", bound=Hashable)
At = tuple[Tensor, Tensor]
"""(rows, positions) of n tokens, two integer tensors [n]."""
OutputChange = Callable[[Tensor, Tensor], Tensor]
"""(input of a place, its output), both [rows, tokens, features] -> the output that replaces it."""


class _StopForward(Exception):
    """Raised by a hook to end a forward pass whose remaining blocks are not needed."""


@dataclass(frozen=True)
class Port:
    """The modules of one place.

    Attributes:
        entry: the module whose first input is the place's input.
        exit: the module whose output is the place's output; the same module except at `attention`.
        block: the block around them, whose input gives the numbers of rows and tokens; None outside of blocks.
        features: the output features of `exit` that belong to the place; None for all.
    """

    entry: nn.Module
    exit: nn.Module
    block: nn.Module | None = None
    features: Features | None = None


def hidden_of(output: Any) -> Tensor:
    """The hidden state in a module's output: the tensor itself, or a tuple's first element."""
    return output[0] if isinstance(output, tuple | list) else output


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The first input of a module, whether the caller names it or not."""
    return args[0] if args else next(iter(kwargs.values()))


@contextmanager
def stop_after(module: nn.Module, before: bool = False) -> Iterator[None]:
    """End every forward pass inside the context right after `module` has run, or right before.

    An internal exception ends the pass and leaves the context, so the forward call must be its last statement.
    """

    def stop(*_: Any) -> None:
        raise _StopForward

    handle = module.register_forward_pre_hook(stop) if before else module.register_forward_hook(stop)
    try:
        yield
    except _StopForward:
        pass
    finally:
        handle.remove()


@contextmanager
def returned_by(module: nn.Module) -> Iterator[list[Any]]:
    """Yield a list to which each call of `module` adds its return value, unchanged."""
    returned: list[Any] = []
    handle = module.register_forward_hook(lambda _, __, output: returned.append(output))
    try:
        yield returned
    finally:
        handle.remove()


@contextmanager
def capture(
    modules: Mapping[_Key, nn.Module],
    rows: int,
    at: At | None = None,
    inputs: bool = False,
    features: Mapping[_Key, Features] | None = None,
) -> Iterator[dict[_Key, Tensor]]:
    """Collect the output or the input of each module.

    Args:
        modules: modules to watch, by a key of the caller's choice, such as the place.
        rows: number of rows in the batch; some modules (OPT's MLP) get all rows' tokens as one list.
        at: the tokens whose states are kept, as [n, d]. None keeps all.
        inputs: keep the module's first input instead of its output.
        features: key -> the features to keep; all features of a key that is missing.

    Yields:
        A dictionary that fills during the forward pass: key -> [n, d] or [rows, tokens, d]. Tensors are copies.
    """
    captured: dict[_Key, Tensor] = {}

    def keep(key: _Key, value: Tensor) -> None:
        value = value.reshape(rows, -1, value.shape[-1])
        part = (features or {}).get(key)
        if part is not None:
            value = value[..., _on(value.device, part)]
        captured[key] = value.clone() if at is None else value[at[0].to(value.device), at[1].to(value.device)]

    with ExitStack() as stack:
        for key, module in modules.items():
            if inputs:
                handle = module.register_forward_pre_hook(
                    lambda _, args, kwargs, key=key: keep(key, first_input(args, kwargs)), with_kwargs=True
                )
            else:
                handle = module.register_forward_hook(lambda _, __, output, key=key: keep(key, hidden_of(output)))
            stack.callback(handle.remove)
        yield captured


def install(port: Port, change: OutputChange) -> Callable[[], None]:
    """Let `change` replace the output of `port` in every forward pass.

    `change` gets the place's input and output. At the embedding, the input is token ids [rows, tokens].

    Returns:
        A function that removes the hooks.
    """
    seen: dict[str, Any] = {}
    handles = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], returned: Any) -> Any:
        whole = hidden_of(returned)
        lead = whole.shape[:2] if port.block is None else seen["lead"]
        entered = first_input(args, kwargs) if port.entry is port.exit else seen["entered"]
        if entered.is_floating_point():
            entered = entered.reshape(*lead, -1)
        output = whole.reshape(*lead, -1)
        if port.features is None:
            changed = change(entered, output)
        else:
            part = _on(output.device, port.features)
            changed = output.clone()
            changed[..., part] = change(entered, output[..., part])
        changed = changed.view_as(whole)
        return (changed, *returned[1:]) if isinstance(returned, tuple) else changed

    if port.block is not None:
        handles.append(
            port.block.register_forward_pre_hook(
                lambda _, a, k: seen.update(lead=first_input(a, k).shape[:2]), with_kwargs=True
            )
        )
    if port.entry is not port.exit:
        handles.append(
            port.entry.register_forward_pre_hook(
                lambda _, a, k: seen.update(entered=first_input(a, k)), with_kwargs=True
            )
        )
    handles.append(port.exit.register_forward_hook(hook, with_kwargs=True))

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove


@contextmanager
def changed(port: Port, change: OutputChange) -> Iterator[None]:
    """`install` within the context."""
    remove = install(port, change)
    try:
        yield
    finally:
        remove()


@contextmanager
def add_at(port: Port, shift: Tensor, at: At) -> Iterator[None]:
    """Add `shift` [n, d] to the output of `port` at `at`, in the wider of both dtypes. Gradients flow into it."""

    def change(_: Tensor, output: Tensor) -> Tensor:
        wide = output.to(torch.promote_types(shift.dtype, output.dtype))
        return wide.index_put(_on_device(at, output), shift.to(wide), accumulate=True).to(output.dtype)

    with changed(port, change):
        yield


@contextmanager
def replace_at(port: Port, states: Tensor, at: At) -> Iterator[None]:
    """Replace the output of `port` at the distinct tokens `at` by `states` [n, d]. Gradients flow into them."""

    def change(_: Tensor, output: Tensor) -> Tensor:
        return output.index_put(_on_device(at, output), states.to(output))

    with changed(port, change):
        yield


@dataclass
class Probe:
    """The token factors of the gradient at one place, from one forward and backward pass.

    For a place with a matrix W, dL/dW [d_out, d_in] is the sum over tokens of the outer products of `grads` and
    `inputs`. dL/db is the sum of `grads` over tokens.
    """

    _seen: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def inputs(self) -> Tensor:
        """The place's input, [rows, tokens, d_in].

        Raises:
            RuntimeError: no forward pass has reached the place.
        """
        if "inputs" not in self._seen:
            raise RuntimeError("the probe has seen nothing: no forward pass reached its place within the context")
        return self._seen["inputs"]

    @property
    def grads(self) -> Tensor:
        """The gradient of the loss with respect to the place's output, [rows, tokens, d_out].

        Raises:
            RuntimeError: no backward pass has reached the place.
        """
        grad = self._seen["zero"].grad if "zero" in self._seen else None
        if grad is None:
            raise RuntimeError(
                "the probe has no gradient: no backward pass reached its place. The forward pass must run with "
                "gradients enabled, and the loss must depend on the place"
            )
        return grad


@contextmanager
def probe(ports: Mapping[_Key, Port]) -> Iterator[dict[_Key, Probe]]:
    """Add a zero tensor with a gradient to the output of each port. Each probe holds the last forward pass only."""
    probes = {key: Probe() for key in ports}

    def watch(into: Probe) -> OutputChange:
        def change(inputs: Tensor, output: Tensor) -> Tensor:
            zero = torch.zeros_like(output, requires_grad=True)
            into._seen.update(inputs=inputs.detach().clone(), zero=zero)
            return output + zero

        return change

    with ExitStack() as stack:
        for key, port in ports.items():
            stack.enter_context(changed(port, watch(probes[key])))
        yield probes


@contextmanager
def skip_blocks(blocks: Iterable[nn.Module], hidden: Tensor, as_tuple: bool) -> Iterator[None]:
    """Let each of `blocks` return `hidden` without running.

    Only their `forward` is replaced, so indices, attributes and parameters stay as the model expects them.

    Args:
        blocks: the first blocks of a model.
        hidden: output of the last of them, [rows, positions, d]; gradients flow into it.
        as_tuple: whether the model expects its blocks to return (hidden, attention weights).
    """
    output = (hidden, None) if as_tuple else hidden
    with ExitStack() as stack:
        for block in blocks:
            # accelerate, too, keeps a `forward` in the instance's __dict__; it must be restored
            previous = block.__dict__.get("forward")
            block.forward = lambda *_, **__: output
            if previous is None:
                stack.callback(block.__dict__.pop, "forward")
            else:
                stack.callback(block.__dict__.__setitem__, "forward", previous)
        yield


def _on(device: torch.device, features: Features) -> Features:
    return features if isinstance(features, slice) else features.to(device)


def _on_device(at: At, output: Tensor) -> At:
    return at[0].to(output.device), at[1].to(output.device)
