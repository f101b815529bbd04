"""A trained hyper-network on disk: its weights, and the model, matrices and settings that it is for."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from lightedit.errors import ArgumentError, MissingFileError
from lightedit.files import whole_folder
from lightedit.lm import LanguageModel
from lightedit.lm.fingerprint import differing_dtypes
from lightedit.methods.hypernetworks.network import HyperNetwork, Matrix
from lightedit.runs.provenance import computing
from lightedit.runs.tables import write_table

_FORMAT = 1
_EDITOR, _NETWORK, _TABLE = "editor.json", "network.safetensors", "validation.csv"


@dataclass(frozen=True)
class SavedNetwork:
    """What a folder says of the network in it.

    Attributes:
        folder: the folder.
        method: name and settings of the method.
        model: name of the language model that it was trained for.
        fingerprint: that of the unedited model.
        dtype: the model's dtype.
        matrices: key of each edited place -> "module", its name in the model, "d_out" and "d_in".
        training: how it was trained.
    """

    folder: Path
    method: dict[str, Any]
    model: str
    fingerprint: str
    dtype: str
    matrices: dict[str, dict[str, Any]]
    training: dict[str, Any]

    @classmethod
    def read(cls, folder: str | Path) -> "SavedNetwork":
        """Read what a folder says.

        Raises:
            MissingFileError: the folder holds no network.
            ArgumentError: its file is damaged or of another format.
        """
        folder = Path(folder)
        file = folder / _EDITOR
        if not file.is_file() or not (folder / _NETWORK).is_file():
            raise MissingFileError(f"{folder} holds no trained network; lightedit train-editor makes one")
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            if content["format"] != _FORMAT:
                raise ValueError(f"format {content['format']}, this version reads {_FORMAT}")
            names = ("method", "model", "fingerprint", "dtype", "matrices", "training")
            return cls(folder, *(content[name] for name in names))
        except (ValueError, LookupError, TypeError) as error:
            raise ArgumentError(
                f"{file} is damaged or of another version: {error!r}; train the editor again"
            ) from error

    def check(self, lm: LanguageModel, matrices: Mapping[str, Mapping[str, Any]]) -> None:
        """Raise ArgumentError unless the network is for `lm` and for these matrices (see `matrices_of`)."""
        if self.fingerprint != lm.fingerprint:
            raise ArgumentError(
                f"the network in {self.folder} was trained for {self.model} (fingerprint {self.fingerprint}), and "
                f"{lm.name} is another model (fingerprint {lm.fingerprint}); train one for it"
                + differing_dtypes(self.dtype, lm.dtype)
            )
        if self.matrices != matrices:
            differing = sorted(_differing(self.matrices, matrices))
            raise ArgumentError(
                f"the network in {self.folder} edits other matrices than the method names: {', '.join(differing)}; "
                "leave layers and parts out"
            )

    def load(self, network: HyperNetwork) -> None:
        """Load the weights into a network of the same settings.

        Raises:
            ArgumentError: they do not fit.
        """
        try:
            network.load_state_dict(load_file(self.folder / _NETWORK))
        except (RuntimeError, ValueError, OSError) as error:
            raise ArgumentError(
                f"{self.folder / _NETWORK} is damaged, or does not fit the settings in {_EDITOR}: {error}"
            ) from error


def matrices_of(lm: LanguageModel, matrices: Sequence[Matrix]) -> dict[str, dict[str, Any]]:
    """The matrices that a network edits, as `SavedNetwork.matrices` names them."""
    return {
        each.place.key: {"module": lm.module_name(each.place), "d_out": each.d_out, "d_in": each.d_in}
        for each in matrices
    }


def save_network(
    folder: Path,
    lm: LanguageModel,
    network: HyperNetwork,
    weights: Mapping[str, Tensor],
    method: Mapping[str, Any],
    training: Mapping[str, Any],
    table: Sequence[Mapping[str, Any]],
) -> None:
    """Write a trained network into a new folder, completely or not at all.

    Args:
        folder: the folder.
        lm: the model that it was trained for.
        network: the network.
        weights: its state dictionary, which may be one from earlier in the training.
        method: name and settings of the method.
        training: how it was trained, as JSON values.
        table: the figures of each validation, for validation.csv.
    """
    content = {
        "format": _FORMAT,
        "method": dict(method),
        "model": lm.name,
        "fingerprint": lm.fingerprint,
        **computing(lm),
        "matrices": matrices_of(lm, network.matrices),
        "training": dict(training),
    }
    with whole_folder(folder) as unfinished:
        save_file({name: tensor.cpu().contiguous() for name, tensor in weights.items()}, unfinished / _NETWORK)
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        (unfinished / _EDITOR).write_text(text, encoding="utf-8", newline="\n")
        write_table(unfinished / _TABLE, table)


def _differing(ours: Mapping[str, Any], others: Mapping[str, Any]) -> list[str]:
    """Keys of the matrices that are not the same in both."""
    return [key for key in {**ours, **others} if ours.get(key) != others.get(key)]
