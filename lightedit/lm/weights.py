"""The changes of one model. Weights are recomputed from a kept base, so every edit can be reverted exactly."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lightedit.errors import ArgumentError, UnsupportedModelError
from lightedit.lm.anatomy import Anatomy
from lightedit.lm.changes import Adaptor, Change, DenseUpdate, LowRankUpdate, total
from lightedit.lm.hooks import install
from lightedit.lm.place import Place
from lightedit.lm.reading import Reading
from lightedit.ops import add_low_rank_
from lightedit.ops.add_low_rank import sum_dtype

Owner = tuple[str, int]
"""Owner of a change: (id of the edit, index of its round)."""


class _Materialised:
    """One tensor of the model, kept as cast(base + sum of its changes).

    Args:
        live: the tensor in the model.
    """

    def __init__(self, live: Tensor) -> None:
        self.base = live.clone()
        self._sum: Tensor | None = None  # base + changes in a wider dtype, if the live tensor's is narrower

    def reset(self, live: Tensor) -> None:
        """Set `live` to the base."""
        live.copy_(self.base)
        self._sum = None

    def add(self, live: Tensor, update: LowRankUpdate | Tensor) -> None:
        """Add a low-rank update, or a dense one of the live tensor's shape."""
        if self._sum is None and live.dtype != sum_dtype(live):
            self._sum = self.base.to(sum_dtype(live))
        if isinstance(update, LowRankUpdate):
            add_low_rank_(live, update.left.to(live.device), update.right.to(live.device), self._sum)
        elif self._sum is None:
            live.add_(update.to(live))
        else:
            self._sum.add_(update.to(self._sum))
            live.copy_(self._sum)


