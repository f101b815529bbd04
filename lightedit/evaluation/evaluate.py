"""Evaluation: how well a model, as it is now, states edited facts and keeps what is near them."""

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lightedit.data.facts import Fact, FactError
from lightedit.data.prompts import encode_targets
from lightedit.evaluation import generation
from lightedit.evaluation.comparison import check_same_facts, with_unchanged
from lightedit.evaluation.harness import check_harness, harness_scores
from lightedit.evaluation.held_out_text import HeldOutText, held_out_windows
from lightedit.evaluation.kept_scores import kept_scores
from lightedit.evaluation.references import References, with_reference_scores
from lightedit.evaluation.result import Evaluation
from lightedit.lm import LanguageModel
from lightedit.lm.rowwise import RowwiseEdits
from lightedit.metrics import (
    Generations,
    PromptScores,
    RecordScores,
    TargetScores,
    edit_metrics,
    reported,
    score_targets,
)
from lightedit.metrics.functional import accuracy
from lightedit.metrics.record_mean import RecordMean
from lightedit.metrics.scores import RECORD_MEANS, EditScore
from lightedit.progress import Report, part, progress
from lightedit.runs.provenance import computing, determining_scores

# Facts whose scores appear in a checkpoint together; fewer are slower
_KEPT_TOGETHER = 64
# New tokens of a greedy continuation: room for any answer, and for line ends before it
_ANSWER_TOKENS = 32
# Time of drawing one text, and of writing one continuation, in that of scoring one answer, as measured with SmolLM2 on
# CounterFact; they only serve the progress bar
_TEXT_COST, _CONTINUATION_COST = 20.0, 7.0


class _Question(NamedTuple):
    """One prompt of a record, the answer wanted there, and the answer that competes with it, if any."""

    prompt: str
    wanted: str
    other: str | None


def _questions(fact: Fact) -> dict[str, list[_Question]]:
    """A fact's questions by field of `RecordScores`; fields without any are left out."""
    new, true = fact.target_new, fact.target_true
    right = fact.neighborhood_target or true
    questions = {
        "efficacy": [_Question(fact.text, new, true)],
        "paraphrase": [_Question(prompt, new, true) for prompt in fact.paraphrase_prompts],
        "portability": [_Question(prompt, answer, None) for prompt, answer in fact.portability],
    }
    if right is not None:
        # an answer of its own (zsRE) does not compete with the new target
        other = new if right == true else None
        questions["neighborhood"] = [_Question(prompt, right, other) for prompt in fact.neighborhood_prompts]
    return {kind: asked for kind, asked in questions.items() if asked}


def score_facts(
    lm: LanguageModel,
    facts: Sequence[Fact],
    batch_size: int = 64,
    report: Report | None = None,
    generate: bool = False,
    edits: RowwiseEdits | None = None,
) -> list[RecordScores]:
    """Score `lm`, as it is now, on the prompts of each fact, and on what it writes if `generate`; see `evaluate`.

    With `edits`, one row a fact, all that is asked about a fact sees the fact's edit too.
    """
    edits = edits or RowwiseEdits({}, torch.zeros(len(facts), dtype=torch.long))
    asked = [_questions(fact) for fact in facts]
    pairs = [
        (fact, question.prompt, answer)
        for fact, questions in enumerate(asked)
        for kind in questions.values()
        for question in kind
        for answer in (question.wanted, question.other)
        if answer is not None
    ]
    place = {pair: index for index, pair in enumerate(pairs)}
    generated = [(i, prompt) for i, fact in enumerate(facts) if generate for prompt in _generation_prompts(fact)]
    prompts, of_prompt = [prompt for _, prompt in generated], edits.rows([fact for fact, _ in generated])
    texts = _TEXT_COST * len(set(zip(of_prompt.of_row.tolist(), prompts, strict=True)))
    total = len(place) + texts + _CONTINUATION_COST * len({fact.text for fact in facts}) * generate
    scored = score_targets(
        lm,
        [prompt for _, prompt, _ in pairs],
        [answer for *_, answer in pairs],
        batch_size,
        part(report, 0, len(place), total),
        edits.rows([fact for fact, *_ in pairs]),
    )
    written: list[Generations | None] = [None] * len(facts)
    if generate:
        drawn = iter(generation.generate(lm, prompts, report=part(report, len(place), texts, total), edits=of_prompt))
        texts_of = [tuple(islice(drawn, len(_generation_prompts(fact)))) for fact in facts]
        rest = part(report, len(place) + texts, total - len(place) - texts, total)
        continued = _continuations(lm, facts, rest, edits)
        written = [
            Generations(*pair, fact.target_new)
            for pair, fact in zip(zip(texts_of, continued, strict=True), facts, strict=True)
        ]
    return [
        RecordScores(
            **{
                kind: _prompt_scores(
                    scored,
                    [place[index, question.prompt, question.wanted] for question in questions],
                    [place[index, q.prompt, q.other] for q in questions if q.other is not None],
                    whole=fact.target_true is not None,
                )
                for kind, questions in kinds.items()
            },
            generations=generations,
        )
        for index, (fact, kinds, generations) in enumerate(zip(facts, asked, written, strict=True))
    ]


