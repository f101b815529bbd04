"""Packed passes: rows of different lengths in one forward pass, without padding.

All of a transformer but attention treats each token separately, so the tokens of many rows can form one long row.
Attention runs span by span. A span is several rows of one length, with the prefix cache of these rows.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel

from lightedit.lm.cache import PrefixCache

_NAME = "lightedit_packed"
# Arguments that say nothing which the spans do not say, or nothing in evaluation
_KNOWN = (
    *("dropout", "position_ids", "use_cache", "is_causal", "cache_position"),
    *("output_attentions", "output_hidden_states", "return_dict"),
)


class NotPackableError(TypeError):
    """Attention that asks for something which packed attention does not do."""


@dataclass(frozen=True)
class Span:
    """Consecutive tokens of a packed pass: `rows` rows of `length` tokens each.

    Attributes:
        rows: number of rows.
        length: tokens of each.
        cache: prefix cache of the rows, if they have prefixes.
        mask: additive attention mask, [rows, 1, length, prefix + length]: 0 where a token may attend, else -infinity.
        positions: position of each token in its text, [rows or 1, prefix + length]. Only differences count.
    """

    rows: int
    length: int
    cache: PrefixCache | None
    mask: Tensor
    positions: Tensor

    @classmethod
    def of(cls, mask: Tensor, length: int, cache: PrefixCache | None, dtype: torch.dtype) -> "Span":
        """Build a span from the mask of real tokens, [rows, prefix + length]; the last `length` are all real."""
        total = mask.shape[1]
        causal = torch.ones(length, total, dtype=torch.bool, device=mask.device).tril(total - length)
        seen = mask[:, None, :] & causal
        return cls(len(mask), length, cache, _additive(seen, dtype), torch.arange(total, device=mask.device)[None])

    @classmethod
    def of_trees(cls, seen: Tensor, positions: Tensor, dtype: torch.dtype) -> "Span":
        """Build a span of rows that each hold several texts with a common beginning.

        Args:
            seen: [rows, length, length] bool; entry (i, j) is True if token j is token i or precedes it in a text.
            positions: position of each token in its texts, [rows, length].
            dtype: dtype of the mask.
        """
        return cls(len(seen), seen.shape[1], None, _additive(seen, dtype), positions)

    @classmethod
    def of_alternatives(cls, mask: Tensor, length: int, cache: PrefixCache | None, dtype: torch.dtype) -> "Span":
        """Build a span of rows that each hold `length` alternatives of one token, which follows the row's prefix.

        Each alternative sees the prefix and itself. They share the prefix's keys and values, which are not copied.

        Args:
            mask: real tokens of the prefix, [rows, prefix]; padding is on the left.
            length: number of alternatives.
            cache: prefix cache of the rows, if they have prefixes.
            dtype: dtype of the mask.
        """
        rows, before = mask.shape
        itself = torch.eye(length, dtype=torch.bool, device=mask.device).expand(rows, -1, -1)
        seen = torch.cat([mask[:, None, :].expand(-1, length, -1), itself], dim=2)
        positions = torch.arange(before + length, device=mask.device).clamp(max=before)
        return cls(rows, length, cache, _additive(seen, dtype), positions[None])

    def visible(self, window: int | None) -> Tensor:
        """The mask, cut to the last `window` tokens of a layer with sliding-window attention; None for all."""
        if window is None or window >= self.mask.shape[-1]:
            return self.mask
        distance = self.positions[:, -self.length :, None] - self.positions[:, None, :]
        return self.mask.masked_fill((distance >= window)[:, None], -torch.inf)


def _has_window(module: nn.Module) -> bool:
    """Whether the attention of this layer sees a part of the text only, as far as its configuration says."""
    config = getattr(module, "config", None)
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return kinds[module.layer_idx] != "full_attention"
    return getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """The additive mask [rows, 1, length, total] of a boolean one [rows, length, total]."""
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill_(~seen, -torch.inf)[:, None]


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
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention over packed tokens. Takes query [1, heads, N, head_dim] and returns [1, N, heads, head_dim].

    Raises:
        NotPackableError: the model asks for more, such as a soft-cap or sinks, or keeps its sliding window to itself.
    """
    asked = [name for name, value in others.items() if name not in _KNOWN and value is not None and value is not False]
    if attention_mask is not None:
        asked.append("a mask or bias of its own")
    if asked or (sliding_window is None and _has_window(module)):
        raise NotPackableError(f"{type(module).__name__} asks for {', '.join(asked) or 'a window by its mask alone'}")
    groups = query.shape[1] // key.shape[1]
    sizes = [span.rows * span.length for span in packed]
    outputs = []
    # split, because the backward pass of each slice would fill a whole tensor with zeros
    for span, q, k, v in zip(packed, *(states[0].split(sizes, dim=1) for states in (query, key, value)), strict=True):
        # [rows, key heads, length, head_dim]; query heads that share a key head are concatenated to one longer query
        q = q.unflatten(1, (span.rows, span.length)).unflatten(0, (-1, groups)).permute(2, 0, 1, 3, 4).flatten(2, 3)
        k, v = (states.unflatten(1, (span.rows, span.length)).transpose(0, 1) for states in (k, v))
        if span.cache is not None:
            k, v = span.cache.update(k, v, module.layer_idx)
        mask = span.visible(sliding_window).to(q.device).repeat(1, 1, groups, 1)
        output = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
        output = output.unflatten(2, (groups, span.length)).permute(0, 3, 1, 2, 4)  # [rows, length, heads.., head_dim]
        outputs.append(output.flatten(2, 3).flatten(0, 1))
    return torch.cat(outputs)[None], None


AttentionInterface.register(_NAME, _attend)


@contextmanager
def packed_attention(model: PreTrainedModel) -> Iterator[None]:
    """Within the context, the attention of `model` reads its spans from the argument `packed` of `forward`."""
    config = model.config.get_text_config(decoder=True)
    previous = config._attn_implementation
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = previous
