"""Which implementation of an op runs on which device: exactly one, and `implementations()` names it.

Each op's reference runs on every device. The built extension replaces it where it has something better, and Triton
kernels replace it on a GPU that the extension was not built for. On a machine with several GPUs, that is what all of
them can run. PyTorch's dispatcher makes the choice, so no caller knows of it.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch.library import Library

from lightedit.ops._gpus import capabilities, fits
from lightedit.ops._native import gpu_codes, load
from lightedit.ops._triton import kernels
from lightedit.ops.add_low_rank import reference as _add_low_rank
from lightedit.ops.rowwise_low_rank import reference as _rowwise_low_rank
from lightedit.ops.second_moment import reference as _second_moment
from lightedit.ops.solve import reference as _solve
from lightedit.ops.target_nll_kl import reference as _target_nll_kl

Implementation = Literal["reference", "triton", "native"]

REFERENCES: Mapping[str, Callable[..., Any]] = {
    "second_moment_": _second_moment,
    "preservation_memorization_solve": _solve,
    "add_low_rank_": _add_low_rank,
    "rowwise_low_rank": _rowwise_low_rank,
    "target_nll_kl": _target_nll_kl,
}
_KEYS = {"cpu": "CPU", "cuda": "CUDA"}  # of the dispatcher

NATIVE_STATUS = load()
_REGISTERED = {  # by the extension, when it was loaded
    (op, device)
    for op in REFERENCES
    for device, key in _KEYS.items()
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"lightedit::{op}", key)
}
_GPUS = capabilities()
_NATIVE = _REGISTERED
_TRITON = kernels(_GPUS)
if _GPUS and any(device == "cuda" for _, device in _REGISTERED) and not all(fits(gpu_codes(), gpu) for gpu in _GPUS):
    _NATIVE = {(op, device) for op, device in _REGISTERED if device != "cuda"}
    NATIVE_STATUS += (
        f"; its CUDA kernels, compiled for {', '.join(gpu_codes())}, do not run on GPUs of compute capability "
        + ", ".join(f"{major}.{minor}" for major, minor in sorted(_GPUS))
    )


class _Live:
    """What is registered on top of what the extension registers when it is loaded."""

    def __init__(self) -> None:
        self.wanted: Implementation | None = None  # None: the best there is
        self._overrides: Library | None = None
        self.table: dict[str, dict[str, Implementation]] = {}

    def choose(self, wanted: Implementation | None) -> None:
        if self._overrides is not None:
            self._overrides._destroy()
        self._overrides, self.wanted = Library("lightedit", "IMPL"), wanted
        self.table = {op: {device: self._run(op, device) for device in _KEYS} for op in REFERENCES}

    def _run(self, op: str, device: str) -> Implementation:
        found = _available(op, device)
        chosen = self.wanted if self.wanted in found else found[0]
        if chosen != "native" and (chosen == "triton" or (op, device) in _REGISTERED):
            assert self._overrides is not None
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*Overriding a previously registered kernel")
                kernel = _TRITON[op, device] if chosen == "triton" else REFERENCES[op]
                self._overrides.impl(op, kernel, _KEYS[device])
        return chosen


def _available(op: str, device: str) -> list[Implementation]:
    """Best first."""
    found: list[Implementation] = ["reference"]
    if (op, device) in _TRITON:
        found.insert(0, "triton")
    if (op, device) in _NATIVE:
        found.insert(0, "native")
    return found


_live = _Live()
_live.choose(None)


def implementations() -> dict[str, dict[str, Implementation]]:
    """Op -> device -> what runs there now, for the devices of this machine.

    On a GPU an implementation may leave a call to the vendor's libraries: every one does for systems of more than 128
    facts, and those in Triton go to the reference for all of float64.
    """
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return {op: {device: live[device] for device in devices} for op, live in _live.table.items()}


@contextmanager
def use(implementation: Implementation) -> Iterator[None]:
    """Within the context, every op runs on `implementation` wherever it has one; for tests and benchmarks.

    The choice holds for the whole process, other threads included. What has no such implementation runs as it does
    otherwise, and `implementations()` tells what that is.

        >>> with use("reference"):
        ...     implementations()["second_moment_"]["cpu"]
        'reference'

    Raises:
        ValueError: there is no implementation of that name.
        RuntimeError: it has no op on any device of this machine.
    """
    if implementation not in get_args(Implementation):
        raise ValueError(f"an implementation is one of {', '.join(get_args(Implementation))}, got {implementation!r}")
    devices = implementations()["second_moment_"]
    if not any(implementation in _available(op, device) for op in REFERENCES for device in devices):
        why = f"the extension is {NATIVE_STATUS}" if implementation == "native" else "no op has a Triton kernel here"
        raise RuntimeError(f"no {implementation} implementation on {', '.join(devices)}: {why}")
    before = _live.wanted
    _live.choose(implementation)
    try:
        yield
    finally:
        _live.choose(before)