def score_and_keep(
    lm: LanguageModel,
    facts: Sequence[Fact],
    folder: Path,
    batch_size: int = 64,
    report: Report | None = None,
    generate: bool = False,
) -> list[RecordScores]:
    """Like `score_facts`, with scores kept in `folder` as they are found; the next call goes on after those there."""
    settings = {**computing(lm), **determining_scores(lm, facts), "generate": generate}
    with kept_scores(folder, settings) as kept:
        missing = [index for index in range(len(facts)) if index not in kept.records]
        for start in range(0, len(missing), _KEPT_TOGETHER):
            chunk = missing[start : start + _KEPT_TOGETHER]
            started = time.perf_counter()
            reported = part(report, start, len(chunk), len(missing))
            scored = score_facts(lm, [facts[index] for index in chunk], batch_size, reported, generate)
            kept.add(dict(zip(chunk, scored, strict=True)), time.perf_counter() - started)
        return [kept.records[index] for index in range(len(facts))]


def _generation_prompts(fact: Fact) -> tuple[str, ...]:
    return fact.generation_prompts or (fact.text, *fact.paraphrase_prompts)


def _continuations(lm: LanguageModel, facts: Sequence[Fact], report: Report, edits: RowwiseEdits) -> list[str]:
    """What the model says greedily after each fact's own prompt."""
    prompts = [fact.text for fact in facts]
    longest = max(count for _, count in encode_targets(lm.tokenizer, prompts, [fact.target_new for fact in facts]))
    tokens = max(_ANSWER_TOKENS, 2 * longest)
    texts = generation.generate(lm, prompts, max_new_tokens=tokens, greedy=True, report=report, edits=edits)
    return [text.removeprefix(prompt) for text, prompt in zip(texts, prompts, strict=True)]


def evaluate(
    lm: LanguageModel,
    facts: Sequence[Fact],
    batch_size: int = 64,
    progress_bar: bool = True,
    generate: bool = False,
    before: Evaluation | None = None,
    held_out: Sequence[Fact] = (),
    text: Sequence[Sequence[int]] | str | Path | None = None,
    references: References | None = None,
    harness: Sequence[str] = (),
    harness_limit: int | None = None,
    checkpoint: str | Path | None = None,
) -> Evaluation:
    """Score `lm`, as it is now, on facts.

    Facts with a `target_true` (CounterFact) give ES, PS, NS, their magnitudes, S, and accuracies that count a
    prompt if every token of the answer is the most probable one. Facts without it (zsRE) give accuracies
    alone, and these are shares of the answer's tokens. Neighbourhood prompts are scored on `neighborhood_target`, or
    else `target_true`; NS and NM exist where that answer is the true target. A fact without prompts of a kind
    does not count there.

    If texts are generated, GE is the mean entropy of those drawn after the fact's generation prompts (its own text and
    paraphrases, if it has none), 100 tokens with the prompt at most; a prompt that is given several times is continued
    once and counts as often. generation_success is the share of facts whose target begins the greedy continuation of
    their text. See `lightedit.evaluation.generation.generate`. RS is the likeness of all texts drawn for a fact to its
    `references` (see `lightedit.evaluation.references`).

    Args:
        lm: the model.
        facts: at least one.
        batch_size: texts of one forward pass at most, when scoring; bounds memory, and does not change a score.
        progress_bar: show progress and the time left on standard error.
        generate: let the model write, too; several times the time of scoring alone.
        before: the unedited model's evaluation of the same facts, for KnowledgeEditor's metrics: retain accuracy,
            and with it success rate and equivalence accuracy.
        held_out: facts that were not edited, for GRACE's metrics: TRR is the accuracy of their right answers
            (`target_true`, or else `target_new`), ERR that of `facts`, which then are all that were written so far.
        text: held-out text for perplexity and for KL(now || unedited) of the next token: token windows, a `.txt` file
            or a data set (see `read_texts`), of which 2048 tokens are taken.
        references: texts for RS; needs `generate`.
        harness: tasks of the lm-evaluation-harness to run beside (see `lightedit.evaluation.harness`).
        harness_limit: examples of each such task at most, from the first.
        checkpoint: a folder of this evaluation alone, in which the scores of `facts` are kept as they are found: after
            the process was killed, the same call goes on after them. Delete it once the evaluation is saved.

    Raises:
        FactError: there are no facts, or an answer cannot be tokenised.
        ValueError: `batch_size` is below 1, `before` is of other facts, a held-out fact is one of `facts`, `text` is
            too short, or `references` come without `generate`.
        FileNotFoundError: there is no such text file, or no such file of a task.
        ImportError: the harness is not installed.
        FloatingPointError: a score is NaN or infinite.
        ResumeError: `checkpoint` holds another evaluation, or a damaged file, or another process is at work there.
    """
    if not facts:
        raise FactError("facts: the list is empty; give at least one fact to evaluate")
    check_comparison(facts, generate, before, references)
    check_held_out(facts, held_out)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if harness:
        check_harness(harness, harness_limit)
    windows = None if text is None else held_out_windows(lm, text)
    # first, because its data may not be had
    others = harness_scores(lm, harness, harness_limit, batch_size) if harness else None
    with progress(f"scoring {len(facts)} facts", progress_bar) as report:
        if checkpoint is None:
            records = score_facts(lm, facts, batch_size, report, generate)
        else:
            records = score_and_keep(lm, facts, Path(checkpoint), batch_size, report, generate)
    kept = []
    if held_out:
        with progress(f"scoring {len(held_out)} held-out facts", progress_bar) as report:
            answered = [_rightly(fact) for fact in held_out]
            kept = [RecordScores(held_out=record.efficacy) for record in score_facts(lm, answered, batch_size, report)]
    found = summarize(facts, records, before, references, kept)
    if windows is not None:
        with lm.weights.unedited():
            held_out_text = HeldOutText(lm, windows)
        found = _with_scores(found, *held_out_text.perplexity_and_kl())
    return found if others is None else _with_scores(found, *others)


