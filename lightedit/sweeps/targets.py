"""Results of step 1 on the unedited model, computed once for all runs with the same settings, and kept on disk."""

import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightedit.data.facts import Fact
from lightedit.data.modules import chunks_by_suffix
from lightedit.data.words import counted
from lightedit.digests import digest
from lightedit.editing.settings import RunSettings
from lightedit.errors import ArgumentError
from lightedit.files import whole_file
from lightedit.lm import LanguageModel
from lightedit.methods.protocol import Editor, Method, search
from lightedit.progress import progress, subprogress
from lightedit.sweeps.plan import Run


class TargetStore:
    """The values of a sweep's facts at the unedited model, by the settings on which they depend.

    Values do not depend on the preservation term or on counts. Of the method, they depend only on its `search_inputs`:
    site, value layer, contexts and settings of the value optimisation. Each chunk of facts has a file of its own, so
    an interrupted search resumes after the last chunk.

    Args:
        folder: folder of the files.
        lm: the unedited model.
        facts: the facts of the sweep, in order.
        runs: all runs of the sweep; they determine for how many facts values are needed.
        settings: settings of the runs.
    """

    def __init__(
        self, folder: Path, lm: LanguageModel, facts: Sequence[Fact], runs: Iterable[Run], settings: RunSettings
    ) -> None:
        self.folder, self.lm, self.facts, self.settings = folder, lm, facts, settings
        self._needed: dict[str, int] = {}
        self._first: dict[str, Run] = {}
        for run in runs:
            if (key := self.key(run.method)) is not None:
                self._needed[key] = max(self._needed.get(key, 0), run.facts_per_round)
                self._first.setdefault(key, run)

    def key(self, method: Method) -> str | None:
        """16 hexadecimal digits, a digest of everything that determines the values; None for methods without search."""
        if (inputs := method.search_inputs()) is None:
            return None
        settings = {
            "model": self.lm.fingerprint,
            "dtype": str(self.lm.dtype),
            **inputs,
            "facts": [
                (fact.prompt, fact.subject, fact.target_new, *fact.serving, fact.position) for fact in self.facts
            ],
        }
        return digest(json.dumps(settings, sort_keys=True), {})[:16]

    def find(self, run: Run, editor: Editor) -> tuple[dict[int, Tensor], float]:
        """The values of the facts in the run's first round.

        Missing values are searched for all facts that any run with the same settings needs.

        Args:
            run: the run.
            editor: an editor that was prepared for the run.

        Returns:
            Fact's index -> value, and the seconds of the search if this is the sweep's first run with these settings,
            else 0.

        Raises:
            NumericalError: a loss is NaN or infinite.
            ArgumentError: a file is damaged.
        """
        key = self.key(run.method)
        if key is None:
            return {}, 0.0
        folder = self.folder / key
        found, seconds = _read(folder)
        missing = [index for index in range(self._needed[key]) if index not in found]
        if missing:
            folder.mkdir(parents=True, exist_ok=True)
            seconds += self._search(folder, missing, found, editor)
        own = seconds if run == self._first[key] else 0.0
        return {index: found[index] for index in range(run.facts_per_round)}, own

    def _search(self, folder: Path, missing: Sequence[int], found: dict[int, Tensor], editor: Editor) -> float:
        """Search the values of the missing facts, and add them to `found` and to the folder; returns the seconds."""
        searcher = editor.method.editor(self.lm, covariance=editor.covariance, settings=self.settings)
        searcher.prepare(self.facts[: max(missing) + 1], None, like=editor)
        optimizer = searcher.make_optimizer()
        done, seconds = 0, 0.0
        with progress(f"values of {counted(len(missing))}", self.settings.progress_bar) as report:
            for chunk in chunks_by_suffix(self.facts, missing, self.settings.facts_per_chunk):
                started = time.perf_counter()
                search(searcher, chunk, optimizer, subprogress(report, done, len(chunk), len(missing)))
                targets = torch.stack([searcher.results.pop(index) for index in chunk]).cpu()
                spent = time.perf_counter() - started
                _write(folder, chunk, targets, spent)
                found.update(zip(chunk, targets, strict=True))
                seconds, done = seconds + spent, done + len(chunk)
        return seconds


def _read(folder: Path) -> tuple[dict[int, Tensor], float]:
    found: dict[int, Tensor] = {}
    seconds = 0.0
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as opened:
                indices, targets = opened.get_tensor("indices").tolist(), opened.get_tensor("targets")
                seconds += float(opened.metadata()["seconds"])
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ArgumentError(f"{file} is damaged ({error}); delete it, and its values are searched again") from error
        found.update(zip(indices, targets, strict=True))
    return found, seconds


def _write(folder: Path, indices: Sequence[int], targets: Tensor, seconds: float) -> None:
    """Write the values [facts, d] of one chunk to a file, atomically."""
    path = folder / f"{min(indices)}.safetensors"
    tensors = {"indices": torch.tensor(indices), "targets": targets.contiguous()}
    with whole_file(path) as unfinished:
        save_file(tensors, unfinished, metadata={"seconds": repr(seconds)})
