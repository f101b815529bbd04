"""Tokens with shifted embeddings, such as those of a subject with noise, under ids of their own."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightedit.lm.hooks import first_input, hidden_of
from lightedit.lm.model import LanguageModel
from lightedit.lm.place import Place


class ShiftedTokens:
    """Further tokens of a model, each with the embedding of one of its tokens plus a shift.

    Their ids follow those of the embedding. Within `known`, the model runs rows of token ids that hold them, so all
    that works on token ids works with them too: prefix caches, padding, packed passes.

    Args:
        lm: the model.
    """

    def __init__(self, lm: LanguageModel) -> None:
        self._lm = lm
        self._first = lm.anatomy.shape(Place(0, "embedding"))[1]
        self._ids: list[int] = []
        self._shifts: list[Tensor] = []
        self._tables: tuple[Tensor, Tensor] | None = None

    def add(self, ids: Sequence[int], shifts: Tensor) -> list[int]:
        """The ids of new tokens: those of `ids`, with `shifts` [n, d] added to the embedding's output."""
        start = self._first + len(self._ids)
        self._ids += ids
        self._shifts += shifts.to(self._lm.device, self._lm.dtype)
        self._tables = None
        return list(range(start, start + len(ids)))

    def clear(self) -> None:
        """Forget all tokens; their ids are given again."""
        self._ids, self._shifts, self._tables = [], [], None

    @contextmanager
    def known(self) -> Iterator[None]:
        """Within the context, forward passes run rows with these tokens."""
        seen: dict[str, Tensor] = {}

        def enter(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            seen["ids"] = ids = first_input(args, kwargs)
            new = ids >= self._first
            if not new.any():
                return None
            bases, _shifts = self._both(ids.device)
            plain = ids.clone()
            plain[new] = bases[ids[new] - self._first]
            if args:
                return (plain, *args[1:]), kwargs
            return args, kwargs | {next(iter(kwargs)): plain}

        def leave(_: Any, __: Any, output: Any) -> Any:
            ids = seen["ids"]
            new = ids >= self._first
            if not new.any():
                return None
            whole = hidden_of(output).clone()
            whole[new] += self._both(ids.device)[1][ids[new] - self._first].to(whole)
            return (whole, *output[1:]) if isinstance(output, tuple) else whole

        module = self._lm.module(Place(0, "embedding"))
        handles = (
            module.register_forward_pre_hook(enter, with_kwargs=True),
            module.register_forward_hook(leave, prepend=True),
        )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _both(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The token of the vocabulary of each of the n tokens, [n], and its shift, [n, d]."""
        if self._tables is None:
            self._tables = torch.tensor(self._ids, device=device), torch.stack(self._shifts)
        return self._tables
