"""The covariance C0: the mean second moment of the keys of text, at each edited matrix.

C0 = E[k kᵀ] [d_in, d_in], uncentred. A key k [d_in] is the input of the output matrix of a block's MLP or attention at
one token (Meng et al., 2022, arXiv 2202.05262, section 3.1).
"""

import json
import re
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightedit.digests import digest
from lightedit.errors import LightEditError, MissingFileError
from lightedit.files import whole_file
from lightedit.lm import LanguageModel, Place
from lightedit.lm.fingerprint import differing_dtypes

FILE = "covariance.safetensors"
TOKENS_PER_DIMENSION = 10  # 10 d_in tokens keep at least 95 % of the score of 100 times as many (arXiv 2506.04226)


class CovarianceError(LightEditError, ValueError):
    """A covariance cannot be estimated, read, or used with a model."""


class IndefiniteError(CovarianceError):
    """A covariance is not positive definite, such as one of too few tokens."""


@dataclass(frozen=True)
class Provenance:
    """Where a covariance comes from.

    Attributes:
        model: name of the model.
        fingerprint: hash of its unedited weights; None if unknown, as for published statistics.
        corpus: name of the text, such as "self-generated text".
        tokens: number of keys in the mean.
        sequence_length: tokens of one window; None if unknown.
        dtype: dtype of the model.
        seed: seed of self-generated text, else None.
        versions: versions of lightedit and torch.
    """

    model: str
    fingerprint: str | None
    corpus: str
    tokens: int
    sequence_length: int | None
    dtype: str
    seed: int | None = None
    versions: dict[str, str] = field(default_factory=lambda: {name: version(name) for name in ("lightedit", "torch")})


