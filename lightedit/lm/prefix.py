"""Keys and values of tokens that an edit cannot change, computed once and put before every later forward pass."""

from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from lightedit.lm.batch import Batch, pad, rectangles
from lightedit.lm.hooks import stop_after

if TYPE_CHECKING:
    from lightedit.lm.model import LanguageModel

_PREFIX_TOKENS = 1024  # tokens of one pass over prefixes at most
# A beginning is run once for all rows that share it if it has this many tokens, and if that saves so many in all
_STEM_TOKENS, _STEM_SAVING = 4, 100


class PrefixCache(DynamicCache):
    """A read-only attention cache: every `update` returns prefix and new states together and stores nothing.

    Args:
        layers: key and value states of the prefix, each [rows, heads, prefix, head_dim]; None where a layer is skipped.
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
        """The cache of the rows `index` [n] alone, and of the last `length` positions if that is given."""
        length = self.length if length is None else length
        start = self.length - length

        def kept(states: Tensor) -> Tensor:
            return states[index.to(states.device), :, start:]

        return PrefixCache(
            [None if layer is None else (kept(layer[0]), kept(layer[1])) for layer in self.prefix], length
        )

    def without(self, layers: range) -> "PrefixCache":
        """The cache without the states of `layers`, to free memory once their blocks are skipped."""
        return PrefixCache([None if i in layers else layer for i, layer in enumerate(self.prefix)], self.length)


@torch.no_grad()
def prefix_cache(lm: "LanguageModel", rows: Sequence[Sequence[int]]) -> tuple[PrefixCache | None, Tensor]:
    """Run the tokens that every later pass shares.

    Args:
        rows: prefix token ids; lengths may differ and some may be empty.

    Returns:
        The cache (None if all prefixes are empty) and the prefix's mask, [rows, prefix], padded on the left.
    """
    width = max(map(len, rows))
    mask = torch.tensor([[width - len(row) <= i for i in range(width)] for row in rows], device=lm.device)
    if not width:
        return None, mask.reshape(len(rows), 0)
    stems: list[tuple[int, ...]] = []
    texts: list[tuple[tuple[int, ...], int]] = []  # every distinct row, and the number of its stem or -1
    for stem, members in _stems(sorted(set(map(tuple, rows)))):
        texts += [(member, len(stems) if stem else -1) for member in members]
        stems += [stem] if stem else []
    common = _prefix_states(lm, stems, max(map(len, stems))) if stems else None
    order: list[tuple[int, ...]] = []
    parts: list[list[tuple[Tensor, Tensor]]] = []
    for alone in (True, False):  # rows with a stem are continued from it
        chosen = [(row, stem) for row, stem in texts if (stem < 0) == alone]
        lengths = [len(row) - (0 if alone else len(stems[stem])) for row, stem in chosen]
        for group in rectangles(lengths, _PREFIX_TOKENS) if chosen else []:
            members = [chosen[i][0] for i in group]
            if alone or common is None:
                parts.append(_prefix_states(lm, members, width))
            else:
                index = torch.tensor([chosen[i][1] for i in group])
                cache = PrefixCache(common, common[0][0].shape[-2]).rows(index)
                parts.append(_prefix_states(lm, members, width, cache, [len(stems[i]) for i in index.tolist()]))
            order += members
    place = {row: position for position, row in enumerate(order)}
    index = torch.tensor([place[tuple(row)] for row in rows])
    layers = []
    for states in zip(*parts, strict=True):
        keys, values = (torch.cat(part).index_select(0, index.to(part[0].device)) for part in zip(*states, strict=True))
        layers.append((keys, values))
    return PrefixCache(layers, width), mask


def _prefix_states(
    lm: "LanguageModel",
    rows: Sequence[Sequence[int]],
    width: int,
    stems: PrefixCache | None = None,
    stem_lengths: Sequence[int] | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Attention keys and values of every layer, each [rows, heads, width, head_dim], aligned to the right.

    Args:
        rows: token ids; what stands left of a row is of no meaning, and for the caller to mask.
        width: positions to return.
        stems: the states of what each row begins with, aligned to the right.
        stem_lengths: how many tokens that is.
    """
    before = 0 if stems is None else stems.length
    known = torch.tensor(stem_lengths or [0] * len(rows))
    # an empty row, too, runs one token: the whole of it is masked
    rest = pad([row[int(n) :] or [lm.pad_id] for row, n in zip(rows, known, strict=True)], lm.pad_id)
    batch = Batch(
        rest.ids,
        torch.cat([torch.arange(before) >= before - known[:, None], rest.mask], dim=1),
        rest.positions + known[:, None],
    )
    tokens = torch.arange(width) - (width - torch.tensor([len(row) for row in rows]))[:, None]  # [rows, width]
    index = (tokens.clamp(min=0) + before - known[:, None])[:, None, :, None]
    states: dict[int, tuple[Tensor, Tensor]] = {}

    class _Recorder(PrefixCache):
        def update(self, key_states, value_states, layer_idx, *_, **__):  # type: ignore[no-untyped-def]
            if before:
                key_states, value_states = super().update(key_states, value_states, layer_idx)
            places = index.to(key_states.device)
            states[layer_idx] = (
                key_states.take_along_dim(places, dim=-2),
                value_states.take_along_dim(places, dim=-2),
            )
            return key_states, value_states

    with stop_after(lm.blocks[-1]):
        lm.forward(batch, cache=_Recorder([] if stems is None else stems.prefix, before))
    return [states[layer] for layer in range(lm.n_layers)]


def _stems(rows: Sequence[tuple[int, ...]]) -> Iterator[tuple[tuple[int, ...], list[tuple[int, ...]]]]:
    """Split sorted rows into runs with a common beginning worth computing once, such as a context; yields both.

    A stem is shorter than each of its rows. Rows that share nothing much come with an empty stem.
    """
    alone: list[tuple[int, ...]] = []
    start = 0
    while start < len(rows):
        stem, stop = rows[start][:-1], start + 1
        while stop < len(rows):
            pairs = zip(stem, rows[stop][:-1], strict=False)
            shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            if shared < _STEM_TOKENS:
                break
            stem, stop = stem[:shared], stop + 1
        if (stop - start - 1) * len(stem) > _STEM_SAVING:
            yield stem, list(rows[start:stop])
        else:
            alone += rows[start:stop]
        start = stop
    if alone:
        yield (), alone
