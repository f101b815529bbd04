"""What an edit must preserve: the second moment of the edited matrices' inputs over text.

C0 = E[k kᵀ], uncentred, with k [d_in] the input of a block's MLP output matrix, or of its attention's, at one token
(Meng et al., 2022, arXiv 2202.05262, section 3.1). All are collected in one pass that ends at the deepest of them.
"""

import hashlib
import json
import re
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightedit.data.texts import TextDataModule, read_texts, token_windows, write_texts
from lightedit.files import whole_file
from lightedit.lm import LanguageModel, Matrix
from lightedit.lm.batch import Batch
from lightedit.lm.hooks import capture, stop_after
from lightedit.lm.loading import cache_folder
from lightedit.ops import mirror_, second_moment_
from lightedit.progress import Report, progress, quiet_lightning

_FILE = "covariance.safetensors"
_TOKENS_PER_DIMENSION = 10  # keep at least 95 % of the full score (arXiv 2506.04226)


class CovarianceError(ValueError):
    """A covariance that cannot be estimated, read, or used with a model."""


class SecondMoment:
    """A running sum of k kᵀ, accumulated in float32.

    Attributes:
        gram: Σ k kᵀ, [d, d] float32, on and below the diagonal.
        count: how many keys it sums.
    """

    def __init__(self, d: int, device: torch.device | str = "cpu") -> None:
        self.gram = torch.zeros(d, d, dtype=torch.float32, device=device)
        self.count = 0

    @torch.no_grad()
    def update(self, keys: Tensor, mask: Tensor | None = None) -> None:
        """Add keys [n, d] of any floating-point dtype, only those where the boolean `mask` [n] is True."""
        keys = keys.to(self.gram.device)
        second_moment_(self.gram, keys, mask)
        self.count += len(keys) if mask is None else int(mask.sum())

    def mean(self) -> Tensor:
        """E[k kᵀ], [d, d] float32."""
        if not self.count:
            raise CovarianceError("the mean of no keys is undefined; update the second moment first")
        return mirror_(self.gram / self.count)


class CovarianceModule(LightningModule):
    """Accumulates the second moments at all `matrices` in a trainer's predict loop over a `TextDataModule`.

    With several processes, each sees its share of the text and all end with the sums over all of it.

    Attributes:
        moments: matrix -> second moment of what it has seen.
    """

    def __init__(self, lm: LanguageModel, matrices: Iterable[int | Matrix]) -> None:
        super().__init__()
        chosen = sorted(map(Matrix.of, matrices))
        lm.check_layers(sorted({matrix.layer for matrix in chosen}))
        self.lm = lm
        weights = {matrix: lm.weight(matrix) for matrix in chosen}
        self.moments = {matrix: SecondMoment(weight.shape[1], weight.device) for matrix, weight in weights.items()}

    @torch.no_grad()
    def predict_step(self, batch: Batch) -> None:
        modules = {matrix: self.lm.module(matrix) for matrix in self.moments}
        # the last of them to run, as parallel blocks too compute their attention first
        with capture(modules, len(batch.ids), inputs=True) as keys, stop_after(modules[max(modules)]):
            self.lm.forward(batch)
        for matrix, moment in self.moments.items():
            seen = keys.pop(matrix)  # [rows, tokens, d_in]
            moment.update(seen.flatten(0, 1), batch.mask.flatten().to(seen.device))

    def on_predict_epoch_end(self) -> None:
        strategy = self.trainer.strategy
        for moment in self.moments.values():
            count = torch.tensor(moment.count, device=moment.gram.device)
            moment.gram = strategy.reduce(moment.gram, reduce_op="sum")
            moment.count = int(strategy.reduce(count, reduce_op="sum"))