@dataclass(frozen=True, eq=False)
class Covariance:
    """Mean second moments of the keys of several matrices.

    Attributes:
        moments: place -> E[k kᵀ], [d_in, d_in] float32, on the CPU; see `on`.
        provenance: the model and the text that they come from.
        folder: the folder of the moments and their eigendecompositions; None keeps both in memory only.
    """

    moments: dict[Place, Tensor]
    provenance: Provenance
    folder: Path | None = None
    _eigen: dict[Place, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def __getitem__(self, place: Place) -> Tensor:
        """E[k kᵀ] at `place`, [d_in, d_in]."""
        if place not in self.moments:
            held = [other.layer for other in sorted(self.moments) if other.name == place.name]
            raise CovarianceError(
                f"the covariance has no {place}, only {held or 'other matrices'}; estimate it for the matrices to "
                "edit, such as by estimate_covariance(lm, method)"
            )
        return self.moments[place]

    def on(self, device: torch.device, place: Place) -> "Covariance":
        """The covariance of `place` alone, on `device`, so that it is factored there."""
        there = replace(self, moments={place: self[place].to(device)})
        object.__setattr__(there, "_eigen", self._eigen)  # both share the decompositions, which stay on the CPU
        return there

    def eigen(self, place: Place) -> tuple[Tensor, Tensor]:
        """Eigenvalues [d_in], ascending, and eigenvectors [d_in, d_in] of the moment at `place`, float64 on its device.

        They are computed once. If the covariance has a folder, they are also written there. If the folder cannot be
        written, a warning says so.
        """
        moment = self[place]
        if place not in self._eigen:
            name = digest(moment.cpu().contiguous().numpy().tobytes())
            file = None if self.folder is None else self.folder / f"eigen.{place.key}.safetensors"
            if file is not None and (found := _read_eigen(file, name)):
                self._eigen[place] = found
            else:
                values, vectors = torch.linalg.eigh(moment.double())
                self._eigen[place] = values.cpu(), vectors.cpu().contiguous()
                if file is not None:
                    _keep_eigen(file, *self._eigen[place], name)
        values, vectors = self._eigen[place]
        return values.to(moment.device), vectors.to(moment.device)

    def check(self, lm: LanguageModel, places: Iterable[Place], *, factor: bool = True) -> None:
        """Check that the matrices at `places` of `lm` can be edited with this covariance.

        Args:
            lm: the model.
            places: the places to edit.
            factor: factor each moment to check that it is positive definite; False if the caller factors it later.

        Raises:
            CovarianceError: it was estimated on another model, or a moment is missing, has the wrong size, or holds NaN
                or infinity.
            IndefiniteError: a moment is not positive definite.
        """
        made = self.provenance
        if made.fingerprint not in (None, lm.fingerprint):
            raise CovarianceError(
                f"the covariance was estimated on {made.model} (fingerprint {made.fingerprint}), not on {lm.name} "
                f"({lm.fingerprint}); estimate it on the model to edit{differing_dtypes(made.dtype, lm.dtype)}"
            )
        for place in places:
            moment, weight = self[place], lm.weight(place)
            d_in = weight.shape[1]
            if moment.shape != (d_in, d_in):
                raise CovarianceError(
                    f"the covariance of {place} is {tuple(moment.shape)}, but {lm.name} needs {(d_in, d_in)}; "
                    f"it belongs to another model than {lm.name}"
                )
            if not torch.isfinite(moment).all():
                raise CovarianceError(
                    f"the covariance of {place} holds NaN or infinity; estimate it with the model in float32 "
                    f"or bfloat16 (it was {made.dtype})"
                )
            if made.tokens < d_in:
                raise self.indefinite(place)
            if factor:
                self.check_definite(place, weight.device)

    def check_definite(self, place: Place, device: torch.device | None = None) -> None:
        """Factor the moment at `place` on `device`; raise IndefiniteError unless it is positive definite."""
        if torch.linalg.cholesky_ex(self[place].to(device, torch.float64)).info:
            raise self.indefinite(place)

    def indefinite(self, place: Place) -> IndefiniteError:
        """The error for a moment at `place` that is not positive definite. It recommends a number of tokens."""
        least = TOKENS_PER_DIMENSION * len(self[place])
        return IndefiniteError(
            f"the covariance of {place} is not positive definite: it averages {self.provenance.tokens} tokens; "
            f"take more, at least {TOKENS_PER_DIMENSION} * d_in = {least}"
        )

    def save(self, folder: str | Path) -> Path:
        """Write `covariance.safetensors` into `folder`, completely or not at all, and return its path."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"layer.{matrix.key}": moment.contiguous() for matrix, moment in self.moments.items()}
        with whole_file(folder / FILE) as unfinished:
            save_file(tensors, unfinished, metadata={"provenance": json.dumps(asdict(self.provenance))})
        return folder / FILE

    @classmethod
    def load(cls, path: str | Path) -> "Covariance":
        """Read a covariance from the folder or file that `save` wrote, or from published `.npz` files (see `from_npz`).

        Raises:
            MissingFileError: there is no covariance.
            CovarianceError: the file is damaged or not a covariance.
        """
        file = Path(path) / FILE if Path(path).is_dir() else Path(path)
        if not file.is_file() and any(Path(path).glob("*_mom2_*.npz")):
            return cls.from_npz(path)
        if not file.is_file():
            raise MissingFileError(f"no covariance at {file}")
        try:
            with safe_open(file, "pt") as opened:
                provenance = Provenance(**json.loads((opened.metadata() or {})["provenance"]))
                names = {Place.from_key(name.removeprefix("layer.")): name for name in opened.keys()}  # noqa: SIM118
                moments = {matrix: opened.get_tensor(name) for matrix, name in sorted(names.items())}
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CovarianceError(
                f"{file} is damaged or not a covariance ({type(error).__name__}: {error}); delete it and estimate anew"
            ) from error
        return cls(moments, provenance, file.parent)

    @classmethod
    def from_npz(cls, files: Mapping[int, str | Path] | str | Path, model: str = "unknown") -> "Covariance":
        """Read statistics in the published format, which holds *sums* over tokens and the number of tokens.

        Args:
            files: layer -> file; or a folder of files that name their layer, such as
                `transformer.h.17.mlp.c_proj_float32_mom2_100000.npz`.
            model: name of the model they were collected on.

        Raises:
            MissingFileError: a file is missing, or the folder holds none.
            CovarianceError: a file is damaged, or lacks `mom2.mom2` or `mom2.count`.
        """
        if not isinstance(files, Mapping):
            files = _published_files(Path(files))
        moments, counts = {}, []
        for layer, file in sorted(files.items()):
            try:
                with np.load(file, allow_pickle=False) as arrays:
                    total, count = torch.from_numpy(arrays["mom2.mom2"]), int(arrays["mom2.count"])
            except (KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
                raise CovarianceError(f"{file} is damaged or not a published second moment ({error})") from error
            if count < 1 or total.ndim != 2 or total.shape[0] != total.shape[1]:
                raise CovarianceError(f"{file} holds a sum of shape {tuple(total.shape)} over {count} tokens")
            moments[Place(layer)] = (total.double() / count).float()
            counts.append(count)
        corpus = f"published statistics, {Path(next(iter(files.values()))).parent.name}"
        return cls(moments, Provenance(model, None, corpus, min(counts), None, "float32"))


def _read_eigen(file: Path, moment: str) -> tuple[Tensor, Tensor] | None:
    """The decomposition in `file`; None if the file is missing, damaged, or of another moment."""
    try:
        with safe_open(file, "pt") as opened:
            if (opened.metadata() or {}).get("moment") == moment:
                return opened.get_tensor("values").clone(), opened.get_tensor("vectors").clone()
    except (OSError, SafetensorError):
        pass
    return None


def _keep_eigen(file: Path, values: Tensor, vectors: Tensor, moment: str) -> None:
    """Write the decomposition, or warn if that fails. The run goes on with the decomposition in memory."""
    try:
        with whole_file(file) as unfinished:
            save_file({"values": values, "vectors": vectors}, unfinished, metadata={"moment": moment})
    except (OSError, SafetensorError) as error:
        warnings.warn(
            f"the eigendecomposition could not be kept in {file} ({error}), so another run computes it again; make its "
            "folder writable, or save the covariance to another one",
            stacklevel=3,
        )


def _published_files(folder: Path) -> dict[int, Path]:
    files: dict[int, Path] = {}
    for file in sorted(folder.glob("*_mom2_*.npz")):
        if not (found := re.search(r"\.(\d+)\.", file.name)):
            raise CovarianceError(f"{file} does not name its layer as '.17.' does; pass a mapping of layers to files")
        if (layer := int(found[1])) in files:
            raise CovarianceError(f"{files[layer]} and {file} are both of layer {layer}; pass a mapping to choose")
        files[layer] = file
    if not files:
        raise MissingFileError(f"no files named *_mom2_*.npz in {folder}")
    return files
