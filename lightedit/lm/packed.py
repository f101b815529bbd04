"""Rows of different lengths in one forward pass without padding: only attention sees that they are separate.

Everything in a transformer but attention treats tokens alone, so the tokens of many rows can be one long row for it.
Attention then goes span by span, a span being rows of one length, each with the prefix that precedes its rows.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel

from lightedit.lm.prefix import PrefixCache

_NAME = "lightedit_packed"


@dataclass(frozen=True)
class Span:
    """Consecutive tokens of a packed pass: `rows` rows of `length` tokens each.

    Attributes:
        rows: number of rows.
        length: tokens of each.
        cache: states of the rows' prefixes, if they have any.
        mask: what each token may attend to, [rows, 1, length, prefix + length].
    """

    rows: int
    length: int
    cache: PrefixCache | None
    mask: Tensor

    @classmethod
    def of(cls, mask: Tensor, length: int, cache: PrefixCache | None) -> "Span":
        """Build a span from the mask of real tokens, [rows, prefix + length], whose last `length` are all real."""
        total = mask.shape[1]
        causal = torch.ones(length, total, dtype=torch.bool, device=mask.device).tril(total - length)
        return cls(mask.shape[0], length, cache, mask[:, None, None, :] & causal)

    def visible(self, window: int | None) -> Tensor:
        """The mask, narrowed to the last `window` tokens where the layer's attention slides."""
        length, total = self.mask.shape[-2:]
        if window is None or window >= total:
            return self.mask
        near = torch.ones(length, total, dtype=torch.bool, device=self.mask.device).triu(total - length - window + 1)
        return self.mask & near


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    *,
    packed: list[Span],
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of packed tokens. query [1, heads, N, head_dim]; returns [1, N, heads, head_dim]."""
    groups = query.shape[1] // key.shape[1]
    outputs = []
    start = 0
    for span in packed:
        stop = start + span.rows * span.length
        q, k, v = (
            states[0, :, start:stop].unflatten(1, (span.rows, span.length)).transpose(0, 1)
            for states in (query, key, value)
        )  # [rows, heads, length, head_dim]
        if span.cache is not None:
            k, v = span.cache.update(k, v, module.layer_idx)  # type: ignore[arg-type]
        if groups > 1:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        output = F.scaled_dot_product_attention(q, k, v, attn_mask=span.visible(sliding_window), scale=scaling)
        outputs.append(output.transpose(1, 2).flatten(0, 1))
        start = stop
    return torch.cat(outputs)[None], None


AttentionInterface.register(_NAME, _attend)


@contextmanager
def packed_attention(model: PreTrainedModel) -> Iterator[None]:
    """Within the context, `model` takes its spans from the argument `packed` of its forward."""
    previous = model.config._attn_implementation
    model.config._attn_implementation = _NAME
    try:
        yield
    finally:
        model.config._attn_implementation = previous
