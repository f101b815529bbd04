"""The base of the fine-tuning methods: which matrices are trained, on what loss, and by which steps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self, get_args

from lightedit.data.facts import Fact
from lightedit.errors import ArgumentError
from lightedit.lm import LanguageModel, Place
from lightedit.lm.kinds import KINDS, KindName
from lightedit.lm.place import Name
from lightedit.methods.closed_form.method import as_layers
from lightedit.methods.protocol import Method

Part = Literal["q", "k", "v", "attention_out", "mlp_gate", "mlp_in", "mlp"]
Order = Literal["breadth", "depth"]
Objective = Literal["reach", "erase"]

_PARTS: tuple[Name, ...] = get_args(Part)


@dataclass(frozen=True)
class FineTuning(Method):
    """Base of the fine-tuning methods: frozen settings, which `FineTuningEditor` reads.

    ΔW is trained by Adam. The loss of a fact is the mean NLL of its target's tokens, each predicted from the prompt and
    the target's tokens before it.

    Attributes:
        layers: the trained layers, ascending.
        lr: Adam's learning rate: about how far one step moves each weight.
        epochs: most passes over the facts.
        norm: bound of each entry of ΔW, to which it is clipped after every step (FT-L's L∞ bound); None for none.
        weight_decay: by how much a step shrinks ΔW, as a multiple of lr. "power_law" is 1.169 n^-0.870 for the n facts
            of a round, as published with MEMIT (FT-W).
        order: "breadth" takes mini-batches of all facts in every epoch. "depth" trains on one fact until it is done,
            then on the next one.
        batch_size: facts of one step with order "breadth".
        stop: a batch whose loss is below this takes no step. Training ends after an epoch whose mean loss is below it.
        end_of_text: whether the token that ends a text, or the turn of a chat, is trained as the target's last one.
        parts: the trained matrices of each layer, by name of place: "mlp" is the MLP's second one. "block" stands for
            all of a layer.
        objective: "reach" makes the targets probable. "erase" makes them improbable: the loss of a fact is exp(-NLL).
        seed: seed of the mini-batches, which are drawn anew in every epoch.
        published: train as the published code does: all tokens of a target are predicted at the prompt's last token;
            decay is added to the gradient, and pulls W to 0 rather than ΔW; biases are trained too; facts are taken in
            their order.

    Raises:
        ArgumentError: a value is out of range.
    """

    kinds: ClassVar[tuple[KindName, ...]] = KINDS

    layers: tuple[int, ...]
    lr: float = 5e-4
    epochs: int = 25
    norm: float | None = None
    weight_decay: float | Literal["power_law"] = 0.0
    order: Order = "breadth"
    batch_size: int = 64
    stop: float = 1e-2
    end_of_text: bool = False
    parts: tuple[Part, ...] | Literal["block"] = ("mlp",)
    objective: Objective = "reach"
    seed: int = 0
    published: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", as_layers(self.layers))
        given: Any = self.parts
        if given != "block":
            object.__setattr__(self, "parts", (given,) if isinstance(given, str) else tuple(given))
            unknown = [part for part in self.parts if part not in _PARTS]
            if unknown or not self.parts or len(set(self.parts)) < len(self.parts):
                raise ArgumentError(f"parts are distinct ones of {', '.join(_PARTS)}, or 'block', got {self.parts!r}")
        if not (self.lr > 0 and self.epochs >= 1 and self.batch_size >= 1 and self.stop >= 0):
            raise ArgumentError(
                "lr must be positive, epochs and batch_size at least 1, and stop not negative, got "
                f"{self.lr}, {self.epochs}, {self.batch_size} and {self.stop}"
            )
        if self.norm is not None and not self.norm > 0:
            raise ArgumentError(f"norm must be positive, or None for no bound, got {self.norm}")
        power_law = self.weight_decay == "power_law"
        if not power_law and (isinstance(self.weight_decay, str) or not self.weight_decay >= 0):
            raise ArgumentError(f"weight_decay is 'power_law' or a number of at least 0, got {self.weight_decay!r}")
        for name, kinds in (("order", Order), ("objective", Objective)):
            if getattr(self, name) not in get_args(kinds):
                raise ArgumentError(f"{name} is one of {', '.join(get_args(kinds))}, got {getattr(self, name)!r}")

    @property
    def places(self) -> tuple[Place, ...]:
        """The trained places; with parts "block" the blocks as a whole (see `trained`)."""
        names: Sequence[Name] = ("block",) if self.parts == "block" else self.parts
        return tuple(sorted(Place(layer, name) for layer in self.layers for name in names))

    def trained(self, lm: LanguageModel) -> tuple[Place, ...]:
        """The places whose matrices are trained in `lm`, in the order in which they run."""
        if self.parts != "block":
            return self.places
        own = [name for name in _PARTS if name in lm.architecture.names]
        return tuple(Place(layer, name) for layer in self.layers for name in own)

    @property
    def erases(self) -> bool:
        return self.objective == "erase"

    def at(self, layers: Sequence[int]) -> Self:
        return replace(self, layers=tuple(layers))

    def erasing(self) -> Self:
        """See `Method.erasing`. With `stop`, a fact takes no further step once its probability is below it."""
        return replace(self, objective="erase")

    def check(self, lm: LanguageModel) -> None:
        """Raise ArgumentError for layers that `lm` lacks, UnsupportedModelError for matrices that it lacks."""
        if self.published and lm.kind != "causal":
            raise ArgumentError(
                f"published: the published training is that of causal language models, and {lm.name} is "
                f"{lm.answers.described}; leave it out"
            )
        lm.check_layers(self.layers)
        for place in self.trained(lm):
            lm.weight(place)

    def decay(self, facts: int) -> float:
        """The weight decay for this many facts."""
        if isinstance(self.weight_decay, str):
            return float(facts**-0.87028798 * math.exp(0.15589562))
        return self.weight_decay

    def taught(self, facts: Sequence[Fact]) -> list[Fact]:
        """The facts as they are trained, with the end of the text if that is asked for."""
        return [replace(fact, end_turn=True) for fact in facts] if self.end_of_text else list(facts)
