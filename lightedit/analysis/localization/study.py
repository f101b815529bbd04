"""A localisation study: facts are edited at each of several layers, for several problems, and scored."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightedit.analysis.localization.facts import StudiedFact, check_facts, edited_fact, known, studied
from lightedit.analysis.localization.measuring import Rows, measure, rows_of
from lightedit.analysis.localization.methods import FORCING, METHODS, check_methods, placed
from lightedit.analysis.localization.noised import NoisedSubjects
from lightedit.analysis.localization.result import Cell, LocalizationStudy
from lightedit.analysis.localization.scores import Measured
from lightedit.analysis.localization.settings import LocalizationSettings, Problem
from lightedit.analysis.noise import noise_level
from lightedit.analysis.prompts import TracedPrompt
from lightedit.data.fact import Fact
from lightedit.data.words import counted
from lightedit.digests import digest
from lightedit.lm import LanguageModel
from lightedit.lm.arguments import check_model
from lightedit.methods.needs import covariance_for
from lightedit.methods.protocol import Editor, Method, search
from lightedit.progress import Report, progress, subprogress
from lightedit.runs.kept import KeptRecords, kept_records
from lightedit.runs.provenance import computing, fingerprint_inputs
from lightedit.statistics.covariance import Covariance

_PREPARING = 2.0  # time of preparing a fact, relative to editing and scoring it once; used only by the progress bar
_SEARCH = 0.8  # share of the time of an edit that its search takes; used only by the progress bar


def localization_study(
    lm: LanguageModel,
    facts: Sequence[Fact],
    methods: Mapping[str, Method] | None = None,
    *,
    forcing: Mapping[str, Method] | None = None,
    covariance: Covariance | None = None,
    settings: LocalizationSettings | None = None,
    checkpoint: str | Path | None = None,
) -> LocalizationStudy:
    """Edit facts at each of several layers, and set the scores beside tracing effects (Hase et al., 2023).

        study = localization_study(lm, read_facts("counterfact.json", limit=60))
        study.save("studies/first")

    Each fact that the model knows is edited alone into the unedited model, scored and taken back, for every problem,
    method and layer. The model's weights are the same afterwards. See arXiv 2301.04213, and `Problem` for the problems.

    Args:
        lm: the language model.
        facts: facts with subjects and true answers.
        methods: name, chosen freely -> method. It is moved to every layer: a method of several layers takes as many,
            centred on the layer and cut at the model's first and last one. By default ROME and MEMIT with 5 layers.
        forcing: name -> the method's settings for fact forcing, where they differ; by default those of ROME.
        covariance: second moments at the places of all methods at all layers; by default they are estimated from
            self-generated text and kept in the cache.
        settings: what is edited and scored, and how.
        checkpoint: a folder of this run only, in which finished parts are stored. After an interruption, the same call
            resumes from them. Delete it once the study is saved.

    Raises:
        FactError: there are no facts, none that the model knows, or one that cannot be studied.
        ArgumentError: a layer is out of range, a window has more layers than the model, or a method cannot be moved,
            erase facts, or edit under noise, as a problem needs.
        CovarianceError: the covariance is of another model, lacks a place, or is not positive definite.
        NumericalError: a search, an update or a score gave NaN or infinity.
        ResumeError: `checkpoint` holds another run or a damaged file, or another process uses it.
    """
    check_model(lm)
    settings = settings or LocalizationSettings()
    if methods is None:
        methods, forcing = METHODS, FORCING if forcing is None else forcing
    forcing = {name: (forcing or {}).get(name, method) for name, method in methods.items()}
    layers = settings.layers_of(lm)
    check_methods(lm, methods, forcing, layers, settings.problems)
    prompts = check_facts(lm, facts, settings)
    every = [placed(method, lm, layer) for method in methods.values() for layer in layers]
    if covariance is not None:
        covariance.check(lm, sorted({place for method in every for place in method.covariance_places}), factor=False)
    level = noise_level(lm, prompts, settings.tracing(settings.effect_window))
    chosen, left_out = known(lm, prompts, settings)
    if left_out:
        print(
            f"{len(chosen)} of {counted(len(facts))} are studied; {lm.name} does not know the others: "
            f"{', '.join(map(repr, left_out[:2]))}{', ...' if len(left_out) > 2 else ''}",
            file=sys.stderr,
        )
    covariance = covariance or covariance_for(lm, every, progress_bar=settings.progress_bar)
    study = _Study(lm, methods, forcing, layers, settings, level, covariance)
    inputs = study.inputs(facts)
    with ExitStack() as stack:
        kept: KeptRecords | None = None
        if checkpoint is not None:
            kept = stack.enter_context(kept_records(Path(checkpoint), "localization", inputs))
        report = stack.enter_context(progress(f"studying {counted(len(chosen))}", settings.progress_bar))
        found, cells = study.run([prompts[i] for i in chosen], list(chosen.values()), kept, report)
    described = json.loads(json.dumps({name: method.to_dict() for name, method in methods.items()}))
    return LocalizationStudy(
        lm.name, lm.n_layers, level, settings, layers, described, tuple(found), tuple(cells), tuple(left_out)
    )


@dataclass(frozen=True)
class _Part:
    """Edits that are made and stored together: those of a chunk of facts.

    Attributes:
        problem: what they are for.
        layer: the layer.
        facts: indices of the facts.
    """

    problem: Problem
    layer: int
    facts: range


@dataclass(frozen=True)
class _Study:
    """A study at work."""

    lm: LanguageModel
    methods: Mapping[str, Method]
    forcing: Mapping[str, Method]
    layers: Sequence[int]
    settings: LocalizationSettings
    level: float
    covariance: Covariance | None

    def inputs(self, facts: Sequence[Fact]) -> dict[str, Any]:
        """What determines the result."""
        kept = {name: value for name, value in asdict(self.settings).items() if name != "progress_bar"}
        methods = {name: [method.to_dict(), self.forcing[name].to_dict()] for name, method in self.methods.items()}
        of_text: dict[str, Any] = {}
        if self.covariance is not None:
            moments = {place.key: self.covariance[place] for place in sorted(self.covariance.moments)}
            of_text = {"covariance": asdict(self.covariance.provenance), "covariance tensors": digest("", moments)}
        own = {"methods": methods, "layers": list(self.layers), "settings": kept}
        return {**fingerprint_inputs(self.lm, facts), **computing(self.lm), **of_text, **own}

    def run(
        self, prompts: Sequence[TracedPrompt], probabilities: Sequence[float], kept: KeptRecords | None, report: Report
    ) -> tuple[list[StudiedFact], list[Cell]]:
        """Prepare the facts, then edit and score them part by part; `kept` holds the finished parts."""
        size = self.settings.facts_per_chunk
        chunks = [range(start, min(start + size, len(prompts))) for start in range(0, len(prompts), size)]
        records = {} if kept is None else kept.records
        edits = len(self.methods) * len(self.layers) * len(self.settings.problems)
        work = [_PREPARING * len(chunk) for chunk in chunks] + [float(len(chunk)) for chunk in chunks] * edits
        left = sum(amount for index, amount in enumerate(work) if index not in records)
        done = 0.0

        def reported(index: int) -> Report:
            nonlocal done
            done += work[index]
            return subprogress(report, done - work[index], work[index], left)

        facts: list[StudiedFact] = []
        for index, chunk in enumerate(chunks):
            if index not in records:
                of_part = reported(index)
                found = studied(self.lm, [prompts[i] for i in chunk], [probabilities[i] for i in chunk],
                                self.settings, self.level)  # fmt: skip
                records = _keep(kept, records, index, {"facts": [fact.to_dict() for fact in found]})
                of_part(1, 1)
            facts += [StudiedFact.from_dict(record) for record in records[index]["facts"]]
        number = len(chunks)
        cells: list[Cell] = []
        sources = [prompt.fact for prompt in prompts]
        before: dict[tuple[Problem, range], list[Measured]] = {}
        for name in self.methods:
            for layer in self.layers:
                parts = [_Part(problem, layer, chunk) for problem in self.settings.problems for chunk in chunks]
                like: Editor | None = None
                for part in parts:
                    if number not in records:
                        made, like = self._edited(name, part, sources, facts, before, like, reported(number))
                        records = _keep(kept, records, number, {"cells": [cell.to_dict() for cell in made]})
                    cells += [Cell.from_dict(record) for record in records[number]["cells"]]
                    number += 1
        return facts, cells

    def _edited(
        self,
        name: str,
        part: _Part,
        sources: Sequence[Fact],
        prepared: Sequence[StudiedFact],
        before: dict[tuple[Problem, range], list[Measured]],
        like: Editor | None,
        report: Report,
    ) -> tuple[list[Cell], Editor]:
        """Edit each fact of a part alone, score it, and take the edit back.

        Args:
            name: the method's name.
            part: the part.
            sources: the facts of the study.
            prepared: what was prepared for each.
            before: what was measured in the unedited model, by problem and facts; filled here.
            like: an editor of the same method and layer, whose factors are shared.
            report: reports the progress of this part.

        Returns:
            The cells, and an editor for `like`.
        """
        problem, chunk = part.problem, part.facts
        lm, targets = self.lm, [edited_fact(problem, sources[i], prepared[i]) for i in chunk]
        noised = NoisedSubjects(lm, self.settings, self.level) if problem == "forcing" else None
        with nullcontext() if noised is None else noised.known():
            rows = [rows_of(lm, fact, prepared[i].texts, noised) for i, fact in zip(chunk, targets, strict=True)]
            if (problem, chunk) not in before:
                before[problem, chunk] = measure(lm, rows)
            method = placed((self.forcing if problem == "forcing" else self.methods)[name], lm, part.layer)
            editor = (method.erasing() if problem == "erasure" else method).editor(lm, covariance=self.covariance)
            editor.served = None if noised is None else noised.serving()
            editor.prepare(targets, None, like)
            after: list[Measured] = []
            size = min(len(targets), editor.most_separate or len(targets))
            for start in range(0, len(targets), size):
                together = range(start, min(start + size, len(targets)))
                share = len(together) / len(targets)
                of_search = subprogress(report, start / len(targets), _SEARCH * share, 1)
                search(editor, together, editor.make_optimizer(), of_search)
                after += _measured_alone(editor, together, [rows[index] for index in together])
        report(1, 1)
        cells = [
            Cell(i, problem, name, part.layer, was, now)
            for i, was, now in zip(chunk, before[problem, chunk], after, strict=True)
        ]
        return cells, like or editor


def _measured_alone(editor: Editor, indices: Sequence[int], rows: Sequence[Rows]) -> Iterator[Measured]:
    """What is measured of each of these facts under its own edit alone."""
    edits = editor.separate(indices)
    if edits is not None:
        yield from measure(editor.lm, rows, edits)
        return
    for index, row in zip(indices, rows, strict=True):
        owner = ("alone", index)
        try:
            editor.write([index], owner)
            yield from measure(editor.lm, [row])
        finally:
            editor.lm.weights.remove([owner])


def _keep(
    kept: KeptRecords | None, records: dict[int, dict[str, Any]], index: int, record: dict[str, Any]
) -> dict[int, dict[str, Any]]:
    """Store a record, and return all records."""
    if kept is None:
        records[index] = record
        return records
    kept.add(index, record)
    return kept.records
