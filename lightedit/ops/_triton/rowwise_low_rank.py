"""The row-wise low-rank product in Triton: two small products, with the sums between them in float32."""

import torch
from torch import Tensor

from lightedit.ops._triton.product import product
from lightedit.ops.rowwise_low_rank import reference


def run(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """`rowwise_low_rank` for x of float16, bfloat16 and float32; a float64 x goes to the reference."""
    if x.dtype == torch.float64:
        return reference(x, left, right)
    return product(product(x, right, torch.float32), left.mT, x.dtype)
