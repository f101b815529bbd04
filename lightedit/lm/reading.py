"""Where the prompts of a forward pass are: what adaptors decide by, once for each prompt."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from lightedit.lm.cache import PrefixCache
from lightedit.lm.hooks import first_input

Positions = Literal["all", "prompt", "last", "before"]
"""The tokens at which an adaptor changes outputs: all real ones, those of the prompt, its query token alone, or those
before the query token."""


@dataclass(frozen=True)
class Prompts:
    """The prompts of one forward pass of N tokens, which are counted row after row.

    Attributes:
        row: index of each token's row, [N].
        real: whether a token is no padding, [N].
        query: index of each row's query token, [rows]; None in a pass of later tokens, whose prompts a cache holds.
        kept: what adaptors keep of their decisions for later tokens of the rows, by id of the adaptor.
        whole: False in a pass that starts within prompts, whose query tokens are not known.
    """

    row: Tensor
    real: Tensor
    query: Tensor | None
    kept: dict[int, Any]
    whole: bool = True

    def at(self, positions: Positions) -> Tensor:
        """The tokens that `positions` names, [N] bool. In a pass of later tokens only "all" names some."""
        if positions == "all":
            return self.real
        if self.query is None:
            return torch.zeros_like(self.real)
        index = torch.arange(len(self.row), device=self.row.device)
        query = self.query[self.row]
        if positions == "last":
            return index == query
        return self.real & ((index <= query) if positions == "prompt" else (index < query))

    def of_rows(self, rows: Tensor) -> tuple["Prompts", Tensor]:
        """The prompts of some rows, [rows] bool, and the indices of their tokens, [n]."""
        rows = rows.to(self.row.device)
        tokens = rows[self.row].nonzero().flatten()
        number = rows.long().cumsum(0) - 1
        query = None
        if self.query is not None:
            place = torch.full_like(self.row, -1)
            place[tokens] = torch.arange(len(tokens), device=place.device)
            query = place[self.query[rows]]
        return Prompts(number[self.row[tokens]], self.real[tokens], query, self.kept, self.whole), tokens


class Reading:
    """Tells where the prompts are in the forward passes of one model.

    Each row of a pass is a prompt as a whole, unless `prompts_end` says where its prompt ends. A row's query token, by
    which adaptors decide, is the prompt's last one. A pass that goes on after a cache holds later tokens only.

    Another kind of model has a subclass, with another query token and other positions.

    Args:
        model: the transformers model.

    Attributes:
        positions: where adaptors change outputs unless they say otherwise. A causal model reads its answer at the
            prompt's last token.
    """

    positions: Positions = "last"

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._ends: Tensor | None = None
        self._pass: dict[str, Any] | None = None
        self._prompts: Prompts | None = None
        self._kept: WeakKeyDictionary[Any, dict[int, Any]] = WeakKeyDictionary()

    @contextmanager
    def prompts_end(self, at: Sequence[int] | Tensor) -> Iterator[None]:
        """Within the context, the prompt of row i ends with token `at[i]` of the row, padding counted."""
        before, self._ends = self._ends, torch.as_tensor(at, dtype=torch.long)
        try:
            yield
        finally:
            self._ends = before

    def install(self) -> Callable[[], None]:
        """Watch forward passes from now on; returns a function that ends it."""
        return self._model.register_forward_pre_hook(self._enter, with_kwargs=True).remove

    @property
    def prompts(self) -> Prompts:
        """The prompts of the pass in progress."""
        if self._prompts is None:
            self._prompts = self._found()
        return self._prompts

    def query(self, real: Tensor) -> Tensor:
        """The query token of each row that is a prompt as a whole: its last real one, [rows].

        Args:
            real: [rows, tokens], False at padding.
        """
        tokens = torch.arange(real.shape[1], device=real.device)
        return torch.where(real, tokens, 0).amax(1)

    def _enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = kwargs.get("input_ids")
        if given is None:
            given = kwargs.get("inputs_embeds")
        given = first_input(args, kwargs) if given is None else given
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        self._prompts = None
        self._pass = {
            "shape": given.shape[:2],
            "device": given.device,
            "mask": mask if isinstance(mask, Tensor) and mask.ndim == 2 else None,
            "spans": kwargs.get("packed"),
            "cache": None if cache is None else ref(cache),
            "before": 0 if cache is None else _length(cache, mask, given.shape[1]),
        }

    def _found(self) -> Prompts:
        assert self._pass is not None, "no forward pass was watched"
        seen = self._pass
        cache = None if seen["cache"] is None else seen["cache"]()
        spans = seen["spans"]
        whole = not (isinstance(cache, PrefixCache) or any(span.cache is not None for span in spans or ()))
        if spans is not None:
            return self._of_spans([(span.rows, span.length) for span in spans], seen["device"], whole)
        rows, tokens = seen["shape"]
        real = torch.ones(rows, tokens, dtype=torch.bool, device=seen["device"])
        if seen["mask"] is not None:
            real = seen["mask"][:, -tokens:].bool()
        row = torch.arange(rows, device=real.device).repeat_interleave(tokens)
        kept = {} if cache is None else self._kept.setdefault(cache, {})
        if seen["before"] or not whole:
            return Prompts(row, real.flatten(), None, kept, whole)
        ends = self.query(real) if self._ends is None else self._ends.to(real.device)
        return Prompts(row, real.flatten(), torch.arange(rows, device=real.device) * tokens + ends, kept)

    def _of_spans(self, rectangles: Sequence[tuple[int, int]], device: torch.device, whole: bool) -> Prompts:
        """The prompts of a packed pass, which has no padding."""
        lengths = torch.tensor([length for rows, length in rectangles for _ in range(rows)])
        starts = torch.tensor([0, *accumulate(lengths.tolist())])[:-1]
        ends = lengths - 1 if self._ends is None else self._ends.cpu()
        row = torch.arange(len(lengths)).repeat_interleave(lengths).to(device)
        return Prompts(row, torch.ones_like(row, dtype=torch.bool), (starts + ends).to(device), {}, whole)


def _length(cache: Any, mask: Any, tokens: int) -> int:
    """The tokens before those of the pass."""
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask.shape[1] - tokens
    return int(cache.get_seq_length())