@dataclass(frozen=True)
class Provenance:
    """Where a covariance comes from.

    Attributes:
        model: name of the model.
        fingerprint: hash of its unedited weights; None if unknown, as for published statistics.
        corpus: what text; "own writing" if the model wrote it.
        tokens: how many keys were averaged.
        sequence_length: tokens of one window; None if unknown.
        dtype: the model's dtype.
        seed: of the model's own writing, else None.
        versions: of lightedit and torch.
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
    """Mean second moments by matrix; a layer's number means its MLP's.

    Attributes:
        moments: matrix -> E[k kᵀ], [d_in, d_in] float32, on the CPU.
        provenance: where they come from.
        folder: where they are kept, and with them their eigendecompositions; None keeps these in memory only.
    """

    moments: dict[Matrix, Tensor]
    provenance: Provenance
    folder: Path | None = None
    _eigen: dict[Matrix, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "moments", {Matrix.of(matrix): moment for matrix, moment in self.moments.items()})

    def __getitem__(self, matrix: int | Matrix) -> Tensor:
        """E[k kᵀ] at `matrix`, [d_in, d_in]."""
        matrix = Matrix.of(matrix)
        if matrix not in self.moments:
            held = [other.layer for other in sorted(self.moments) if other.part == matrix.part]
            way_out = ", with attention=True (on the command line: --attention true)"
            raise CovarianceError(
                f"the covariance has no {matrix}, only {held or 'MLP matrices'}; estimate it for the layers to edit"
                + (way_out if matrix.part == "attention" else "")
            )
        return self.moments[matrix]

    def eigen(self, matrix: int | Matrix) -> tuple[Tensor, Tensor]:
        """Eigenvalues [d_in], ascending, and eigenvectors [d_in, d_in] of a matrix' moment, in float64.

        Computed once, and kept beside the covariance where that is on disk.
        """
        matrix = Matrix.of(matrix)
        if matrix not in self._eigen:
            digest = hashlib.sha256(self[matrix].contiguous().numpy().tobytes()).hexdigest()
            file = None if self.folder is None else self.folder / f"eigen.{matrix.key}.safetensors"
            if file is None or (found := _read_eigen(file, digest)) is None:
                values, vectors = torch.linalg.eigh(self[matrix].double())
                found = values, vectors.contiguous()
                if file is not None:
                    with whole_file(file) as unfinished:
                        save_file({"values": found[0], "vectors": found[1]}, unfinished, metadata={"moment": digest})
            self._eigen[matrix] = found
        return self._eigen[matrix]

    def check(self, lm: LanguageModel, matrices: Iterable[int | Matrix]) -> None:
        """Make sure that `matrices` of `lm` can be edited with this covariance.

        Raises:
            CovarianceError: it was estimated on another model, or a matrix is missing, has the wrong size, holds NaN or
                infinity, or is not positive definite.
        """
        made = self.provenance
        if made.fingerprint not in (None, lm.fingerprint):
            raise CovarianceError(
                f"the covariance was estimated on {made.model} (fingerprint {made.fingerprint}), not on {lm.name} "
                f"({lm.fingerprint}); estimate it on the model to edit"
            )
        for matrix in map(Matrix.of, matrices):
            moment, weight = self[matrix], lm.weight(matrix)
            d_in = weight.shape[1]
            if moment.shape != (d_in, d_in):
                raise CovarianceError(
                    f"the covariance of {matrix} is {tuple(moment.shape)}, but {lm.name} needs {(d_in, d_in)}; "
                    f"it belongs to another model than {lm.name}"
                )
            if not torch.isfinite(moment).all():
                raise CovarianceError(
                    f"the covariance of {matrix} holds NaN or infinity; estimate it with the model in float32 "
                    f"or bfloat16 (it was {made.dtype})"
                )
            failed = torch.linalg.cholesky_ex(moment.to(weight.device, torch.float64)).info
            if made.tokens < d_in or failed:
                raise CovarianceError(
                    f"the covariance of {matrix} is not positive definite: it averages {made.tokens} tokens; "
                    f"take more, at least {_TOKENS_PER_DIMENSION} * d_in = {_TOKENS_PER_DIMENSION * d_in}"
                )

    def save(self, folder: str | Path) -> Path:
        """Write `covariance.safetensors` into `folder`, whole or not at all, and return its path."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"layer.{matrix.key}": moment.contiguous() for matrix, moment in self.moments.items()}
        with whole_file(folder / _FILE) as unfinished:
            save_file(tensors, unfinished, metadata={"provenance": json.dumps(asdict(self.provenance))})
        return folder / _FILE

    @classmethod
    def load(cls, path: str | Path) -> "Covariance":
        """Read what `save` wrote, from its folder or file; or a folder of published `.npz` files (see `from_npz`).

        Raises:
            FileNotFoundError: there is no covariance.
            CovarianceError: the file is truncated or something else.
        """
        file = Path(path) / _FILE if Path(path).is_dir() else Path(path)
        if not file.is_file() and any(Path(path).glob("*_mom2_*.npz")):
            return cls.from_npz(path)
        if not file.is_file():
            raise FileNotFoundError(f"no covariance at {file}")
        try:
            with safe_open(file, "pt") as opened:
                provenance = Provenance(**json.loads((opened.metadata() or {})["provenance"]))
                names = {Matrix.from_key(name.removeprefix("layer.")): name for name in opened.keys()}  # noqa: SIM118
                moments = {matrix: opened.get_tensor(name) for matrix, name in sorted(names.items())}
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CovarianceError(
                f"{file} is damaged or not a covariance ({type(error).__name__}: {error}); delete it and estimate anew"
            ) from error
        return cls(moments, provenance, file.parent)

    @classmethod
    def from_npz(cls, files: Mapping[int, str | Path] | str | Path, model: str = "unknown") -> "Covariance":
        """Read statistics in the published format, which hold *sums* over tokens beside their count.

        Args:
            files: layer -> file; or a folder of files that name their layer, such as
                `transformer.h.17.mlp.c_proj_float32_mom2_100000.npz`.
            model: name of the model they were collected on.

        Raises:
            FileNotFoundError: a file is missing, or the folder holds none.
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
            moments[Matrix(layer)] = (total.double() / count).float()
            counts.append(count)
        corpus = f"published statistics, {Path(next(iter(files.values()))).parent.name}"
        return cls(moments, Provenance(model, None, corpus, min(counts), None, "float32"))


def _read_eigen(file: Path, digest: str) -> tuple[Tensor, Tensor] | None:
    """The decomposition kept in `file`, unless there is none, it is damaged, or it is of another moment."""
    try:
        with safe_open(file, "pt") as opened:
            if (opened.metadata() or {}).get("moment") == digest:
                return opened.get_tensor("values").clone(), opened.get_tensor("vectors").clone()
    except (FileNotFoundError, SafetensorError):
        pass
    return None


def _published_files(folder: Path) -> dict[int, Path]:
    files: dict[int, Path] = {}
    for file in sorted(folder.glob("*_mom2_*.npz")):
        if not (found := re.search(r"\.(\d+)\.", file.name)):
            raise CovarianceError(f"{file} does not name its layer as '.17.' does; pass a mapping of layers to files")
        if (layer := int(found[1])) in files:
            raise CovarianceError(f"{files[layer]} and {file} are both of layer {layer}; pass a mapping to choose")
        files[layer] = file
    if not files:
        raise FileNotFoundError(f"no files named *_mom2_*.npz in {folder}")
    return files


def estimate_covariance(
    lm: LanguageModel,
    layers: Sequence[int],
    text: str | Path | None = None,
    tokens: int | None = None,
    sequence_length: int | None = None,
    max_batch_tokens: int = 4096,
    seed: int = 0,
    progress_bar: bool = True,
    cache: bool | Path = False,
    attention: bool = False,
) -> Covariance:
    """Estimate the second moments at `layers` of the unedited model.

        covariance = estimate_covariance(lm, layers=[4, 5, 6, 7, 8], text="wikipedia.txt")

    Args:
        lm: the model.
        layers: the layers to edit, ascending.
        text: a `.txt` file or a data set (see `read_texts`); None lets the model write the text itself.
        tokens: how many; default 10 * d_in, which keeps at least 95 % of the score of 100 times as many (arXiv
            2506.04226).
        sequence_length: tokens of one window; default 256, or 128 where the model writes, so that it writes more
            windows at once.
        max_batch_tokens: tokens of one forward pass at most; bounds memory.
        seed: of the model's own writing.
        progress_bar: show progress and the time left on standard error.
        cache: keep the result in the user's cache folder, or in the given one, and take it from there if it is there.
        attention: also at the attention's output matrices of `layers`, which `PMET(write_attention=True)` writes.

    Raises:
        CovarianceError: the model is edited, or there are fewer tokens than a positive definite matrix needs.
    """
    lm.check_layers(layers)
    if lm.weights.owners:
        raise CovarianceError(f"{lm.name} carries edits ({', '.join(lm.weights.owners)}); revert them first")
    matrices = {Matrix(layer) for layer in layers}
    if attention:
        matrices |= {Matrix(layer, "attention") for layer in layers}
    d_in = max(lm.weight(matrix).shape[1] for matrix in matrices)
    tokens = _TOKENS_PER_DIMENSION * d_in if tokens is None else tokens
    enough = f"at least d_in = {d_in} are needed and {_TOKENS_PER_DIMENSION * d_in} recommended"
    if tokens < d_in:
        raise CovarianceError(f"{tokens} tokens give no positive definite covariance; {enough}")
    if sequence_length is None:
        sequence_length = 128 if text is None else 256
    limit = getattr(lm.model.config, "max_position_embeddings", None) or sequence_length
    if not 2 <= sequence_length <= limit:
        raise ValueError(f"sequence_length must be from 2 to the {limit} positions of {lm.name}, got {sequence_length}")

    corpus = _corpus(text)
    folder = None
    if cache:
        root = None if cache is True else Path(cache)
        folder = covariance_folder(lm, corpus, tokens, sequence_length, seed if text is None else None, root)
        if (folder / _FILE).is_file():
            known = Covariance.load(folder)
            if matrices <= known.moments.keys():
                return known
            matrices |= known.moments.keys()

    if text is None:
        windows = write_texts(lm, tokens, sequence_length, seed, progress_bar=progress_bar)
    else:
        windows = token_windows(lm, read_texts(text), tokens, sequence_length)
    held = sum(map(len, windows))
    if held < d_in:
        raise CovarianceError(f"{text} holds {held} tokens; {enough}")
    if held < tokens:
        warnings.warn(f"{text} holds {held} of {tokens} tokens asked for; {enough}", stacklevel=2)

    module = CovarianceModule(lm, matrices)
    with progress("covariance", progress_bar) as report, quiet_lightning():
        trainer = Trainer(
            accelerator="cpu",  # the module holds nothing to move: the language model stays where it is
            devices=1,
            plugins=[LightningEnvironment()],  # one process, whatever launcher surrounds it
            inference_mode=False,  # buffers a model makes on the way would be unusable in a later backward pass
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[_Progress(report, held)],
        )
        trainer.predict(module, TextDataModule(windows, lm.pad_id, max_batch_tokens), return_predictions=False)
    covariance = Covariance(
        {matrix: moment.mean().cpu() for matrix, moment in module.moments.items()},
        Provenance(
            model=lm.name,
            fingerprint=lm.fingerprint,
            corpus=corpus,
            tokens=held,
            sequence_length=sequence_length,
            dtype=_name(lm.dtype),
            seed=seed if text is None else None,
        ),
    )
    if folder is not None:
        covariance.save(folder)
    return replace(covariance, folder=folder)


def covariance_folder(
    lm: LanguageModel, corpus: str, tokens: int, sequence_length: int, seed: int | None, root: Path | None = None
) -> Path:
    """Where `estimate_covariance` keeps a result: one folder for each model, dtype, corpus and amount of text."""
    words = re.sub(r"[^\w.]+", "-", corpus)
    sampled = "" if seed is None else f"_seed{seed}"
    name = f"{words}_{tokens}x{sequence_length}{sampled}_{_name(lm.dtype)}"
    return (root or cache_folder() / "stats") / lm.fingerprint / name


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _corpus(text: str | Path | None) -> str:
    if text is None:
        return "own writing"
    if not Path(text).is_file():
        return str(text)
    with Path(text).open("rb") as file:
        return f"{Path(text).name} sha256 {hashlib.file_digest(file, 'sha256').hexdigest()[:12]}"


class _Progress(Callback):
    """Reports how many of `total` tokens are done."""

    def __init__(self, report: Report, total: int) -> None:
        self.report, self.done, self.total = report, 0, total

    def on_predict_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Batch, *_: Any
    ) -> None:
        self.done += int(batch.mask.sum())
        self.report(self.done, self.total)
