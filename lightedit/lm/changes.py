"""Changes of one place of a model: a low-rank or dense update of its matrix, or an adaptor behind it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from lightedit.errors import ArgumentError
from lightedit.lm.place import Place
from lightedit.lm.reading import Prompts

_KINDS: dict[str, type["Change"]] = {}


class Change(ABC):
    """A change of one place. A subclass that sets `kind` is registered under it, and `change_from` reads it back.

    Attributes:
        kind: the subclass's name in files.
    """

    kind: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if (kind := cls.__dict__.get("kind")) is None:
            return
        known = _KINDS.setdefault(kind, cls)
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ArgumentError(f"kind {kind!r} is that of {known.__qualname__}; give {cls.__qualname__} another")
        _KINDS[kind] = cls

    @abstractmethod
    def check(self, place: Place, shape: tuple[int, int]) -> None:
        """Raise ArgumentError unless the change fits `place`, whose (d_out, d_in) is `shape`."""

    @abstractmethod
    def norm(self) -> float:
        """The Frobenius norm of what the change adds to weight and bias; of its parameters if it is an adaptor."""

    @abstractmethod
    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        """The change on `device`, in `dtype` if one is given."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The tensors to save, by the names that `from_tensors` reads."""

    def settings(self) -> dict[str, Any]:
        """The settings to save as JSON beside the tensors, "kind" included."""
        return {"kind": self.kind}

    @classmethod
    @abstractmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Self:
        """The change whose `tensors()` and `settings()` these are."""


@dataclass(frozen=True)
class LowRankUpdate(Change):
    """An update ΔW = left rightᵀ of one weight matrix, of rank at most B. Leading dimensions batch separate updates.

        >>> update = LowRankUpdate(torch.ones(2, 1), torch.tensor([[1.0], [0.0], [2.0]]))
        >>> update.dense()
        tensor([[1., 0., 2.],
                [1., 0., 2.]])

    Attributes:
        left: [..., d_out, B].
        right: [..., d_in, B].

    Raises:
        ArgumentError: the factors are not matrices, or differ in B or in their leading dimensions.
    """

    left: Tensor
    right: Tensor

    kind: ClassVar[str] = "low_rank"

    def __post_init__(self) -> None:
        left, right = tuple(self.left.shape), tuple(self.right.shape)
        if min(len(left), len(right)) < 2 or (*left[:-2], left[-1]) != (*right[:-2], right[-1]):
            raise ArgumentError(f"an update needs left [d_out, B] and right [d_in, B], got {left} and {right}")

    @property
    def rank(self) -> int:
        """B, the number of columns of each factor. The rank of ΔW is at most B."""
        return self.left.shape[-1]

    def check(self, place: Place, shape: tuple[int, int]) -> None:
        own = (*self.left.shape[:-1], self.right.shape[-2])
        if own != tuple(shape):
            raise ArgumentError(f"{place}: an update of shape {own} does not fit a weight of {tuple(shape)}")

    def dense(self) -> Tensor:
        """ΔW, [..., d_out, d_in]."""
        return self.left @ self.right.mT

    def compact(self) -> "LowRankUpdate | DenseUpdate":
        """The form with fewer numbers: this update, or the equal `DenseUpdate` in float32 or wider."""
        d_out, d_in = self.left.shape[-2], self.right.shape[-2]
        if self.rank * (d_out + d_in) <= d_out * d_in:
            return self
        wide = torch.promote_types(torch.promote_types(self.left.dtype, self.right.dtype), torch.float32)
        return DenseUpdate(self.left.to(wide) @ self.right.to(wide).mT)

    def norm(self) -> float:
        """Frobenius norm of ΔW, over all batched updates, from the Gram matrices: ||L Rᵀ||² = <LᵀL, RᵀR>."""
        left, right = self.left.double(), self.right.double()
        return float(((left.mT @ left) * (right.mT @ right)).sum().clamp(min=0).sqrt())

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "LowRankUpdate":
        return LowRankUpdate(self.left.to(device, dtype), self.right.to(device, dtype))

    def tensors(self) -> dict[str, Tensor]:
        return {"left": self.left, "right": self.right}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> "LowRankUpdate":
        return LowRankUpdate(tensors["left"], tensors["right"])


