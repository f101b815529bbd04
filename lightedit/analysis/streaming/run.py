"""Editing in a stream, as GRACE's tables do (Hartvigsen et al., 2023, arXiv 2211.11031), with any method."""

import json
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightedit.analysis.streaming.keeping import KeptStream, Progress, kept_stream
from lightedit.analysis.streaming.result import Stream, StreamedFact, StreamStep, fmean_or_none, of_records
from lightedit.analysis.streaming.scores import mean_score, paraphrases_of
from lightedit.analysis.streaming.settings import StreamSettings
from lightedit.data.fact import Fact, FactError, served_as
from lightedit.data.prompts import check_facts_fit
from lightedit.data.words import counted
from lightedit.digests import digest
from lightedit.editing.artefact import Edit
from lightedit.editing.outcomes import say, states
from lightedit.editing.settings import RunSettings
from lightedit.errors import NumericalError
from lightedit.evaluation.evaluate import rightly
from lightedit.lm import LanguageModel
from lightedit.lm.changes import Adaptor, Change, DenseUpdate, total
from lightedit.methods.needs import covariance_for
from lightedit.methods.protocol import Editor, Method, check_model_and_method, search
from lightedit.progress import Report, progress
from lightedit.statistics.covariance import Covariance

_SAVED_EVERY = 60.0  # seconds between states on disk at most, besides those at each step


def stream(
    lm: LanguageModel,
    facts: Sequence[Fact],
    method: Method,
    *,
    upstream: Sequence[Fact] = (),
    covariance: Covariance | None = None,
    settings: StreamSettings | None = None,
    checkpoint: str | Path | None = None,
    chat: bool = False,
) -> Stream:
    """Edit facts one after the other, each on top of all earlier ones, and score what is kept.

        result = stream(lm, facts, GRACE(layer=21), upstream=known)
        print(result)

    A fact that the model states already is skipped and counted. ES is the score of a fact right after its edit. Before
    the first edit, after every `score_every` edits and at the end, TRR is the mean score of the upstream facts, and ERR
    that of all facts edited so far. The model carries the edit afterwards; it is `Stream.edit`.

    Args:
        lm: the model.
        facts: the stream, in its order.
        method: any method. Each edit is a round of one fact.
        upstream: facts that the model should go on to know. Their answer is `target_true`, or `target_new` where a fact
            has no true target.
        covariance: second moments at the method's `covariance_places`; by default they are estimated from
            self-generated text and kept in the cache.
        settings: which score, how many edits, and how often it is taken.
        checkpoint: a folder of this stream only, in which its state is stored at each step, and each minute. After an
            interruption, the same call resumes from it. Delete it once the result is saved.
        chat: serve all facts through the model's chat template; see `Fact.chat`.

    Raises:
        FactError: there are no facts, or one cannot be tokenised or is longer than the model's positions.
        ArgumentError: the model lacks the method's layers.
        CovarianceError: the covariance is of another model, lacks a place, or is not positive definite.
        ResumeError: `checkpoint` holds another run or a damaged file, or another process uses it.
    """
    check_model_and_method(lm, method)
    settings = settings or StreamSettings()
    facts, known = served_as(facts, chat=chat), [rightly(fact) for fact in served_as(upstream, chat=chat)]
    check_stream(lm, facts, known, method, settings)
    if covariance is None:
        covariance = covariance_for(lm, [method], progress_bar=settings.progress_bar)
    editor = method.editor(lm, covariance=covariance)
    editor.prepare(facts, [[index] for index in range(len(facts))])
    run = _Run(editor, known, settings)
    with ExitStack() as stack:
        kept: KeptStream | None = None
        if checkpoint is not None:
            kept = stack.enter_context(kept_stream(Path(checkpoint), run.edit.id, run.inputs()))
            run.resume(kept)
        title = f"editing a stream of {counted(len(facts))}"
        try:
            run.go_on(stack.enter_context(progress(title, settings.progress_bar)), kept)
        except BaseException:
            if run.edit.is_applied(lm):
                run.edit.revert(lm)
            raise
        finally:
            editor.release()
    return run.result()


