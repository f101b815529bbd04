"""The ops' Triton kernels, each imported when it first runs: `import lightedit` needs neither Triton nor a GPU.

They run on NVIDIA GPUs of compute capability 8.0 and later. Sums are in float32; what asks for float64 goes to the
reference, as each kernel's own words say, because Triton would have no advantage there.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

_MODULES = {
    "second_moment_": "second_moment",
    "preservation_memorization_solve": "solve",
    "add_low_rank_": "add_low_rank",
    "rowwise_low_rank": "rowwise_low_rank",
    "target_nll_kl": "target_nll_kl",
}


def _lazy(op: str, module: str) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        device = arguments[0].device
        function = import_module(f"{__name__}.{module}").run
        if device.type == "cpu":  # Triton's interpreter
            return function(*arguments)
        if (capability := torch.cuda.get_device_capability(device)) < (8, 0):
            raise RuntimeError(
                f"{op} in Triton needs a GPU of compute capability 8.0 or later, and {device} has "
                f"{capability[0]}.{capability[1]}; work within lightedit.ops.use('reference')"
            )
        with torch.cuda.device(device):
            return function(*arguments)

    return run


FUNCTIONS: Mapping[str, Callable[..., Any]] = {op: _lazy(op, module) for op, module in _MODULES.items()}
_HERE = bool(torch.version.cuda) and torch.cuda.is_available() and find_spec("triton") is not None
KERNELS: Mapping[tuple[str, str], Callable[..., Any]] = (
    {(op, "cuda"): function for op, function in FUNCTIONS.items()} if _HERE else {}  # (op, device) -> what runs there
)
