"""The prefix cache: attention keys and values of the tokens before the subject's last one, which no edit changes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin


@dataclass(frozen=True)
class Recurrent:
    """The states that layers without attention over all tokens carry on, as in Qwen3.5, LFM2 or Bamba.

    Attributes:
        convolved: index of a convolution in the layer -> its last inputs, [rows, channels, kernel].
        recurrent: index of a recurrence in the layer -> its state, [rows, ...].
    """

    convolved: Mapping[int, Tensor]
    recurrent: Mapping[int, Tensor]

    def rows(self, index: Tensor) -> "Recurrent":
        """The states of the rows `index` [n]."""
        return Recurrent(
            {i: state[index.to(state.device)] for i, state in self.convolved.items()},
            {i: state[index.to(state.device)] for i, state in self.recurrent.items()},
        )


def is_recurrent(config: Any) -> bool:
    """Whether a text model of this configuration has layers that carry states on instead of keys and values."""
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in DynamicCache(config=config).layers)


class PrefixCache(DynamicCache):
    """A read-only KV cache. `update` returns the prefix's states and the new ones together and stores nothing.

    Args:
        layers: key and value states of the prefix, each [rows, heads, prefix, head_dim]; None for a skipped layer, and
            for one without attention.
        length: number of prefix positions, left padding included.
        recurrent: states of layers that are recurrent, by layer.
    """

    def __init__(
        self,
        layers: Sequence[tuple[Tensor, Tensor] | None],
        length: int,
        recurrent: Mapping[int, Recurrent] | None = None,
    ) -> None:
        super().__init__()
        self.prefix = list(layers)
        self.length = length
        self.recurrent = dict(recurrent or {})

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        layer = self.prefix[layer_idx]
        if layer is None:
            raise RuntimeError(f"the prefix cache holds no states for layer {layer_idx}, which was to be skipped")
        return torch.cat([layer[0], key_states], dim=-2), torch.cat([layer[1], value_states], dim=-2)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        states = self.recurrent[layer_idx].convolved if layer_idx in self.recurrent else {}
        return states[state_idx].clone() if state_idx in states else None  # models write into it

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        states = self.recurrent[layer_idx].recurrent if layer_idx in self.recurrent else {}
        return states[state_idx].clone() if state_idx in states else None

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any) -> Tensor:
        previous = self.get_conv_state(layer_idx, state_idx)
        return conv_states if previous is None else torch.cat([previous, conv_states], dim=-1)

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any) -> Tensor:
        return recurrent_states

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return bool(self.recurrent)

    def is_recording_past(self, layer_idx: int) -> bool:
        return True  # else models take a path for single tokens that writes into the states

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
            [None if layer is None else (kept(layer[0]), kept(layer[1])) for layer in self.prefix],
            length,
            {layer: states.rows(index) for layer, states in self.recurrent.items()},
        )

    def before(self, position: int) -> "PrefixCache":
        """The cache of the first `position` positions, of a model without recurrent layers."""
        layers = [layer and (layer[0][:, :, :position], layer[1][:, :, :position]) for layer in self.prefix]
        return PrefixCache(layers, position)

    def without(self, layers: range) -> "PrefixCache":
        """The cache without the states of `layers`, whose blocks are skipped. This frees their memory."""
        return PrefixCache(
            [None if i in layers else layer for i, layer in enumerate(self.prefix)],
            self.length,
            {i: states for i, states in self.recurrent.items() if i not in layers},
        )

    @classmethod
    def of(cls, cache: DynamicCache, length: int) -> "PrefixCache":
        """What a model left in `cache` after `length` tokens, as a prefix."""
        prefix: list[tuple[Tensor, Tensor] | None] = []
        recurrent = {}
        for index, layer in enumerate(cache.layers):
            keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
            prefix.append(None if keys is None or values is None else (keys, values))
            if isinstance(layer, LinearAttentionCacheLayerMixin):
                recurrent[index] = Recurrent(_present(layer.conv_states), _present(layer.recurrent_states))
        return cls(prefix, length, recurrent)

    @classmethod
    def joined(cls, parts: "Sequence[PrefixCache]", length: int) -> "PrefixCache":
        """The rows of all `parts`, aligned to the right at `length` positions, then a row of zeros."""

        def together(states: Sequence[Tensor]) -> Tensor:
            return torch.cat([*states, torch.zeros_like(states[0][:1])])

        def widened(states: Tensor) -> Tensor:
            return F.pad(states, (0, 0, length - states.shape[-2], 0))

        prefix: list[tuple[Tensor, Tensor] | None] = []
        for layers in zip(*(part.prefix for part in parts), strict=True):
            pairs = [layer for layer in layers if layer is not None]
            keys, values = ([widened(pair[i]) for pair in pairs] for i in (0, 1))
            prefix.append((together(keys), together(values)) if pairs else None)
        recurrent = {
            layer: Recurrent(
                {i: together([part.recurrent[layer].convolved[i] for part in parts]) for i in first.convolved},
                {i: together([part.recurrent[layer].recurrent[i] for part in parts]) for i in first.recurrent},
            )
            for layer, first in parts[0].recurrent.items()
        }
        return cls(prefix, length, recurrent)


class RecordingCache(PrefixCache):
    """A cache that also keeps the states of the tokens of one pass.

    Args:
        prefix: the cache of the tokens before them; None if there are none.
        n_layers: blocks of the model.
    """

    def __init__(self, prefix: PrefixCache | None, n_layers: int) -> None:
        super().__init__([None] * n_layers if prefix is None else prefix.prefix, 0 if prefix is None else prefix.length)
        self._seen: list[tuple[Tensor, Tensor] | None] = [None] * n_layers

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        states = super().update(key_states, value_states, layer_idx) if self.length else (key_states, value_states)
        self._seen[layer_idx] = states
        return states

    def recorded(self) -> PrefixCache:
        """The states of prefix and pass as a prefix; the pass must have run."""
        length = max(layer[0].shape[-2] for layer in self._seen if layer is not None)
        return PrefixCache(self._seen, length)


def _present(states: Mapping[int, Tensor | None]) -> dict[int, Tensor]:
    return {index: state for index, state in states.items() if state is not None}
