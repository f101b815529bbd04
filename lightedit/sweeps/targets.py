"""Step 1 on the unedited model, done once for all runs that share its settings and kept on disk."""

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
from lightedit.data.prompts import tokenize_facts
from lightedit.digests import digest
from lightedit.files import whole_file
from lightedit.lm import LanguageModel
from lightedit.methods import Method
from lightedit.methods.closed_form.values import optimize_values
from lightedit.progress import progress, subprogress
from lightedit.sweeps.plan import Run


class TargetStore:
    """Value vectors of a sweep's facts at the unedited model, by the settings that they depend on.

    They do not depend on the preservation term, on counts, or on the method but for its site, value layer, contexts
    and settings of the value optimisation. One file holds the facts of one chunk, so an interrupted search goes on
    where it was.

    Args:
        folder: where they are kept.
        lm: the model, unedited.
        facts: the facts of the sweep, in order.
        runs: all runs of the sweep; they tell for how many facts values are needed.
    """

    def __init__(self, folder: Path, lm: LanguageModel, facts: Sequence[Fact], runs: Iterable[Run]) -> None:
        self.folder, self.lm, self.facts = folder, lm, facts
        self._needed: dict[str, int] = {}
        self._first: dict[str, Run] = {}
        for run in runs:
            key = self.key(run.method)
            self._needed[key] = max(self._needed.get(key, 0), run.facts_per_round)
            self._first.setdefault(key, run)

    def key(self, method: Method) -> str:
        """16 hexadecimal digits that stand for all that the values depend on."""
        settings = {
            "model": self.lm.fingerprint,
            "dtype": str(self.lm.dtype),
            "site": method.site,
            "layer": method.value_layer,
            "values": repr(method.values),  # names the classes of nested settings too
            "contexts": repr(method.contexts),
            "facts": [(fact.prompt, fact.subject, fact.target_new) for fact in self.facts],
        }
        return digest(json.dumps(settings, sort_keys=True))[:16]

    def find(self, run: Run, facts_per_chunk: int = 32, progress_bar: bool = True) -> tuple[dict[int, Tensor], float]:
        """The values of the facts in the run's first round.

        What is not known yet is searched for as many facts as any run of the same settings needs.

        Returns:
            Fact's index -> value [d], or [2 d] for two sites, and the seconds that the search took if this is the first
            run of those settings in the sweep, else 0.

        Raises:
            FloatingPointError: a loss is NaN or infinite.
            ValueError: a file is damaged.
        """
        method, key = run.method, self.key(run.method)
        folder = self.folder / key
        found, seconds = _read(folder)
        missing = [index for index in range(self._needed[key]) if index not in found]
        if missing:
            folder.mkdir(parents=True, exist_ok=True)
            contexts = method.contexts.sample(self.lm)
            prompts = tokenize_facts(self.lm.tokenizer, self.facts[: self._needed[key]], contexts)
            done = 0
            with progress(f"values of {len(missing)} facts", progress_bar) as report:
                for chunk in chunks_by_suffix(self.facts, missing, facts_per_chunk):
                    started = time.perf_counter()
                    values = optimize_values(
                        self.lm,
                        [prompts[index] for index in chunk],
                        method.value_layer,
                        method.site,
                        method.values,
                        report=subprogress(report, done, len(chunk), len(missing)),
                    )
                    targets, spent = values.targets.cpu(), time.perf_counter() - started
                    _write(folder, chunk, targets, spent)
                    found.update(zip(chunk, targets, strict=True))
                    seconds, done = seconds + spent, done + len(chunk)
        own = seconds if run == self._first[key] else 0.0
        return {index: found[index] for index in range(run.facts_per_round)}, own


def _read(folder: Path) -> tuple[dict[int, Tensor], float]:
    found: dict[int, Tensor] = {}
    seconds = 0.0
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as opened:
                indices, targets = opened.get_tensor("indices").tolist(), opened.get_tensor("targets")
                seconds += float(opened.metadata()["seconds"])
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file} is damaged ({error}); delete it, and its values are searched again") from error
        found.update(zip(indices, targets, strict=True))
    return found, seconds


def _write(folder: Path, indices: Sequence[int], targets: Tensor, seconds: float) -> None:
    """Keep the values [facts, d] of one chunk in a file that appears whole or not at all."""
    path = folder / f"{min(indices)}.safetensors"
    tensors = {"indices": torch.tensor(indices), "targets": targets.contiguous()}
    with whole_file(path) as unfinished:
        save_file(tensors, unfinished, metadata={"seconds": repr(seconds)})
