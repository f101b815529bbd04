"""The prefix cache: attention keys and values of the tokens before the subject's last one, which no edit changes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache


class PrefixCache(DynamicCache):
    """A read-only KV cache. `update` returns the prefix's states and the new ones together and stores nothing.

    Args:
        layers: key and value states of the prefix, each [rows, heads, prefix, head_dim]; None for a skipped layer.
        length: number of prefix positions, left padding included.
    """

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor] | None], length: int) -> None:
        super().__init__()
        self.prefix = list(layers)
        self.length = length

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        layer = self.prefix[layer_idx]
        if layer is None:
            raise RuntimeError(f"the prefix cache holds no states for layer {layer_idx}, which was to be skipped")
        return torch.cat([layer[0], key_states], dim=-2), torch.cat([layer[1], value_states], dim=-2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.length + query_length, 0

    def rows(self, index: Tensor, length: int | None = None) -> "PrefixCache":
        """The cache of the rows `index` [n], cut to the last `length` positions; None keeps all positions."""
        length = self.length if length is None else length
        start = self.length - length

        def kept(states: Tensor) -> Tensor:
            return states[index.to(states.device), :, start:]

        return PrefixCache(
            [None if layer is None else (kept(layer[0]), kept(layer[1])) for layer in self.prefix], length
        )

    def without(self, layers: range) -> "PrefixCache":
        """The cache without the states of `layers`, whose blocks are skipped. This frees their memory."""
        return PrefixCache([None if i in layers else layer for i, layer in enumerate(self.prefix)], self.length)
