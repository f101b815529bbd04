"""Hooks on transformer blocks, safe for blocks that return a tensor and for those that return a tuple."""

from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn

_Key = TypeVar("_Key", bound=Hashable)


class _StopForward(Exception):
    """Raised by a hook to end a forward pass whose remaining blocks are not needed."""


def hidden_of(output: Any) -> Tensor:
    """The hidden state in a module's output: the tensor itself, or a tuple's first element."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def stop_after(module: nn.Module, before: bool = False) -> Iterator[None]:
    """End every forward pass inside the context right after `module` has run, or right before.

    The forward call must be the last statement of the context: leaving it by the internal exception is what ends it.
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
def capture(
    modules: Mapping[_Key, nn.Module], rows: int, at: tuple[Tensor, Tensor] | None = None, inputs: bool = False
) -> Iterator[dict[_Key, Tensor]]:
    """Collect what enters or leaves each module.

    Args:
        modules: modules to watch, by a key of the caller's choice, such as the layer.
        rows: number of rows in the batch; some modules (OPT's MLP) see all rows' tokens as one list.
        at: (rows, positions), integer tensors of shape [n]; only these states are kept, as [n, d]. None keeps all.
        inputs: keep the module's first input instead of its output.

    Yields:
        A dictionary that fills during the forward pass: key -> [n, d] or [rows, positions, d]. Tensors are copies.
    """
    captured: dict[_Key, Tensor] = {}

    def keep(key: _Key, value: Tensor) -> None:
        value = value.reshape(rows, -1, value.shape[-1])
        captured[key] = value.clone() if at is None else value[at[0].to(value.device), at[1].to(value.device)]

    with ExitStack() as stack:
        for key, module in modules.items():
            if inputs:
                handle = module.register_forward_pre_hook(lambda _, args, key=key: keep(key, args[0]))
            else:
                handle = module.register_forward_hook(lambda _, __, output, key=key: keep(key, hidden_of(output)))
            stack.callback(handle.remove)
        yield captured


@contextmanager
def skip_blocks(blocks: Iterable[nn.Module], hidden: Tensor, as_tuple: bool) -> Iterator[None]:
    """Let every one of `blocks` return `hidden` without running.

    Only their `forward` is exchanged, so that indices, attributes and parameters stay what the model expects.

    Args:
        blocks: the first blocks of a model.
        hidden: output of the last of them, [rows, positions, d]; gradients flow into it.
        as_tuple: whether the model expects its blocks to return (hidden, attention weights).
    """
    output = (hidden, None) if as_tuple else hidden
    with ExitStack() as stack:
        for block in blocks:
            # accelerate's hooks also live in the instance's __dict__; they must come back as they were
            previous = block.__dict__.get("forward")
            block.forward = lambda *_, **__: output
            if previous is None:
                stack.callback(block.__dict__.pop, "forward")
            else:
                stack.callback(block.__dict__.__setitem__, "forward", previous)
        yield
