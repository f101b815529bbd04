"""Evaluation: how well a model states edited facts, and how well neighbouring knowledge is kept."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightedit.data.fact import Fact, FactError, Serving, served_as
from lightedit.data.words import counted
from lightedit.errors import ArgumentError
from lightedit.evaluation.comparison import check_same_facts, with_unchanged
from lightedit.evaluation.harness import check_harness, harness_scores
from lightedit.evaluation.held_out_text import HeldOutText, held_out_windows
from lightedit.evaluation.references import References, with_reference_scores
from lightedit.evaluation.result import Evaluation
from lightedit.evaluation.scoring import check_scored, questions, score_and_keep, score_facts
from lightedit.evaluation.settings import DEFAULTS, EvaluationSettings
from lightedit.lm import LanguageModel
from lightedit.lm.arguments import check_model
from lightedit.lm.kinds import KINDS
from lightedit.metrics import RecordScores, edit_metrics, reported
from lightedit.metrics.record_mean import RecordMean
from lightedit.metrics.scores import RECORD_MEANS, EditScore
from lightedit.progress import progress


def evaluate(
    lm: LanguageModel,
    facts: Sequence[Fact],
    *,
    settings: EvaluationSettings = DEFAULTS,
    before: Evaluation | None = None,
    held_out: Sequence[Fact] = (),
    references: References | None = None,
    checkpoint: str | Path | None = None,
    chat: bool = False,
) -> Evaluation:
    """Score `lm`, with its present weights, on facts.

    Facts with a `target_true` (CounterFact) give ES, PS, NS, their magnitudes, S, and accuracies. Such an accuracy
    counts a prompt as right if every token of the answer is the most probable one. Facts without a `target_true`
    (zsRE) give accuracies only, which are shares of the answer's tokens. Neighbourhood prompts are scored on
    `neighborhood_target`, or else on `target_true`; NS and NM exist if that answer is the true target. A fact without
    prompts of a kind does not count in that kind's scores.

    If texts are generated, GE is the mean entropy of the texts sampled after the fact's generation prompts (its own
    text and paraphrases, if it has none). A text has at most 100 tokens with its prompt. A repeated prompt is continued
    once and counts each time. generation_success is the share of facts whose target begins the greedy continuation of
    their text (see `lightedit.evaluation.generation.generate`). RS is the TF-IDF cosine between all texts sampled for
    a fact and its `references` (see `lightedit.evaluation.references`).

    Held-out text gives perplexity and KL(now || unedited) of the next token.

    Args:
        lm: the model.
        facts: at least one fact.
        settings: sizes, and what is evaluated in addition to the facts' own prompts.
        before: the unedited model's evaluation of the same facts, for KnowledgeEditor's metrics: retain accuracy,
            success rate and equivalence accuracy.
        held_out: facts that were not edited, for GRACE's metrics. TRR is the accuracy of their right answers
            (`target_true`, or else `target_new`). ERR is the accuracy of `facts`, which must then be all facts written
            so far.
        references: texts for RS; needs `settings.generate`.
        checkpoint: a folder of this evaluation only, in which the scores of `facts` are stored as they are computed.
            After an interruption, the same call resumes from them. Delete it once the evaluation is saved.
        chat: serve all facts through the model's chat template; see `Fact.chat`.

    Raises:
        TypeError: `lm` is not a language model.
        UnsupportedModelError: a fact is served in the chat template, and there is none.
        FactError: there are no facts, or an answer cannot be tokenised, or a text is longer than the model's positions.
        ArgumentError: `before` is of other facts, a held-out fact is one of `facts`, the held-out text is too short, or
            `references` are given without `settings.generate`.
        FileNotFoundError: the text file or the file of a task does not exist.
        ImportError: the harness is not installed.
        FloatingPointError: a score is NaN or infinite.
        ResumeError: `checkpoint` holds another evaluation or a damaged file, or another process uses it.
    """
    check_model(lm, KINDS)
    if settings.text is not None or settings.harness:
        check_model(lm, what="evaluation on texts, or by the harness,")
    if not facts:
        raise FactError("facts: the list is empty; give at least one fact to evaluate")
    facts, held_out = served_as(facts, chat=chat), served_as(held_out, chat=chat)
    check_comparison(facts, settings, before, references)
    check_held_out(facts, held_out)
    check_scored(lm, facts, settings)
    check_scored(lm, [rightly(fact) for fact in held_out])
    if settings.harness:
        check_harness(settings.harness, settings.harness_limit)
    windows = None if settings.text is None else held_out_windows(lm, settings.text)
    # before the facts, because its data may not be available
    others = harness_scores(lm, settings.harness, settings.harness_limit, settings.batch_size)
    with progress(f"scoring {counted(len(facts))}", settings.progress_bar) as report:
        if checkpoint is None:
            records = score_facts(lm, facts, settings=settings, report=report)
        else:
            records = score_and_keep(lm, facts, Path(checkpoint), settings=settings, report=report)
    found = summarize(facts, records, before, references, _held_out_scores(lm, held_out, settings))
    if windows is not None:
        with lm.weights.unedited():
            held_out_text = HeldOutText(lm, windows)
        found = _with_scores(found, *held_out_text.perplexity_and_kl())
    return _with_scores(found, *others)


def _held_out_scores(
    lm: LanguageModel, held_out: Sequence[Fact], settings: EvaluationSettings
) -> Sequence[RecordScores]:
    """Scores of facts that were not edited, on their right answers."""
    if not held_out:
        return []
    with progress(f"scoring {len(held_out)} held-out facts", settings.progress_bar) as report:
        answered, alone = [rightly(fact) for fact in held_out], replace(settings, generate=False)
        return [
            RecordScores(held_out=record.efficacy)
            for record in score_facts(lm, answered, settings=alone, report=report)
        ]


def check_comparison(
    facts: Sequence[Fact], settings: EvaluationSettings, before: Evaluation | None, references: References | None
) -> None:
    """Raise ArgumentError unless scores of `facts` can be compared with `before` and `references`; see `evaluate`."""
    if references is not None and not settings.generate:
        raise ArgumentError("references are compared with what the model writes; set generate=True too")
    if before is not None:
        check_same_facts(facts, before.records)


def check_held_out(facts: Sequence[Fact], held_out: Sequence[Fact]) -> None:
    """Raise ArgumentError if a held-out fact is one of `facts`, which are the edited ones."""
    asked = {fact.text for fact in facts}
    for number, fact in enumerate(held_out):
        if fact.text in asked:
            raise ArgumentError(
                f"held_out: its fact {number}, {fact.text!r}, is one of the facts scored as edited; leave it out"
            )


def summarize(
    facts: Sequence[Fact],
    records: Sequence[RecordScores],
    before: Evaluation | None = None,
    references: References | None = None,
    held_out: Sequence[RecordScores] = (),
) -> Evaluation:
    """Average the scores of `facts`, one record each, and the scores of held-out facts; see `evaluate`."""
    if before is not None:
        records = with_unchanged(records, before.records)
    if references is not None:
        records = with_reference_scores(facts, records, references)
    metrics = edit_metrics(sync_on_compute=False)  # this process alone evaluates these facts
    metrics.update([*records, *held_out])
    scores = reported(metrics.compute())
    intervals = {}
    for name in scores:
        metric = metrics[name]
        assert isinstance(metric, RecordMean | EditScore)
        low, high = metric.interval().tolist()
        intervals[name] = (low, high)
    entries = [_as_dict(fact, record, scores) for fact, record in zip(facts, records, strict=True)]
    return Evaluation(scores, intervals, entries)


def rightly(fact: Fact) -> Fact:
    """The prompt of a fact that was not edited, with the answer that was right before any edit as the wanted one."""
    right, wrong = (fact.target_new, None) if fact.target_true is None else (fact.target_true, fact.target_new)
    return Fact(
        fact.prompt,
        fact.subject,
        right,
        wrong,
        separator=fact.separator,
        chat=fact.chat,
        position=fact.position,
    )


def _with_scores(found: Evaluation, values: Mapping[str, float], ends: Mapping[str, tuple[float, float]]) -> Evaluation:
    return replace(found, scores=found.scores | dict(values), intervals=found.intervals | dict(ends))


def _as_dict(fact: Fact, record: RecordScores, names: Collection[str]) -> dict[str, Any]:
    fields = ("id", "subject", "prompt", "target_new", "target_true")
    result: dict[str, Any] = {field: getattr(fact, field) for field in fields}
    if fact.serving != Serving():
        result |= fact.serving._asdict()
    for metric in RECORD_MEANS:
        if metric.name in names and (value := metric.of(record)) is not None:
            result[metric.name] = 100 * value
    result |= record.to_dict()
    for kind, asked in questions(fact).items():
        if kind in result:
            result[kind]["prompts"] = [question.prompt for question in asked]
    if "portability" in result:
        result["portability"]["answers"] = [answer for _, answer in fact.portability]
    return result
