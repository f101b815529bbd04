"""Adaptors that mix their own output with the place's by a learned share: the base of Defer and Memory."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from lightedit.errors import NumericalError
from lightedit.lm.changes import Adaptor
from lightedit.lm.hooks import OutputChange
from lightedit.lm.prompt_adaptor import PromptAdaptor, same_device
from lightedit.lm.reading import Positions
from lightedit.lm.rowwise import RowwiseEdits
from lightedit.methods.adaptors.editor import AdaptorEditor, Watch, check_finite
from lightedit.methods.adaptors.method import Adapting
from lightedit.methods.adaptors.rows import Rows, losses, rows_of

_BYTES = 2**32  # of the adaptors of facts that are each edited alone


class SoftAdaptor(PromptAdaptor):
    """An adaptor whose output is mixed with the place's own while it is trained. Afterwards a row has one or the other.

    A later round's replaces that of an earlier one.
    """

    @abstractmethod
    def mixed(self, queries: Tensor, output: Tensor) -> Tensor:
        """The output of training, [rows, tokens, d_out], given the queries [rows, d_in]."""

    def after(self, earlier: Adaptor) -> "SoftAdaptor | None":
        return self if type(earlier) is type(self) else None

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        moved = {name: same_device(tensor, device, dtype) for name, tensor in self.tensors().items()}
        return self.from_tensors(moved, self.settings())


class SoftEditor(AdaptorEditor):
    """The editor of `Soft` methods: the facts of a round train the adaptor together."""

    method: "Soft"

    def taught(self, indices: Sequence[int], present: Adaptor | None, watch: Watch) -> SoftAdaptor:
        method = self.method
        prompts = [self.prompts[index] for index in indices]
        rows = list(rows_of(self.lm, self.place, prompts, self.settings.max_tokens))
        d_out, d_in = self.lm.anatomy.shape(self.place)
        start = present if isinstance(present, SoftAdaptor) else method.fresh(d_in, d_out, method.replaced(self.lm))
        start = start.to(rows[0].queries.device, torch.promote_types(self.lm.dtype, torch.float32))
        parts = {name: tensor.detach().clone().requires_grad_() for name, tensor in start.tensors().items()}
        adam = torch.optim.Adam(list(parts.values()), lr=method.lr)
        masks = [group.at(start.positions)[..., None] for group in rows]
        for step in range(method.steps):
            adam.zero_grad()
            adaptor = start.from_tensors(parts, start.settings())
            for group, mask in zip(rows, masks, strict=True):
                self._backward(group, adaptor, mask, len(indices))
            adam.step()
            watch((step + 1) / method.steps)
        return start.from_tensors({name: tensor.detach() for name, tensor in parts.items()}, start.settings())

    @torch.enable_grad()
    def _backward(self, rows: Rows, adaptor: SoftAdaptor, mask: Tensor, facts: int) -> None:
        """Add the gradients of the rows' share of the mean loss over `facts` facts."""
        loss = losses(self.lm, self.place, rows, _mixing(adaptor, rows.queries, mask)).sum() / facts
        if not torch.isfinite(loss):
            raise NumericalError(
                f"the loss of {facts} facts is {loss.item()}; lower lr ({self.method.lr}), or load the model in float32"
            )
        loss.backward()

    # Facts that are each edited alone

    @property
    def most_separate(self) -> int:
        """Facts whose adaptors fit into 4 GiB."""
        d_out, d_in = self.lm.anatomy.shape(self.place)
        fresh = self.method.fresh(d_in, d_out, self.method.replaced(self.lm))
        return max(1, _BYTES // sum(tensor.nbytes for tensor in fresh.tensors().values()))

    def separate(self, indices: Sequence[int]) -> RowwiseEdits:
        taught = []
        for done, index in enumerate(indices):
            self._at_work = float(done)
            self.watch()
            taught.append(self.taught([index], None, lambda _: None))
            check_finite(self.place, taught[-1])
        self._at_work = 0.0
        return RowwiseEdits({}, torch.arange(len(indices)), {self.place: taught})


@dataclass(frozen=True)
class Soft(Adapting):
    """Base of the methods that train one adaptor on all facts."""

    editor_type: ClassVar[type[SoftEditor]] = SoftEditor

    @abstractmethod
    def fresh(self, d_in: int, d_out: int, positions: Positions) -> SoftAdaptor:
        """The untrained adaptor."""


def uniform(generator: torch.Generator, d_in: int, *shape: int) -> Tensor:
    """Uniform numbers in ±1 / √d_in, as a linear layer starts with."""
    return (2 * torch.rand(shape, generator=generator) - 1) / d_in**0.5


def _mixing(adaptor: SoftAdaptor, queries: Tensor, mask: Tensor) -> OutputChange:
    return lambda _, output: torch.where(mask, adaptor.mixed(queries, output).to(output), output)
