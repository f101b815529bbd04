"""The single protocol in batches: each fact is edited alone into the unedited model and scored.

Most published tables edit one fact, score it, revert it, and go on to the next. Here values are optimised for many
facts at a time, and one factor of each preservation term serves all solves. In the passes that score, every row runs
with the edit of its own fact, and no weight is written. Editors that cannot compute edits without writing write each
fact, and take it back.
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from lightedit.data.fact import Fact, FactError, served_as
from lightedit.data.modules import chunks_by_suffix
from lightedit.data.words import counted
from lightedit.errors import ArgumentError
from lightedit.evaluation.evaluate import check_comparison, summarize
from lightedit.evaluation.kept_scores import KeptScores, kept_scores
from lightedit.evaluation.references import References
from lightedit.evaluation.result import Evaluation
from lightedit.evaluation.scoring import check_scored, score_facts
from lightedit.evaluation.settings import EvaluationSettings
from lightedit.lm import LanguageModel
from lightedit.methods.needs import covariance_for
from lightedit.methods.protocol import Editor, EditorSettings, Method, check_model_and_method, search
from lightedit.metrics import RecordScores
from lightedit.progress import Report, progress, subprogress
from lightedit.statistics.covariance import Covariance

_SEARCH = 0.8  # share of the time spent on finding values, without generation; used only by the progress bar


def evaluate_single(
    lm: LanguageModel,
    facts: Sequence[Fact],
    method: Method,
    *,
    covariance: Covariance | None = None,
    settings: EvaluationSettings | None = None,
    facts_per_chunk: int = 32,
    before: Evaluation | None = None,
    references: References | None = None,
    checkpoint: str | Path | None = None,
    prepared: Editor | None = None,
    chat: bool = False,
) -> Evaluation:
    """Score each fact after it alone was edited into `lm`. The model's weights are the same afterwards.

    The scores equal those of editing a fact, evaluating it and reverting the edit, fact after fact, except for
    floating-point rounding. They are described at `evaluate`.

    Args:
        lm: the model from which every edit starts.
        facts: at least one fact.
        method: the method, such as `ROME(layers=[5])`.
        covariance: second moments at the method's `covariance_places`; by default they are estimated from
            self-generated text and kept in the cache.
        settings: settings of the scoring; see `EvaluationSettings`.
        facts_per_chunk: facts whose values are optimised together, and whose edits are held in memory. Fewer are taken
            where a method's edits are large.
        before: `lm`'s evaluation of the same facts, for KnowledgeEditor's metrics; see `evaluate`.
        references: texts for RS; needs `settings.generate`.
        checkpoint: a folder of this run only, in which the scores of finished chunks are stored. After an
            interruption, the same call resumes from them. Delete it once the evaluation is saved.
        prepared: an editor whose `prepare` was called with these facts and no rounds; it is then not prepared again.
        chat: serve all facts through the model's chat template; see `Fact.chat`.

    Raises:
        FactError: there are no facts, or one cannot be edited.
        ArgumentError: a size is below 1, `before` is of other facts, or `references` are given without
            `settings.generate`.
        CovarianceError: the covariance is of another model, lacks a place, or is not positive definite.
        NumericalError: the search, an update or a score gave NaN or infinity.
        ResumeError: `checkpoint` holds another run or a damaged file, or another process uses it.
    """
    facts = served_as(facts, chat=chat)
    check_single(lm, facts, method, facts_per_chunk)
    settings = settings or EvaluationSettings()
    check_comparison(facts, settings, before, references)
    check_scored(lm, facts, settings)
    if covariance is None and prepared is None:
        covariance = covariance_for(lm, [method], progress_bar=settings.progress_bar)
    editor = prepared or method.editor(lm, covariance=covariance, settings=EditorSettings())
    if not editor.prepared:
        editor.prepare(facts, None)
    with ExitStack() as stack:
        kept: KeptScores | None = None
        if checkpoint is not None:
            inputs = editor.run_inputs() | {"generate": settings.generate}
            kept = stack.enter_context(kept_scores(Path(checkpoint), inputs))
        records: dict[int, RecordScores] = {} if kept is None else dict(kept.records)
        title = f"editing and scoring {counted(len(facts))}, each alone"
        report = stack.enter_context(progress(title, settings.progress_bar))
        optimizer = editor.make_optimizer()
        unscored = [index for index in range(len(facts)) if index not in records]
        done, size = 0, min(facts_per_chunk, editor.most_separate or facts_per_chunk)
        for chunk in chunks_by_suffix(facts, unscored, size):
            started = time.perf_counter()
            searching = _SEARCH * len(chunk)
            search(editor, chunk, optimizer, subprogress(report, done, searching, len(unscored)))
            rest = subprogress(report, done + searching, len(chunk) - searching, len(unscored))
            scored = dict(zip(chunk, _score_alone(editor, chunk, settings, rest), strict=True))
            records |= scored
            done += len(chunk)
            if kept is not None:
                kept.add(scored, time.perf_counter() - started)
    return summarize(facts, [records[index] for index in range(len(facts))], before, references)


def _score_alone(
    editor: Editor, indices: Sequence[int], settings: EvaluationSettings, report: Report
) -> list[RecordScores]:
    """Scores of each fact under its own edit only, once the search for these facts is over."""
    facts = [editor.facts[index] for index in indices]
    edits = editor.separate(indices)
    if edits is not None:
        return score_facts(editor.lm, facts, settings=settings, report=report, edits=edits)
    scored = []
    for number, (index, fact) in enumerate(zip(indices, facts, strict=True)):
        owner = ("alone", index)
        try:
            editor.write([index], owner)
            scored += score_facts(editor.lm, [fact], settings=settings)
        finally:
            editor.lm.weights.remove([owner])
        report(number + 1, len(indices))
    return scored


def check_single(lm: LanguageModel, facts: Sequence[Fact], method: Method, facts_per_chunk: int = 32) -> None:
    """Check arguments of `evaluate_single`; raises what it would raise before its work."""
    check_model_and_method(lm, method)
    if not facts:
        raise FactError("facts: the list is empty; give at least one fact to edit")
    if facts_per_chunk < 1:
        raise ArgumentError(f"facts_per_chunk must be at least 1, got {facts_per_chunk}")
    method.check(lm)
