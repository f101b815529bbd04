"""`lightedit env`."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from textwrap import fill

import torch

from lightedit.lm.loading import cache_folder
from lightedit.lm.refusal import PROVEN, refusals
from lightedit.methods import METHODS
from lightedit.ops import NATIVE_STATUS, implementations


def env(models: bool = False) -> None:
    """Show versions, devices, the implementation of each op, methods, and the cache folder.

    Args:
        models: list model types instead: those that pass the parity suite, and those that are refused, and why.
    """
    if models:
        _models()
        return
    packages = ("lightedit", "torch", "lightning", "transformers", "torchmetrics", "datasets", "triton", "gguf")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    rows = {
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
        "cpu": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads used",
        "gpu": ", ".join(gpus) or "none",
        "native extension": NATIVE_STATUS,
        **{
            f"op {op}": ", ".join(f"{device} {name}" for device, name in live.items())
            for op, live in implementations().items()
        },
        "cache": str(cache_folder()),
        "methods": ", ".join(METHODS),
        "models": f"{len(PROVEN)} types pass the parity suite; `lightedit env --models` lists them",
    }
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name.ljust(width)}  {value}")


def _models() -> None:
    print(f"{len(PROVEN)} model types pass the parity suite, in sizes without experts or gates after the MLP:")
    print(fill(", ".join(PROVEN), 100, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False))
    print(
        "Any other dense model is tried when it is loaded: its places are found and proven by short forward passes.\n"
    )
    refused = refusals()
    print(f"{len(refused)} types of transformers {_version('transformers')} are refused from their config.json:")
    width = max(map(len, refused))
    for kind, reason in refused.items():
        print(f"  {kind.ljust(width)}  {reason}")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
