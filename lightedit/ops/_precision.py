"""Products of float32 that stay such, whatever precision torch is told to use for the model's."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

# torch's switches for them
_PRODUCTS: dict[str, Any] = {
    "cuda": torch.backends.cuda.matmul,
    "cpu": torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]
}


def whole_float32(device: torch.device) -> AbstractContextManager[None]:
    """Within the context, vendors' products on `device` do not round float32; for the whole process.

    `torch.set_float32_matmul_precision` and its like let them round to TF32 on a GPU, and to bfloat16 on a CPU that
    multiplies such. By default they do not, and nothing is changed.
    """
    products = _PRODUCTS.get(device.type)
    if products is None or products.fp32_precision not in ("tf32", "bf16"):
        return nullcontext()
    return _unrounded(products)


@contextmanager
def _unrounded(products: Any) -> Iterator[None]:
    before = products.fp32_precision
    products.fp32_precision = "ieee"
    try:
        yield
    finally:
        products.fp32_precision = before
