"""Estimation of covariances. One forward pass serves all matrices, and it ends at the deepest of them."""

import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from lightedit.data.texts import TextDataModule, read_texts, token_windows, write_texts
from lightedit.digests import file_digest
from lightedit.errors import ArgumentError, ArgumentTypeError
from lightedit.lm import LanguageModel, Place
from lightedit.lm.arguments import check_model
from lightedit.lm.batch import Batch
from lightedit.lm.hooks import capture, stop_after
from lightedit.lm.loading import cache_folder
from lightedit.ops import mirror_, second_moment_
from lightedit.progress import Report, progress, quiet_lightning
from lightedit.runs.trainer import own_trainer
from lightedit.statistics.covariance import FILE, TOKENS_PER_DIMENSION, Covariance, CovarianceError, Provenance


class SecondMoment:
    """A running sum of k kᵀ, accumulated in float32.

    Attributes:
        gram: Σ k kᵀ, [d, d] float32; only entries on and below the diagonal are valid.
        count: number of keys in the sum.
    """

    def __init__(self, d: int, device: torch.device | str = "cpu") -> None:
        self.gram = torch.zeros(d, d, dtype=torch.float32, device=device)
        self.count = 0

    @torch.no_grad()
    def update(self, keys: Tensor, mask: Tensor | None = None, count: int | None = None) -> None:
        """Add keys to the sum.

        Args:
            keys: [n, d], of any floating-point dtype.
            mask: [n] bool; only keys where it is True are added. None adds all.
            count: number of added keys. None counts the mask, which synchronises with a GPU.
        """
        keys = keys.to(self.gram.device)
        second_moment_(self.gram, keys, mask)
        if count is None:
            count = len(keys) if mask is None else int(mask.sum())
        self.count += count

    def mean(self) -> Tensor:
        """E[k kᵀ], [d, d] float32."""
        if not self.count:
            raise CovarianceError("the mean of no keys is undefined; update the second moment first")
        return mirror_(self.gram / self.count)


class CovarianceModule(LightningModule):
    """Accumulates the second moments at all `places` in a trainer's predict loop over a `TextDataModule`.

    With several processes, each reads its share of the text, and at the end all hold the sums over the whole text.

    Attributes:
        moments: place -> second moment of the keys so far.
    """

    def __init__(self, lm: LanguageModel, places: Iterable[Place]) -> None:
        super().__init__()
        chosen = sorted(places)
        lm.check_layers(sorted({place.layer for place in chosen}))
        self.lm = lm
        weights = {place: lm.weight(place) for place in chosen}
        self.moments = {place: SecondMoment(weight.shape[1], weight.device) for place, weight in weights.items()}

    @torch.no_grad()
    def predict_step(self, batch: Batch) -> None:
        modules = {place: self.lm.module(place) for place in self.moments}
        # places sort in the order in which they run; parallel blocks, too, compute their attention first
        with capture(modules, len(batch.ids), inputs=True) as keys, stop_after(modules[max(modules)]):
            self.lm.forward(batch)
        mask, count = batch.mask.flatten(), int(batch.mask.sum())  # counted once, normally on the CPU
        for place, moment in self.moments.items():
            seen = keys.pop(place)  # [rows, tokens, d_in]
            mask = mask.to(seen.device)
            moment.update(seen.flatten(0, 1), mask, count)

    def on_predict_epoch_end(self) -> None:
        strategy = self.trainer.strategy
        for moment in self.moments.values():
            count = torch.tensor(moment.count, device=moment.gram.device)
            moment.gram = strategy.reduce(moment.gram, reduce_op="sum")
            moment.count = int(strategy.reduce(count, reduce_op="sum"))


class NeedsCovariance(Protocol):
    """A method that reads second moments, such as `MEMIT`."""

    @property
    def covariance_places(self) -> tuple[Place, ...]:
        """The places whose second moments it reads."""


