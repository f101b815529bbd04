"""The modules, matrices and biases of the places of one model."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lightedit.errors import UnsupportedModelError
from lightedit.lm.architectures import Architecture, Features, blocks_of, features_of
from lightedit.lm.finder import architecture_of
from lightedit.lm.hooks import Port
from lightedit.lm.place import Name, Place
from lightedit.lm.proof import packs, prove
from lightedit.lm.storage import check_stored
from lightedit.ops import Head


class Anatomy:
    """Finds the modules, matrices and biases of a model's places.

    Args:
        model: a causal language model of a known architecture.

    Attributes:
        architecture: the module paths of its architecture.
        blocks: its transformer blocks, first to last.
        proof: what a probe measured of it.

    Raises:
        UnsupportedModelError: its places are not found, or a probe finds that they are not what they should be.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.architecture: Architecture = architecture_of(model)
        self.blocks: nn.ModuleList = blocks_of(model, self.architecture)
        self.proof = prove(model, self.architecture)
        packing = packs(model, self.architecture, self.proof.returns_tuple)
        self.architecture = replace(self.architecture, supports_packing=packing)
        self._model = model

    def module_name(self, place: Place) -> str:
        """The name of the module whose output is that of `place`, such as "model.layers.5.mlp.down_proj".

        Raises:
            UnsupportedModelError: the architecture has no place of this name, or the model has no such layer.
        """
        names = self.architecture.names
        if place.name not in names:
            raise UnsupportedModelError(
                f"{self._model.config.model_type} has no {place.name}; the places of its blocks are {', '.join(names)}"
            )
        last = 0 if place.name == "embedding" else len(self.blocks) - 1
        if not 0 <= place.layer <= last:
            raise UnsupportedModelError(f"there is no {place}: layers of {place.name} are 0 to {last}")
        if place.name == "embedding":
            return self.architecture.embedding
        block, paths = self.located(place.layer)
        if place.name == "block":
            return block
        return f"{block}.{paths['attention_out' if place.name == 'attention' else place.name]}"

    def located(self, layer: int) -> tuple[str, Mapping[Name, str]]:
        """The path to the block of a layer, and the paths of the places inside it."""
        return f"{self.architecture.blocks}.{layer}", self.architecture.paths

    def module(self, place: Place) -> nn.Module:
        """The module whose output is the output of `place`, or contains it (see `features`).

        Raises:
            UnsupportedModelError: see `module_name`.
        """
        return self._model.get_submodule(self.module_name(place))

    def port(self, place: Place) -> Port:
        """The modules at which `place` is read and changed.

        Raises:
            UnsupportedModelError: see `module_name`.
        """
        leaves = self.module(place)
        enters = self.module(Place(place.layer, "q")) if place.name == "attention" else leaves
        block = None if place.name in ("embedding", "block") else self.blocks[place.layer]
        return Port(enters, leaves, block, self.features(place))

    def features(self, place: Place) -> Features | None:
        """The output features of the place's module that belong to the place: rows of its W [d_out, d_in].

        Returns:
            None for all of them, a slice if they are contiguous, else an index [n].
        """
        if place.name not in self.architecture.paths:
            return None
        config = self._model.config.get_text_config()
        return features_of(self.architecture, config, place.name, _shape(self.module(place))[0])

    def shape(self, place: Place) -> tuple[int, int]:
        """(d_out, d_in), the widths of the output and the input of `place`. At the embedding d_in is the vocabulary."""
        if place.name == "block":
            return (self.shape(Place(place.layer))[0],) * 2
        if place.name == "attention":
            return self.shape(Place(place.layer, "attention_out"))[0], self.shape(Place(place.layer, "q"))[1]
        d_out, d_in = _shape(self.module(place))
        features = self.features(place)
        if features is None:
            return d_out, d_in
        return (features.stop - features.start if isinstance(features, slice) else len(features)), d_in

    def weight(self, place: Place) -> Tensor:
        """The matrix of `place`, as a writable [d_out, d_in] view.

        Raises:
            UnsupportedModelError: the place has no matrix, its rows are interleaved with those of other places, or the
                matrix is not stored in floating point on a device; see also `module_name`.
        """
        module = self.module(place)
        if place.name in ("attention", "block"):
            raise UnsupportedModelError(f"{place} has no matrix; its states can be read and changed, not its weight")
        weight = getattr(module, "weight", None)
        check_stored(self.module_name(place), module, f"matrix of {place}", weight)
        assert isinstance(weight, Tensor)
        return self._part(place, weight.data.T if isinstance(module, Conv1D | nn.Embedding) else weight.data)

    def bias(self, place: Place) -> Tensor | None:
        """The bias of `place`, as a writable [d_out] view; None if it has none.

        Raises:
            UnsupportedModelError: see `weight`.
        """
        module = self.module(place)
        bias = None if place.name in ("attention", "block") else getattr(module, "bias", None)
        if bias is None:
            return None
        check_stored(self.module_name(place), module, f"bias of {place}", bias)
        return self._part(place, bias.data)

    def _part(self, place: Place, whole: Tensor) -> Tensor:
        """The rows of `whole` that belong to `place`, as a view."""
        features = self.features(place)
        if features is None:
            return whole
        if isinstance(features, Tensor):
            raise UnsupportedModelError(
                f"the rows of {place} lie head by head among those of q, k and v in {self.module_name(place)}, so they "
                "cannot be written as one matrix; their states can be read and changed"
            )
        return whole[features]

    def head_module(self) -> nn.Module:
        """The module of the head, whose input the answers are read from."""
        module = self._model.get_output_embeddings()
        assert module is not None
        return module

    def head(self) -> Head:
        """The LM head."""
        module: Any = self.head_module()
        softcap = getattr(self._model.config.get_text_config(), "final_logit_softcapping", None)
        bias = None if module.bias is None else module.bias.data
        return Head(module.weight.data, bias, softcap, self.proof.logit_scale)

    def mlp_norm(self, layer: int) -> nn.Module | None:
        """The norm between the MLP's output and the residual stream; None if the block has none."""
        path = self.architecture.mlp_norm
        try:
            return self.blocks[layer].get_submodule(path) if path else None
        except AttributeError:  # blocks of OLMo-hybrid with recurrent layers have none
            return None

    def mlp_scale(self, layer: int) -> float:
        """The constant by which the MLP's output, after its norm if any, enters the residual stream; mostly 1."""
        return self.proof.mlp_scales[layer]


def _shape(module: nn.Module) -> tuple[int, int]:
    """(d_out, d_in) of a module with a matrix. Conv1D and Embedding store their weight transposed."""
    if isinstance(module, Conv1D):
        return int(module.nf), int(module.nx)
    if isinstance(module, nn.Embedding):
        return module.embedding_dim, module.num_embeddings
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.shape[0], weight.shape[1]