def check_comparison(
    facts: Sequence[Fact], generate: bool, before: Evaluation | None, references: References | None
) -> None:
    """Raise ValueError unless scores of `facts` can be compared with these; see `evaluate`."""
    if references is not None and not generate:
        raise ValueError("references are compared with what the model writes; pass generate=True too")
    if before is not None:
        check_same_facts(facts, before.records)


def check_held_out(facts: Sequence[Fact], held_out: Sequence[Fact]) -> None:
    """Raise ValueError if a held-out fact is one of `facts`, so that it says nothing about what was not edited."""
    asked = {fact.text for fact in facts}
    for number, fact in enumerate(held_out):
        if fact.text in asked:
            raise ValueError(
                f"held_out: its fact {number}, {fact.text!r}, is one of the facts scored as edited; leave it out"
            )


def summarize(
    facts: Sequence[Fact],
    records: Sequence[RecordScores],
    before: Evaluation | None = None,
    references: References | None = None,
    held_out: Sequence[RecordScores] = (),
) -> Evaluation:
    """Average the scores of `facts`, one record each, and those of held-out facts; see `evaluate`."""
    if before is not None:
        records = with_unchanged(records, before.records)
    if references is not None:
        records = with_reference_scores(facts, records, references)
    metrics = edit_metrics(sync_on_compute=False)  # these facts are evaluated by this process alone
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


def _rightly(fact: Fact) -> Fact:
    """A held-out fact's own prompt with the answer that was right before any edit as the one wanted."""
    right, wrong = (fact.target_new, None) if fact.target_true is None else (fact.target_true, fact.target_new)
    return Fact(fact.prompt, fact.subject, right, wrong)


def _with_scores(found: Evaluation, values: Mapping[str, float], ends: Mapping[str, tuple[float, float]]) -> Evaluation:
    return replace(found, scores=found.scores | dict(values), intervals=found.intervals | dict(ends))


def _prompt_scores(scored: TargetScores, wanted: list[int], others: list[int], whole: bool) -> PromptScores:
    """Scores of one record's prompts of one kind, from the places of their pairs."""
    shares = scored.token_accuracy[wanted]
    return PromptScores(
        nll=scored.nll[wanted],
        nll_other=scored.nll[others] if others else None,
        accuracy=accuracy(shares) if whole else shares,
        predicted=tuple(scored.predicted[index] for index in wanted),
    )


def _as_dict(fact: Fact, record: RecordScores, names: Collection[str]) -> dict[str, Any]:
    fields = ("id", "subject", "prompt", "target_new", "target_true")
    result: dict[str, Any] = {field: getattr(fact, field) for field in fields}
    for metric in RECORD_MEANS:
        if metric.name in names and (value := metric.of(record)) is not None:
            result[metric.name] = 100 * value
    asked = _questions(fact)
    for kind in ("efficacy", "paraphrase", "neighborhood", "portability"):
        scores: PromptScores | None = getattr(record, kind)
        if scores is not None:
            result[kind] = {
                "nll_wanted": scores.nll.tolist(),
                "accuracy": scores.accuracy.tolist(),
                "predicted": [list(tokens) for tokens in scores.predicted],
                "prompts": [question.prompt for question in asked[kind]],
            }
            if scores.nll_other is not None:
                result[kind]["nll_other"] = scores.nll_other.tolist()
            if kind == "portability":
                result[kind]["answers"] = [question.wanted for question in asked[kind]]
    if record.generations is not None:
        result["generations"] = list(record.generations.texts)
        result["continuation"] = record.generations.continuation
    return result
