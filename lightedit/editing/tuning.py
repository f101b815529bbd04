"""Settings of MEMIT for a model that nobody has tuned, found by a short search on facts that the model knows."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import chain, zip_longest
from pathlib import Path

from torch import Tensor

from lightedit.data.builtin import builtin_facts
from lightedit.data.facts import Fact
from lightedit.digests import digest
from lightedit.editing.settings import RunSettings
from lightedit.editing.trials import FORMAT, Trial, Tuning, TuningSettings, method_with
from lightedit.errors import ArgumentError
from lightedit.evaluation.evaluate import evaluate
from lightedit.evaluation.settings import EvaluationSettings
from lightedit.files import whole_file
from lightedit.lm import LanguageModel
from lightedit.lm.arguments import check_model
from lightedit.lm.loading import cache_folder
from lightedit.methods.closed_form.memit import MEMIT
from lightedit.methods.protocol import Editor, search
from lightedit.metrics.scoring import score_targets
from lightedit.progress import Report, progress, subprogress
from lightedit.statistics.covariance import Covariance
from lightedit.statistics.estimation import estimate_covariance

_EVERY = 4  # of the built-in facts are scored to find those that the model knows
_QUIET = EvaluationSettings(progress_bar=False)


def tune(
    lm: LanguageModel,
    facts: Sequence[Fact] | None = None,
    *,
    settings: TuningSettings | None = None,
    progress_bar: bool = True,
) -> MEMIT:
    """Find settings of MEMIT for `lm`: layers, clamp and share, in the model's own units.

        edit = le.edit(lm, facts, le.tune(lm))

    Each trial edits a few facts that the model knows, scores the edit and takes it back. Values are searched once for
    each depth and clamp; one layer and several are written, with several shares. Trials are kept in the user's cache
    folder as they finish, so an interrupted search goes on, and a finished one is read. See `tuning` for the figures.

    Args:
        lm: the model, unedited.
        facts: facts with a true target, paraphrases and neighbourhood prompts; by default built-in ones that the model
            knows.
        settings: what is tried.
        progress_bar: show progress and the time left on standard error.

    Raises:
        ArgumentError: the model is edited, or `facts` lack what a trial is scored on.
    """
    return tuning(lm, facts, settings=settings, progress_bar=progress_bar).method


def tuned_method(lm: LanguageModel, *, progress_bar: bool = True) -> MEMIT:
    """The method of runs without one: that of `tune`, with a line on standard error that says so."""
    found = tuning(lm, progress_bar=progress_bar)
    if progress_bar:
        print(f"no method was given: {found.summary}, as tuned for {lm.name}", file=sys.stderr)
    return found.method


def tuning(
    lm: LanguageModel,
    facts: Sequence[Fact] | None = None,
    *,
    settings: TuningSettings | None = None,
    progress_bar: bool = True,
) -> Tuning:
    """The search of `tune`, with all its figures. Arguments and errors are those of `tune`."""
    check_model(lm, what="tuning")
    settings = settings or TuningSettings()
    if facts is not None:
        _check_facts(facts)
    path = tuning_file(lm, facts, settings)
    found = _read(path) or Tuning(lm.name, lm.fingerprint, settings)
    if len(found.trials) >= _planned(lm, found):
        return found
    if lm.weights.edits:
        raise ArgumentError(
            f"{lm.name} carries edits ({', '.join(lm.weights.edits)}) and was not tuned before; revert them first"
        )
    chosen = known_facts(lm, settings.facts) if facts is None else list(facts)
    windows = windows_of(lm, settings).values()
    layers = sorted({layer for of_layer in windows for window in of_layer for layer in window})
    covariance = estimate_covariance(lm, layers, seed=settings.seed, cache=True, progress_bar=progress_bar)
    path.parent.mkdir(parents=True, exist_ok=True)
    with progress(f"tuning {lm.name}", progress_bar) as report:
        for trials in _Search(lm, chosen, covariance, settings).run(found, report):
            found = trials
            with whole_file(path) as unfinished:
                unfinished.write_text(json.dumps(found.to_dict(), indent=1) + "\n", encoding="utf-8")
    return found


def tuning_file(lm: LanguageModel, facts: Sequence[Fact] | None, settings: TuningSettings) -> Path:
    """Where the trials are kept: one file for each model, dtype, facts and settings."""
    inputs = [None if facts is None else [fact.to_dict() for fact in facts], asdict(settings), str(lm.dtype)]
    return cache_folder() / "tuning" / f"{lm.fingerprint}_{digest(json.dumps(inputs))[:12]}.json"


class _Search:
    """The trials on one model."""

    def __init__(self, lm: LanguageModel, facts: list[Fact], covariance: Covariance, settings: TuningSettings) -> None:
        self.lm, self.facts, self.covariance, self.settings = lm, facts, covariance, settings
        self.rounds = [list(range(len(facts)))]
        self.run_settings = RunSettings(on_collision="keep", progress_bar=False)
        self.NS_before = evaluate(lm, facts, settings=_QUIET).scores["NS"]

    def run(self, known: Tuning, report: Report) -> Iterator[Tuning]:
        """The tuning after each further trial."""
        windows, clamps = windows_of(self.lm, self.settings), self.settings.clamps
        searches = [(layer, clamps[0]) for layer in windows]
        total, done = len(windows) + len(clamps) - 1, 0
        for further in (False, True):
            if further:
                searches = [(known.best.layers[-1], clamp) for clamp in clamps[1:]]
            for layer, clamp in searches:
                part = subprogress(report, done, 1, total)
                for trial in self._trials(windows[layer], clamp, known, part):
                    known = replace(known, trials=(*known.trials, trial))
                    yield known
                done += 1
                report(done, total)

    def _trials(
        self, windows: Sequence[tuple[int, ...]], clamp: float, known: Tuning, report: Report
    ) -> Iterator[Trial]:
        """The trials with values of one search that are not known yet, one for each window and share."""
        made = {(trial.layers, trial.clamp, trial.share) for trial in known.trials}
        tried = [(layers, share) for layers in windows for share in self.settings.shares]
        first: Editor | None = None
        values: dict[int, Tensor] = {}
        for layers, share in tried:
            if (layers, clamp, share) in made:
                continue
            method = replace(method_with(self.settings, layers, clamp, share), passes=1)  # the settings' own merits
            editor = method.editor(self.lm, covariance=self.covariance, settings=self.run_settings)
            editor.prepare(self.facts, self.rounds, first)
            editor.give(values)
            search(editor, self.rounds[0], editor.make_optimizer(), report)
            first, values = first or editor, values or dict(editor.results)
            owner = ("tuning", 0)
            try:
                editor.write(self.rounds[0], owner)
                scores = evaluate(self.lm, self.facts, settings=_QUIET).scores
            finally:
                self.lm.weights.remove([kept for kept in self.lm.weights.owners if kept == owner])
            yield Trial(layers, clamp, share, scores["efficacy_accuracy"], scores["PS"], scores["NS"], self.NS_before)


def windows_of(lm: LanguageModel, settings: TuningSettings) -> dict[int, list[tuple[int, ...]]]:
    """Layer of the values at each depth -> the layers to edit: this one, and several that end there.

    Several are a sixth of the model's blocks, at most five, as published for models of 28 to 48 blocks.
    """
    size = min(5, max(1, round(lm.n_layers / 6)))
    last = sorted({min(lm.n_layers - 1, max(0, round(depth * lm.n_layers))) for depth in settings.depths})
    return {
        layer: sorted({tuple(range(max(0, layer - count + 1), layer + 1)) for count in (1, size)}, key=len)
        for layer in last
    }


def _planned(lm: LanguageModel, found: Tuning) -> int:
    """The number of trials in all, once the first ones show at which depth further bounds are tried."""
    settings, windows = found.settings, windows_of(lm, found.settings)
    counts = {layer: len(of_layer) * len(settings.shares) for layer, of_layer in windows.items()}
    first = replace(found, trials=found.trials[: sum(counts.values())])
    further = counts[first.best.layers[-1]] if first.trials else 1
    return sum(counts.values()) + (len(settings.clamps) - 1) * further


def known_facts(lm: LanguageModel, count: int) -> list[Fact]:
    """Built-in facts of all relations whose right answer is most probable to `lm`."""
    facts = [fact for fact in builtin_facts() if fact.neighborhood_prompts][::_EVERY]
    scores = score_targets(lm, [fact.text for fact in facts], [str(fact.target_true) for fact in facts])
    by_relation: dict[str | None, list[Fact]] = {}
    for index in scores.nll.argsort().tolist():
        by_relation.setdefault(facts[index].relation, []).append(facts[index])
    in_turn = chain.from_iterable(zip_longest(*by_relation.values()))
    return [fact for fact in in_turn if fact is not None][:count]


def _check_facts(facts: Sequence[Fact]) -> None:
    needed: dict[str, Callable[[Fact], object]] = {
        "target_true": lambda fact: fact.target_true,
        "paraphrase_prompts": lambda fact: fact.paraphrase_prompts,
        "neighborhood_prompts": lambda fact: fact.neighborhood_prompts,
    }
    if not facts:
        raise ArgumentError("facts: the list is empty; give some, or leave it out for built-in ones")
    for name, value in needed.items():
        if not any(value(fact) for fact in facts):
            raise ArgumentError(
                f"facts: none has {name}, on which trials are scored; give facts with it, or leave facts out: built-in "
                "ones are used then"
            )


def _read(path: Path) -> Tuning | None:
    """The tuning in a file; None if there is none. A file that cannot be read is tuned again."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Tuning.from_dict(content) if content["format"] == FORMAT else None
    except (OSError, ValueError, LookupError, TypeError):
        return None