@dataclass(frozen=True)
class DenseUpdate(Change):
    """A change of any rank of one weight matrix, of its bias, or of both.

    Attributes:
        weight: ΔW [d_out, d_in], or None.
        bias: Δb [d_out], or None.

    Raises:
        ArgumentError: both are None, `weight` is no matrix, `bias` is no vector, or their d_out differ.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None

    kind: ClassVar[str] = "dense"

    def __post_init__(self) -> None:
        weight, bias = (None if part is None else tuple(part.shape) for part in (self.weight, self.bias))
        if (
            (weight is None and bias is None)
            or (weight is not None and len(weight) != 2)
            or (bias is not None and len(bias) != 1)
            or (weight is not None and bias is not None and weight[0] != bias[0])
        ):
            raise ArgumentError(
                f"a dense update needs weight [d_out, d_in] or bias [d_out] or both, got {weight} and {bias}"
            )

    def check(self, place: Place, shape: tuple[int, int]) -> None:
        if self.weight is not None and tuple(self.weight.shape) != tuple(shape):
            raise ArgumentError(
                f"{place}: an update of shape {tuple(self.weight.shape)} does not fit a weight of {tuple(shape)}"
            )
        if self.bias is not None and len(self.bias) != shape[0]:
            raise ArgumentError(f"{place}: an update of shape ({len(self.bias)},) does not fit a bias of ({shape[0]},)")

    def norm(self) -> float:
        """Frobenius norm of ΔW and Δb together."""
        return float(sum(float(part.double().square().sum()) for part in self.tensors().values()) ** 0.5)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "DenseUpdate":
        return DenseUpdate(**{name: part.to(device, dtype) for name, part in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        return {name: part for name, part in (("weight", self.weight), ("bias", self.bias)) if part is not None}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> "DenseUpdate":
        return DenseUpdate(tensors.get("weight"), tensors.get("bias"))


def total(changes: Sequence[Change]) -> LowRankUpdate | DenseUpdate:
    """The sum of updates of one place, float32 or wider, on the first one's device. It is low-rank if all of them are.

    >>> one = LowRankUpdate(torch.ones(2, 1), torch.ones(3, 1))
    >>> total([one, one]).rank
    2

    Raises:
        ArgumentError: one is an adaptor, which no update equals.
    """
    updates = [change for change in changes if isinstance(change, LowRankUpdate | DenseUpdate)]
    if len(updates) < len(changes):
        raise ArgumentError("an adaptor has no sum with other changes")
    dtypes = [tensor.dtype for update in updates for tensor in update.tensors().values()]
    device = next(iter(updates[0].tensors().values())).device
    updates = [update.to(device, reduce(torch.promote_types, dtypes, torch.float32)) for update in updates]
    low_rank = [update for update in updates if isinstance(update, LowRankUpdate)]
    if len(low_rank) == len(updates):
        left, right = (
            torch.cat([getattr(update, name).detach() for update in low_rank], -1) for name in ("left", "right")
        )
        return LowRankUpdate(left, right)
    parts: dict[str, Tensor] = {}
    for update in updates:
        dense = DenseUpdate(update.dense().detach()) if isinstance(update, LowRankUpdate) else update
        for name, part in dense.tensors().items():
            parts[name] = parts[name] + part if name in parts else part
    return DenseUpdate(**parts)


class Adaptor(Change):
    """A small module behind a place. It changes the place's output and writes no weight. Subclasses set `kind`.

    Attributes:
        reads_prompts: whether it decides by the prompts of a pass.
    """

    reads_prompts: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, inputs: Tensor, output: Tensor, prompts: Prompts) -> Tensor:
        """The new output of the place.

        Args:
            inputs: the place's input, [rows, tokens, d_in]; token ids [rows, tokens] at the embedding.
            output: the place's output, [rows, tokens, d_out].
            prompts: where the prompts are, of as many tokens; only those that read prompts look at it.

        Returns:
            The output that replaces it, [rows, tokens, d_out], in the dtype of `output`.
        """

    def after(self, earlier: "Adaptor") -> "Adaptor | None":
        """What acts as `earlier`, of an earlier round of the same edit, and this one together; None to run both."""
        return None


def save_changes(changes: Mapping[Place, Change], prefix: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a file is to keep of changes.

    Args:
        changes: place -> change.
        prefix: what the tensors' names begin with, such as "round.0.layer.".

    Returns:
        Tensors by names such as "round.0.layer.5.left", on the CPU; and each place's settings, by its key.
    """
    tensors = {
        f"{prefix}{place.key}.{name}": tensor.detach().cpu().contiguous()
        for place, change in changes.items()
        for name, tensor in change.tensors().items()
    }
    return tensors, {place.key: change.settings() for place, change in changes.items()}


def load_changes(tensors: Mapping[str, Tensor], settings: Mapping[str, Any], prefix: str) -> dict[Place, Change]:
    """The changes that `save_changes` gave these for, in their order, from tensors that may hold others too.

    Raises:
        ArgumentError: a kind or a place is not known, or a tensor is missing.
    """
    changes = {}
    for key, of_change in settings.items():
        start = f"{prefix}{key}."
        own = {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
        changes[Place.from_key(key)] = change_from(own, of_change)
    return changes


def change_from(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Change:
    """The change whose `tensors()` and `settings()` these are.

    >>> saved = LowRankUpdate(torch.ones(2, 1), torch.ones(3, 1))
    >>> change_from(saved.tensors(), saved.settings()).rank
    1

    Raises:
        ArgumentError: the kind is not known, or a tensor is missing.
    """
    kind = settings.get("kind")
    if kind not in _KINDS:
        raise ArgumentError(
            f"a change of kind {kind!r} is not known; known are {', '.join(sorted(_KINDS))}. "
            "A kind is known once the module of its class is imported."
        )
    try:
        return _KINDS[kind].from_tensors(tensors, settings)
    except KeyError as error:
        raise ArgumentError(f"a change of kind {kind!r} lacks the tensor {error.args[0]!r}") from error