def check_stream(
    lm: LanguageModel, facts: Sequence[Fact], known: Sequence[Fact], method: Method, settings: StreamSettings
) -> None:
    """Raise what `stream` raises before its work, as far as that shows before statistics are estimated."""
    if not facts:
        raise FactError("facts: the list is empty; give at least one fact to edit")
    method.check(lm)
    for name, asked in (("facts", facts), ("upstream", known), ("paraphrases", _paraphrases(facts, settings))):
        try:
            check_facts_fit(lm, asked)
        except FactError as error:
            raise FactError(f"{name}: {error}") from error
    method.check_facts(lm, facts, [[index] for index in range(len(facts))], RunSettings())


def _paraphrases(facts: Sequence[Fact], settings: StreamSettings) -> list[Fact]:
    return paraphrases_of(facts) if settings.paraphrases else []


class _Run:
    """A stream at work."""

    def __init__(self, editor: Editor, known: Sequence[Fact], settings: StreamSettings) -> None:
        self.editor, self.lm, self.known, self.settings = editor, editor.lm, known, settings
        self.edit = Edit.begin(editor)
        self.steps: list[StreamStep] = []
        self.seen: list[StreamedFact] = []
        self.stopped: str | None = None
        self._written: list[int] = []  # indices of the facts that were edited
        self._states: list[dict[str, Tensor]] = []
        self._optimizer = editor.make_optimizer()
        self._saved = time.monotonic()

    def inputs(self) -> dict[str, Any]:
        """What determines the result."""
        settings = asdict(self.settings)
        for name in ("progress_bar", "batch_size"):  # they do not change it
            del settings[name]
        upstream = digest(json.dumps([fact.to_dict() for fact in self.known]), {})
        return {**self.editor.run_inputs(), "upstream": upstream, "stream": settings}

    # Resuming

    def resume(self, kept: KeptStream) -> None:
        """Take what an earlier process stored, if any."""
        self.edit.id = kept.id
        if (found := kept.found) is None:
            return
        own = of_records(found.record)
        self.steps, self.seen = list(own["steps"]), list(own["facts"])
        self._written = [index for index, fact in enumerate(self.seen) if fact.edited]
        self._states = found.states
        self.editor.rounds = [[index] for index in self._written]  # those of skipped facts were never written
        for state in found.states:
            self.editor.restore(state)
        self.lm.weights.made_on[self.edit.id] = self.edit.record.on_top_of
        for changes in found.rounds:
            for place, change in changes.items():
                change = change.to(next(self.lm.module(place).parameters()).device)
                self.lm.weights.add(self.edit.owner(len(self.edit.rounds)), place, change)
            self.edit.rounds.append(changes)
        self.edit.facts_in_round = list(found.facts_in_round)
        self.edit.facts = [self.editor.facts[index] for index in self._written]
        torch.set_rng_state(found.random)
        print(f"continuing after {counted(len(self.seen))}, {len(self._written)} edited", file=sys.stderr)

    def _save(self, kept: KeptStream | None, now: bool) -> None:
        if kept is None or not (now or time.monotonic() - self._saved > _SAVED_EVERY):
            return
        record = {"steps": [asdict(step) for step in self.steps], "facts": [asdict(fact) for fact in self.seen]}
        kept.save(Progress(self.edit.rounds, self.edit.facts_in_round, self._states, record))
        self._saved = time.monotonic()

    # The stream

    def go_on(self, report: Report, kept: KeptStream | None) -> None:
        """Go through the facts that did not come yet."""
        facts, settings = self.editor.facts, self.settings
        if not self.steps:
            self.steps.append(self._step())
        before = len(self.seen)
        while len(self.seen) < len(facts) and len(self._written) < settings.max_edits and self.stopped is None:
            self._next(len(self.seen))
            edited = bool(self.seen) and self.seen[-1].edited
            due = edited and self.stopped is None and len(self._written) % settings.score_every == 0
            if due:
                self._score()
            self._save(kept, due)
            left = min(len(facts) - before, max(1, settings.max_edits))
            report(min(len(self.seen) - before, left), left)
        if self.stopped is None or not self.stopped.startswith("a score"):
            self._score()
        self._save(kept, True)

    def _next(self, index: int) -> None:
        """Skip the next fact or edit it in."""
        fact = self.editor.facts[index]
        try:
            (said,) = say(self.lm, [fact])
            stated = states(self.lm, [fact], [said])[0] != self.editor.method.erases
            if self.settings.test_first and stated:
                self.seen.append(StreamedFact(fact.text, fact.target_new, said, False))
                return
            self._write(index)
            now = say(self.lm, [fact])
            held = states(self.lm, [fact], now)[0] != self.editor.method.erases
            score = mean_score(self.lm, [fact], self.settings)
        except NumericalError as error:
            self.stopped = f"at fact {index + 1}, {fact.text!r}: {error}"
            return
        self.seen.append(StreamedFact(fact.text, fact.target_new, said, True, score, held))

    def _write(self, index: int) -> None:
        """Write a round of one fact; if that fails, it is taken back."""
        edit, owner = self.edit, self.edit.owner(len(self.edit.rounds))
        started = time.perf_counter()
        try:
            search(self.editor, [index], self._optimizer)
            edit.record.seconds["values"] += time.perf_counter() - started
            started = time.perf_counter()
            changes = self.editor.write([index], owner)
        except BaseException:
            self.lm.weights.remove([owner])
            raise
        edit.record.seconds["update"] += time.perf_counter() - started
        self.lm.weights.made_on[edit.id] = edit.record.on_top_of
        edit.rounds.append(changes)
        edit.facts_in_round.append(1)
        edit.facts.append(self.editor.facts[index])
        self._written.append(index)
        self._states.append({name: tensor.detach().cpu().clone() for name, tensor in self.editor.state().items()})
        self._fold()

    def _fold(self) -> None:
        """Let the last two rounds be one, if the changes of both together are no larger than those of one."""
        edit = self.edit
        if len(edit.rounds) < 2 or edit.rounds[-1].keys() != edit.rounds[-2].keys():
            return
        both = {place: _folded(edit.rounds[-2][place], change) for place, change in edit.rounds[-1].items()}
        if any(change is None for change in both.values()):
            return
        count = len(edit.rounds)
        self.lm.weights.remove([edit.owner(count - 1), edit.owner(count - 2)])
        del edit.rounds[-2:]
        edit.rounds.append({place: change for place, change in both.items() if change is not None})
        for place, change in edit.rounds[-1].items():
            self.lm.weights.add(edit.owner(count - 2), place, change)
        edit.facts_in_round[-2:] = [sum(edit.facts_in_round[-2:])]

    # Scores

    def _score(self) -> None:
        """Add the scores after the present number of edits."""
        if self.steps[-1].edits == len(self._written):
            step = asdict(self.steps.pop())
            self.steps.append(StreamStep(**{**step, "seen": len(self.seen)}))
            return
        try:
            self.steps.append(self._step())
        except NumericalError as error:
            self.stopped = f"a score after {len(self._written)} edits: {error}"

    def _step(self) -> StreamStep:
        lm, settings = self.lm, self.settings
        made = [self.editor.facts[index] for index in self._written]
        right_after = [fact.score for fact in self.seen if fact.score is not None]
        return StreamStep(
            len(made),
            len(self.seen),
            TRR=mean_score(lm, self.known, settings),
            ERR=mean_score(lm, made, settings),
            ES=fmean_or_none(right_after),
            generalization=mean_score(lm, _paraphrases(made, settings), settings),
        )

    def result(self) -> Stream:
        """The stream so far."""
        self.edit.record.stopped = self.stopped
        method = json.loads(json.dumps(self.editor.method.to_dict()))
        steps, facts = tuple(self.steps), tuple(self.seen)
        return Stream(self.lm.name, method, self.settings, len(self.known), steps, facts, self.stopped, self.edit)


def _folded(earlier: Change, later: Change) -> Change | None:
    """One change instead of two, for dense updates and for adaptors that replace the earlier one; else None."""
    if isinstance(earlier, DenseUpdate) and isinstance(later, DenseUpdate):
        return total([earlier, later])
    if isinstance(earlier, Adaptor) and isinstance(later, Adaptor) and later.after(earlier) is later:
        return later
    return None
