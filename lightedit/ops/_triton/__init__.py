"""The ops' Triton kernels, each imported when it first runs: `import lightedit` needs neither Triton nor a GPU.

They run on NVIDIA GPUs of compute capability 8.0 and later. Sums are in float32; what asks for float64, and solves for
more than 128 facts, go to the reference, as each kernel's own words say, because Triton would have no advantage there.
"""

from collections.abc import Callable, Collection, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from lightedit.ops._gpus import Capability

_MODULES = {
    "second_moment_": "second_moment",
    "preservation_memorization_solve": "solve",
    "add_low_rank_": "add_low_rank",
    "rowwise_low_rank": "rowwise_low_rank",
    "target_nll_kl": "target_nll_kl",
}


def _lazy(module: str) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        device = arguments[0].device
        function = import_module(f"{__name__}.{module}").run
        if device.type == "cpu":  # Triton's interpreter
            return function(*arguments)
        with torch.cuda.device(device):
            return function(*arguments)

    return run


FUNCTIONS: Mapping[str, Callable[..., Any]] = {op: _lazy(module) for op, module in _MODULES.items()}


def kernels(gpus: Collection[Capability]) -> Mapping[tuple[str, str], Callable[..., Any]]:
    """(op, device) -> what runs there; none without GPUs, or where one of them is too old."""
    if not gpus or min(gpus) < (8, 0) or find_spec("triton") is None:
        return {}
    return {(op, "cuda"): function for op, function in FUNCTIONS.items()}
