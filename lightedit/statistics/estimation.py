"""Estimating the second moments of keys over text, of all matrices in one pass that ends at the deepest of them."""

import hashlib
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from lightedit.data.texts import TextDataModule, read_texts, token_windows, write_texts
from lightedit.lm import LanguageModel, Place
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
        gram: Σ k kᵀ, [d, d] float32, on and below the diagonal.
        count: how many keys it sums.
    """

    def __init__(self, d: int, device: torch.device | str = "cpu") -> None:
        self.gram = torch.zeros(d, d, dtype=torch.float32, device=device)
        self.count = 0

    @torch.no_grad()
    def update(self, keys: Tensor, mask: Tensor | None = None, count: int | None = None) -> None:
        """Add keys [n, d] of any floating-point dtype, only those where the boolean `mask` [n] is True.

        `count` says how many these are; without it they are counted, for which a GPU has to be waited for.
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
    """Accumulates the second moments at all `matrices` in a trainer's predict loop over a `TextDataModule`.

    With several processes, each sees its share of the text and all end with the sums over all of it.

    Attributes:
        moments: matrix -> second moment of what it has seen.
    """

    def __init__(self, lm: LanguageModel, matrices: Iterable[Place]) -> None:
        super().__init__()
        chosen = sorted(matrices)
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
        mask, count = batch.mask.flatten(), int(batch.mask.sum())  # counted once, and as a rule on the CPU
        for matrix, moment in self.moments.items():
            seen = keys.pop(matrix)  # [rows, tokens, d_in]
            mask = mask.to(seen.device)
            moment.update(seen.flatten(0, 1), mask, count)

    def on_predict_epoch_end(self) -> None:
        strategy = self.trainer.strategy
        for moment in self.moments.values():
            count = torch.tensor(moment.count, device=moment.gram.device)
            moment.gram = strategy.reduce(moment.gram, reduce_op="sum")
            moment.count = int(strategy.reduce(count, reduce_op="sum"))


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
    matrices = {Place(layer) for layer in layers}
    if attention:
        matrices |= {Place(layer, "attention_out") for layer in layers}
    d_in = max(lm.weight(matrix).shape[1] for matrix in matrices)
    tokens = TOKENS_PER_DIMENSION * d_in if tokens is None else tokens
    enough = f"at least d_in = {d_in} are needed and {TOKENS_PER_DIMENSION * d_in} recommended"
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
        if (folder / FILE).is_file():
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
        trainer = own_trainer(
            inference_mode=False,  # buffers a model makes on the way would be unusable in a later backward pass
            logger=False,
            enable_checkpointing=False,
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
