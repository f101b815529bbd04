"""`lightedit env`."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from lightedit.lm.architectures import ARCHITECTURES
from lightedit.lm.loading import cache_folder
from lightedit.methods import METHODS
from lightedit.ops import NATIVE_STATUS, implementations


def env() -> None:
    """Show versions, devices, the implementation of each op, architectures, methods, and the cache folder."""
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
        "architectures": ", ".join(sorted(ARCHITECTURES)),
    }
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name.ljust(width)}  {value}")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
