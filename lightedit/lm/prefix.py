"""Computing the prefix cache: tokens before the subject's last token are run once and kept as a KV cache."""

from collections.abc import Iterator, Sequence
from itertools import groupby, takewhile

import torch
from torch import Tensor
from transformers import DynamicCache

from lightedit.lm.batch import Batch, pad, rectangles
from lightedit.lm.cache import PrefixCache
from lightedit.lm.hooks import stop_after
from lightedit.lm.model import LanguageModel

_PREFIX_TOKENS = 1024  # tokens of one pass over prefixes at most
# A common beginning (stem) is run once if it has at least 4 tokens and this saves more than 100 tokens in all
_STEM_TOKENS, _STEM_SAVING = 4, 100


@torch.no_grad()
def prefix_cache(lm: LanguageModel, rows: Sequence[Sequence[int]]) -> tuple[PrefixCache | None, Tensor]:
    """Run the prefixes of all rows and keep their attention keys and values.

    Args:
        lm: the model.
        rows: prefix token ids; lengths may differ and some may be empty.

    Returns:
        The cache (None if all prefixes are empty), and the mask of real prefix tokens, [rows, prefix], padded on the
        left.
    """
    width = max(map(len, rows))
    mask = torch.tensor([[width - len(row) <= i for i in range(width)] for row in rows], device=lm.device)
    if not width:
        return None, mask.reshape(len(rows), 0)
    if lm.is_recurrent:
        return _recurrent_prefixes(lm, rows, width), mask
    stems: list[tuple[int, ...]] = []
    texts: list[tuple[tuple[int, ...], int]] = []  # each distinct row, and the index of its stem or -1
    for stem, members in _stems(sorted(set(map(tuple, rows)))):
        texts += [(member, len(stems) if stem else -1) for member in members]
        stems += [stem] if stem else []
    common = _prefix_states(lm, stems, max(map(len, stems))) if stems else None
    order: list[tuple[int, ...]] = []
    parts: list[list[tuple[Tensor, Tensor]]] = []
    for alone in (True, False):  # rows without a stem, then rows that continue a stem
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
    lm: LanguageModel,
    rows: Sequence[Sequence[int]],
    width: int,
    stems: PrefixCache | None = None,
    stem_lengths: Sequence[int] | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Attention keys and values of each layer, each [rows, heads, width, head_dim], aligned to the right.

    States left of a row's tokens have no meaning; the caller masks them.

    Args:
        lm: the model.
        rows: token ids.
        width: number of positions to return.
        stems: keys and values of each row's stem, aligned to the right.
        stem_lengths: tokens of each row's stem.
    """
    before = 0 if stems is None else stems.length
    known = torch.tensor(stem_lengths or [0] * len(rows))
    # an empty row runs one padding token, whose states the caller masks
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


def _recurrent_prefixes(lm: LanguageModel, rows: Sequence[Sequence[int]], width: int) -> PrefixCache:
    """The prefix cache of a model with recurrent layers, whose states padding would change: none is run.

    A row without a prefix gets states of zeros, with which such layers start.
    """
    distinct = sorted({tuple(row) for row in rows if len(row)}, key=len)
    parts = []
    for length, group in groupby(distinct, key=len):
        batch = pad(list(group), lm.pad_id)
        cache = DynamicCache(config=lm.model.config.get_text_config(decoder=True))
        with stop_after(lm.blocks[-1]):
            lm.forward(batch, cache=cache)
        parts.append(PrefixCache.of(cache, length))
    place = {row: index for index, row in enumerate(distinct)}
    index = torch.tensor([place.get(tuple(row), len(distinct)) for row in rows])  # the last is a row of zeros
    return PrefixCache.joined(parts, width).rows(index)


def _stems(rows: Sequence[tuple[int, ...]]) -> Iterator[tuple[tuple[int, ...], list[tuple[int, ...]]]]:
    """Group sorted rows by a common beginning, such as a context, and yield each stem with its rows.

    A stem is shorter than each of its rows. Rows without a stem that is worth computing once come last, with an empty
    stem.
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
