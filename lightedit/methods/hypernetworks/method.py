"""The base of methods that edit with a hyper-network: which matrices it edits, and where the trained one is."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
from transformers.pytorch_utils import Conv1D

from lightedit.data.facts import Fact
from lightedit.errors import ArgumentError
from lightedit.lm import LanguageModel, Place
from lightedit.lm.place import Name
from lightedit.methods.closed_form.method import as_layers
from lightedit.methods.hypernetworks.factors import Answered
from lightedit.methods.hypernetworks.network import HyperNetwork, Matrix
from lightedit.methods.hypernetworks.objectives import Objective
from lightedit.methods.hypernetworks.saving import SavedNetwork, matrices_of
from lightedit.methods.protocol import Method

Part = Literal["q", "k", "v", "attention_out", "mlp_gate", "mlp_in", "mlp"]


@dataclass(frozen=True)
class HyperNetworkMethod(Method):
    """Base of the methods that edit with a trained hyper-network.

    Attributes:
        layers: the edited layers, ascending. None takes all settings from `folder`; without a folder, training takes
            the model's last three layers.
        parts: the edited matrices of each layer, by name of place: "mlp" is the MLP's second one.
        folder: where the trained network is, as `lightedit train-editor` saved it. Without one the method can be
            trained, but edits nothing.
        seed: seed of the network's first weights.
        published: do as the published code does where that differs; see the method.

    Raises:
        ArgumentError: a value is out of range, or contradicts what `folder` says.
        MissingFileError: `folder` holds no network.
    """

    layers: tuple[int, ...] | None = None
    parts: tuple[Part, ...] = ("mlp_in", "mlp")
    folder: str | None = None
    seed: int = 0
    published: bool = False

    def __post_init__(self) -> None:
        if self.folder is not None:
            object.__setattr__(self, "folder", str(self.folder))
        if self.layers is None and self.folder is not None:
            self._take_settings()
        layers: Any = self.layers
        object.__setattr__(self, "layers", None if layers is None else as_layers(layers))
        given: Any = self.parts
        object.__setattr__(self, "parts", (given,) if isinstance(given, str) else tuple(given))
        known: tuple[Name, ...] = get_args(Part)
        if not self.parts or len(set(self.parts)) < len(self.parts) or not set(self.parts) <= set(known):
            raise ArgumentError(f"parts are distinct ones of {', '.join(known)}, got {self.parts!r}")

    def _take_settings(self) -> None:
        """Take the settings of the network in `folder`."""
        for field in fields(self):
            value = self._saved().get(field.name, field.default)
            if field.name == "folder":
                continue
            if getattr(self, field.name) not in (field.default, value):
                raise self._contradicts(field.name, value)
            object.__setattr__(self, field.name, value)

    def _saved(self) -> dict[str, Any]:
        """The settings with which the network in `folder` was trained."""
        assert self.folder is not None
        saved = SavedNetwork.read(self.folder).method
        if saved.get("name") != type(self).__name__:
            raise ArgumentError(
                f"folder: {self.folder} holds a network of {saved.get('name')}, not {type(self).__name__}"
            )
        return {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}

    def _contradicts(self, name: str, value: object) -> ArgumentError:
        return ArgumentError(
            f"{name}: {getattr(self, name)!r}, but the network in {self.folder} was trained with {value!r}; leave it "
            "out"
        )

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """The method with the trained network in `folder` and its settings.

        Raises:
            MissingFileError: the folder holds no network.
            ArgumentError: it holds one of another method.
        """
        return cls(folder=str(folder))

    @property
    def places(self) -> tuple[Place, ...]:
        """The places of the edited matrices, in the order in which they run."""
        return tuple(sorted(Place(layer, part) for layer in self.layers or () for part in self.parts))

    @property
    def averages_round(self) -> bool:
        """Whether the loss of a round is the mean over all its answer tokens, instead of one loss a fact."""
        return False

    def at(self, layers: Sequence[int]) -> Self:
        """The same method at other layers, before it is trained.

        Raises:
            ArgumentError: it has a trained network.
        """
        if self.folder is not None:
            raise ArgumentError(f"layers: the network in {self.folder} is trained for {list(self.layers or ())}")
        return replace(self, layers=tuple(layers))

    def check(self, lm: LanguageModel) -> None:
        """Raise an error unless `lm` has the edited matrices, and there is a network trained for it.

        Raises:
            ArgumentError: there is no such layer, no network, or one for another model or other matrices.
            UnsupportedModelError: the model lacks a matrix.
            MissingFileError: `folder` holds no network.
        """
        if self.layers is not None:
            self.check_places(lm)
        if self.folder is None:
            raise ArgumentError(
                f"{type(self).__name__} edits with a trained network; make one with lightedit train-editor, and name "
                "its folder as folder"
            )
        for name, value in self._saved().items():
            if name not in ("name", "folder") and getattr(self, name, value) != value:
                raise self._contradicts(name, value)
        SavedNetwork.read(self.folder).check(lm, matrices_of(lm, self.matrices(lm)))

    def check_places(self, lm: LanguageModel) -> None:
        """Raise ArgumentError for layers that `lm` lacks, UnsupportedModelError for matrices that it lacks."""
        assert self.layers is not None
        lm.check_layers(self.layers)
        for place in self.places:
            lm.weight(place)

    def matrices(self, lm: LanguageModel) -> list[Matrix]:
        """The edited matrices of `lm`."""
        return [Matrix(place, *lm.anatomy.shape(place), isinstance(lm.module(place), Conv1D)) for place in self.places]

    def new_network(self, lm: LanguageModel) -> HyperNetwork:
        """An untrained network for `lm`, on its device, in float32 or wider."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            network = self.build(lm, torch.promote_types(lm.dtype, torch.float32))
        return network.to(lm.device)

    def network(self, lm: LanguageModel) -> HyperNetwork:
        """The trained network, in evaluation mode, without gradients.

        Raises:
            ArgumentError: see `check`; or its file is damaged.
        """
        self.check(lm)
        assert self.folder is not None
        network = self.new_network(lm)
        SavedNetwork.read(self.folder).load(network)
        return network.eval().requires_grad_(False)

    @abstractmethod
    def build(self, lm: LanguageModel, dtype: torch.dtype) -> HyperNetwork:
        """An untrained network with parameters of `dtype`."""

    @abstractmethod
    def objective(self, steps: int) -> Objective:
        """The loss and the optimizer with which the network is trained for at most `steps` steps."""

    def conditions(self, lm: LanguageModel, rows: Sequence[Answered], facts: Sequence[Fact]) -> list[list[int]] | None:
        """Token ids of the text about each fact on which its edit depends; None if it depends on none."""
        return None