class EditedWeights:
    """The changed places of one model: matrices and biases as cast(base + sum of their updates), and adaptors.

    The base is kept in the model's dtype, the sum in float32 (float64 for a float64 model). So rounding errors of a
    bfloat16 model do not grow with the rounds, and a matrix without updates equals the base bit for bit. The same
    updates in the same order give the same bits. Adaptors of one place run in the order in which they were added.

    Args:
        anatomy: the model's places.
        reading: where the prompts of the model's forward passes are.

    Attributes:
        made_on: id of an edit -> ids of the edits that the model carried when it was made, for edits seen so far.
    """

    def __init__(self, anatomy: Anatomy, reading: Reading) -> None:
        self._anatomy, self._reading = anatomy, reading
        self.made_on: dict[str, tuple[str, ...]] = {}
        self._weights: dict[Place, _Materialised] = {}
        self._biases: dict[Place, _Materialised] = {}
        self._changes: dict[Place, list[tuple[Owner, Change]]] = {}
        self._hooks: dict[Place, Callable[[], None]] = {}  # each removes the hooks of a place's adaptors
        self._running: dict[Place, list[tuple[str, Adaptor]]] = {}  # (edit, adaptor), rounds of an edit as one
        self._lifted = False
        self._lifted_edit: str | None = None

    @property
    def owners(self) -> list[Owner]:
        """The active edits and their rounds, oldest first."""
        return list(dict.fromkeys(owner for changes in self._changes.values() for owner, _ in changes))

    @property
    def edits(self) -> list[str]:
        """Ids of the active edits, oldest first."""
        return list(dict.fromkeys(edit for edit, _ in self.owners))

    @property
    def places(self) -> list[Place]:
        """The places that carry changes."""
        return sorted(self._changes)

    def base(self, place: Place) -> Tensor:
        """The unedited matrix of `place`, [d_out, d_in]."""
        return self._weights[place].base if place in self._weights else self._anatomy.weight(place)

    def adaptors(self, place: Place) -> list[Adaptor]:
        """The active adaptors of `place`, in the order in which they run."""
        return [change for _, change in self._changes.get(place, []) if isinstance(change, Adaptor)]

    def adaptor(self, place: Place, edit: str) -> Adaptor | None:
        """What the rounds of one edit run at `place`, as one adaptor; the last one's, if they do not run as one."""
        return next((each for of, each in reversed(self._running.get(place, [])) if of == edit), None)

    @property
    def reads_prompts(self) -> Place | None:
        """A place with an adaptor that decides by the prompts of a pass; None without one."""
        running = ((place, each) for place, adaptors in self._running.items() for _, each in adaptors)
        return next((place for place, adaptor in running if adaptor.reads_prompts), None)

    def change(self, place: Place) -> LowRankUpdate | DenseUpdate:
        """The sum of all active changes of the matrix and bias of `place`, float32 or wider, on the CPU.

        It is low-rank if all of them are.

        Raises:
            KeyError: the place carries no change.
            ArgumentError: the place carries an adaptor, which no change of a matrix equals.
        """
        changes = [change for _, change in self._changes[place]]
        if self.adaptors(place):
            raise ArgumentError(f"{place} carries an adaptor, which no change of its matrix equals")
        return total([change.to("cpu") for change in changes])

    @torch.no_grad()
    def add(self, owner: Owner, place: Place, change: Change) -> None:
        """Apply `change` to `place` on behalf of `owner`. On an error nothing is changed.

        Raises:
            ArgumentError: the change does not fit the place.
            UnsupportedModelError: the place has no matrix or bias that can be written.
        """
        change.check(place, self._anatomy.shape(place))
        live = [self._live(place, name) for name in ("weight", "bias") if _writes(change, name)]
        for table, tensor in live:
            if place not in table:
                table[place] = _Materialised(tensor)
        self._changes.setdefault(place, []).append((owner, change))
        self._apply(owner, place, change)

    @torch.no_grad()
    def remove(self, owners: Collection[Owner]) -> None:
        """Undo the changes of `owners`. Other changes stay, in their order."""
        for place, changes in list(self._changes.items()):
            kept = [(owner, change) for owner, change in changes if owner not in owners]
            if len(kept) == len(changes):
                continue
            for name, table in (("weight", self._weights), ("bias", self._biases)):
                if place in table:
                    table[place].reset(self._live(place, name)[1])
                    if not any(_writes(change, name) for _, change in kept):
                        del table[place]
            self._changes[place] = kept
            self._running.pop(place, None)
            for owner, change in kept:
                self._apply(owner, place, change)
            if place not in self._running and place in self._hooks:
                self._hooks.pop(place)()
            if not kept:
                del self._changes[place]

    @contextmanager
    def unedited(self) -> Iterator[None]:
        """Within the context, the model is unedited. Afterwards its changes are restored bit for bit."""
        tables = (("weight", self._weights), ("bias", self._biases))
        lives = [(self._live(place, name)[1], kept.base) for name, table in tables for place, kept in table.items()]
        edited = [live.clone() for live, _ in lives]
        lifted, self._lifted = self._lifted, True
        for live, base in lives:
            live.copy_(base)
        try:
            yield
        finally:
            self._lifted = lifted
            for (live, _), tensor in zip(lives, edited, strict=True):
                live.copy_(tensor)

    @contextmanager
    def without_adaptors(self, edit: str) -> Iterator[None]:
        """Within the context, the adaptors of one edit do not act."""
        before, self._lifted_edit = self._lifted_edit, edit
        try:
            yield
        finally:
            self._lifted_edit = before

    def _live(self, place: Place, name: str) -> tuple[dict[Place, _Materialised], Tensor]:
        """The live weight or bias of `place`, and the table that keeps its base."""
        if name == "weight":
            return self._weights, self._anatomy.weight(place)
        bias = self._anatomy.bias(place)
        if bias is None:
            raise UnsupportedModelError(f"{place} has no bias, so a change of it cannot be written; change the weight")
        return self._biases, bias

    def _apply(self, owner: Owner, place: Place, change: Change) -> None:
        if isinstance(change, Adaptor):
            self._run(owner[0], place, change)
            if place not in self._hooks:
                self._hooks[place] = self._install(place)
            return
        for name in ("weight", "bias"):
            if _writes(change, name):
                table, live = self._live(place, name)
                part = change if isinstance(change, LowRankUpdate) else getattr(change, name)
                table[place].add(live, part)

    def _run(self, edit: str, place: Place, adaptor: Adaptor) -> None:
        """Let `adaptor` run at `place`, as one with the adaptor of the edit's earlier rounds where they can."""
        device = next(self._anatomy.module(place).parameters()).device
        adaptor = adaptor if device.type == "meta" else adaptor.to(device)  # an offloaded module's weights are there
        running = self._running.setdefault(place, [])
        own = [number for number, (of, _) in enumerate(running) if of == edit]
        if own and (both := adaptor.after(running[own[-1]][1])) is not None:
            running[own[-1]] = (edit, both)
        else:
            running.append((edit, adaptor))

    def _install(self, place: Place) -> Callable[[], None]:
        """Install the hooks of a place's adaptors; returns a function that removes them."""
        unwatch = self._reading.install()
        remove = install(self._anatomy.port(place), lambda *states: self._adapted(place, *states))

        def both() -> None:
            remove()
            unwatch()

        return both

    def _adapted(self, place: Place, inputs: Tensor, output: Tensor) -> Tensor:
        for edit, adaptor in [] if self._lifted else self._running[place]:
            if edit != self._lifted_edit:
                output = adaptor(inputs, output, self._reading.prompts)
        return output


def _writes(change: Change, name: str) -> bool:
    """Whether `change` writes the place's "weight" or "bias"."""
    if isinstance(change, DenseUpdate):
        return getattr(change, name) is not None
    return isinstance(change, LowRankUpdate) and name == "weight"
