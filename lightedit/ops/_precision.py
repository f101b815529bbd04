"""Products of float32 that stay such, whatever precision torch is told to use for the model's."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch


def whole_float32(device: torch.device) -> AbstractContextManager[None]:
    """Within the context, vendor's products on a GPU do not round float32 to TF32; for the whole process.

    On the CPU, and where TF32 is off, which it is by default, nothing is changed.
    """
    if device.type != "cuda" or torch.backends.cuda.matmul.fp32_precision != "tf32":
        return nullcontext()
    return _without_tf32()


@contextmanager
def _without_tf32() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before