def estimate_covariance(
    lm: LanguageModel,
    places: NeedsCovariance | Sequence[Place | int],
    *,
    text: str | Path | None = None,
    tokens: int | None = None,
    sequence_length: int | None = None,
    max_tokens: int = 4096,
    seed: int = 0,
    progress_bar: bool = True,
    cache: bool | Path = False,
) -> Covariance:
    """Estimate the covariances of matrices of the unedited model.

        covariance = estimate_covariance(lm, MEMIT(layers=[4, 5, 6, 7, 8]), text="wikipedia.txt")

    Args:
        lm: the model.
        places: the method to edit with; or a list of places, such as `Place(5, "attention_out")`, and layers. A layer
            means its MLP's second matrix.
        text: a `.txt` file or a data set (see `read_texts`); None for self-generated text.
        tokens: number of tokens; default 10 d_in, which keeps at least 95 % of the score of 100 times as many (arXiv
            2506.04226).
        sequence_length: tokens of one window; default 256, or 128 for self-generated text, of which more windows are
            generated at once.
        max_tokens: tokens of one forward pass at most; bounds memory.
        seed: seed of self-generated text.
        progress_bar: whether to show progress and the time left on standard error.
        cache: whether to keep the result in the user's cache folder, or the path of another folder for it. A result
            that is already there is loaded instead.

    Raises:
        TypeError: `lm` is no language model.
        ArgumentError: there are no places, a layer does not exist, or `sequence_length` is out of range.
        CovarianceError: the model is edited, or there are fewer tokens than a positive definite matrix needs.
    """
    check_model(lm, what="a covariance")
    chosen = _places(lm, places)
    if lm.weights.edits:
        raise CovarianceError(f"{lm.name} carries edits ({', '.join(lm.weights.edits)}); revert them first")
    sample = _Sample.of(lm, chosen, text, tokens, sequence_length, seed)
    folder = None
    if cache:
        root = None if cache is True else Path(cache)
        folder = covariance_folder(lm, sample.corpus, sample.tokens, sample.length, sample.seed, root)
        if (folder / FILE).is_file():
            known = Covariance.load(folder)
            if chosen <= known.moments.keys():
                return known
            chosen |= known.moments.keys()
    windows = sample.windows(lm, progress_bar)
    held = sum(map(len, windows))
    module = CovarianceModule(lm, chosen)
    with progress("covariance", progress_bar) as report, quiet_lightning():
        trainer = own_trainer(
            inference_mode=False,  # buffers created in inference mode would fail in a later backward pass
            logger=False,
            enable_checkpointing=False,
            callbacks=[_Progress(report, held)],
        )
        trainer.predict(module, TextDataModule(windows, lm.pad_id, max_tokens), return_predictions=False)
    moments = {place: moment.mean().cpu() for place, moment in module.moments.items()}
    provenance = Provenance(
        model=lm.name,
        fingerprint=lm.fingerprint,
        corpus=sample.corpus,
        tokens=held,
        sequence_length=sample.length,
        dtype=_name(lm.dtype),
        seed=sample.seed,
    )
    covariance = Covariance(moments, provenance, folder)
    if folder is not None:
        covariance.save(folder)
    return covariance


def _places(lm: LanguageModel, given: NeedsCovariance | Sequence[Place | int]) -> set[Place]:
    if not isinstance(given, Sequence) and not hasattr(given, "covariance_places"):
        raise ArgumentTypeError(f"places: expected a method, or a list of places or layers, got {given!r}")
    found = given if isinstance(given, Sequence) else given.covariance_places
    places = {Place(place) if isinstance(place, int) else place for place in found}
    if not places:
        raise ArgumentError("places: none are given; give a method that needs a covariance, or the layers to edit")
    lm.check_layers(sorted({place.layer for place in places}))
    return places


@dataclass(frozen=True)
class _Sample:
    """The text that a covariance is estimated on.

    Attributes:
        text: the source; None for self-generated text.
        tokens: number of tokens.
        length: tokens of one window.
        seed: seed of self-generated text, else None.
        corpus: name of the source in provenance.
        least: the largest d_in. With fewer tokens some moment is not positive definite.
    """

    text: str | Path | None
    tokens: int
    length: int
    seed: int | None
    corpus: str
    least: int

    @classmethod
    def of(
        cls,
        lm: LanguageModel,
        places: Iterable[Place],
        text: str | Path | None,
        tokens: int | None,
        length: int | None,
        seed: int,
    ) -> "_Sample":
        least = max(lm.weight(place).shape[1] for place in places)
        tokens = TOKENS_PER_DIMENSION * least if tokens is None else tokens
        if length is None:
            length = 128 if text is None else 256
        limit = lm.positions or length
        if tokens < least:
            raise CovarianceError(f"{tokens} tokens give no positive definite covariance; {_enough(least)}")
        if not 2 <= length <= limit:
            raise ArgumentError(f"sequence_length must be from 2 to the {limit} positions of {lm.name}, got {length}")
        return cls(text, tokens, length, seed if text is None else None, _corpus(text), least)

    def windows(self, lm: LanguageModel, progress_bar: bool) -> list[list[int]]:
        """The text as token windows."""
        if self.text is None:
            return write_texts(lm, self.tokens, self.length, self.seed or 0, progress_bar=progress_bar)
        windows = token_windows(lm, read_texts(self.text), self.tokens, self.length)
        held = sum(map(len, windows))
        if held < self.least:
            raise CovarianceError(f"{self.text} holds {held} tokens; {_enough(self.least)}")
        if held < self.tokens:
            warning = f"{self.text} holds {held} of {self.tokens} tokens asked for; {_enough(self.least)}"
            warnings.warn(warning, stacklevel=3)  # points to the call of `estimate_covariance`
        return windows


def _enough(least: int) -> str:
    return f"at least d_in = {least} are needed and {TOKENS_PER_DIMENSION * least} recommended"


def covariance_folder(
    lm: LanguageModel, corpus: str, tokens: int, sequence_length: int, seed: int | None, root: Path | None = None
) -> Path:
    """The folder of a cached result of `estimate_covariance`, one for each model, dtype, corpus and amount of text."""
    words = re.sub(r"[^\w.]+", "-", corpus)
    sampled = "" if seed is None else f"_seed{seed}"
    name = f"{words}_{tokens}x{sequence_length}{sampled}_{_name(lm.dtype)}"
    return (root or cache_folder() / "stats") / lm.fingerprint / name


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _corpus(text: str | Path | None) -> str:
    if text is None:
        return "self-generated text"
    if not Path(text).is_file():
        return str(text)
    return f"{Path(text).name} sha256 {file_digest(text)[:12]}"


class _Progress(Callback):
    """Reports the number of processed tokens of `total`."""

    def __init__(self, report: Report, total: int) -> None:
        self.report, self.done, self.total = report, 0, total

    def on_predict_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Batch, *_: Any
    ) -> None:
        self.done += int(batch.mask.sum())
        self.report(self.done, self.total)
