"""Scores of facts: the probabilities of answers under the model's present weights, and generated texts."""

import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from lightedit.data.facts import Fact
from lightedit.data.prompts import encode_targets
from lightedit.evaluation import generation
from lightedit.evaluation.kept_scores import kept_scores
from lightedit.evaluation.settings import DEFAULTS, EvaluationSettings
from lightedit.lm import LanguageModel
from lightedit.lm.rowwise import RowwiseEdits
from lightedit.metrics import Generations, PromptScores, RecordScores, TargetScores, score_targets
from lightedit.metrics.functional import accuracy
from lightedit.progress import Report, subprogress
from lightedit.runs.provenance import computing, fingerprint_inputs

# Facts whose scores are written to a checkpoint together; fewer are slower
_KEPT_TOGETHER = 64
# New tokens of a greedy continuation, for line ends and an answer
_ANSWER_TOKENS = 32
# Time of one sampled text and of one greedy continuation, relative to scoring one answer (measured with SmolLM2 on
# CounterFact); used only by the progress bar
_TEXT_COST, _CONTINUATION_COST = 20.0, 7.0


class Question(NamedTuple):
    """One prompt of a record, the wanted answer, and the competing answer, if any."""

    prompt: str
    wanted: str
    other: str | None


def questions(fact: Fact) -> dict[str, list[Question]]:
    """A fact's questions by field of `RecordScores`; fields without questions are left out."""
    new, true = fact.target_new, fact.target_true
    right = fact.neighborhood_target or true
    found = {
        "efficacy": [Question(fact.text, new, true)],
        "paraphrase": [Question(prompt, new, true) for prompt in fact.paraphrase_prompts],
        "portability": [Question(prompt, answer, None) for prompt, answer in fact.portability],
    }
    if right is not None:
        # an answer other than the true target (zsRE) does not compete with the new target
        other = new if right == true else None
        found["neighborhood"] = [Question(prompt, right, other) for prompt in fact.neighborhood_prompts]
    return {kind: asked for kind, asked in found.items() if asked}


def score_facts(
    lm: LanguageModel,
    facts: Sequence[Fact],
    *,
    settings: EvaluationSettings = DEFAULTS,
    report: Report | None = None,
    edits: RowwiseEdits | None = None,
) -> list[RecordScores]:
    """Score `lm`, with its present weights, on the prompts of each fact, and on generated texts if asked for.

    Args:
        lm: the model.
        facts: n facts.
        settings: settings of which `batch_size` and `generate` are read; see `evaluate` for the scores.
        report: called after each pass with (work done, work in all).
        edits: the edit with which each fact's prompts run, in addition to the model's weights; n rows.
    """
    edits = edits or RowwiseEdits.none(len(facts))
    asked = [questions(fact) for fact in facts]
    pairs = [
        (fact, question.prompt, answer)
        for fact, kinds in enumerate(asked)
        for kind in kinds.values()
        for question in kind
        for answer in (question.wanted, question.other)
        if answer is not None
    ]
    place = {pair: index for index, pair in enumerate(pairs)}
    written = _WrittenTexts(facts, edits) if settings.generate else None
    total = len(place) + (written.cost if written else 0.0)
    scored = score_targets(
        lm,
        [prompt for _, prompt, _ in pairs],
        [answer for *_, answer in pairs],
        batch_size=settings.batch_size,
        report=subprogress(report, 0, len(place), total),
        edits=edits.rows([fact for fact, *_ in pairs]),
    )
    generations: Sequence[Generations | None] = [None] * len(facts)
    if written:
        generations = written.generations(lm, subprogress(report, len(place), written.cost, total))
    return [
        RecordScores(
            **{
                kind: _prompt_scores(
                    scored,
                    [place[index, question.prompt, question.wanted] for question in asked_of_kind],
                    [place[index, q.prompt, q.other] for q in asked_of_kind if q.other is not None],
                    whole=fact.target_true is not None,
                )
                for kind, asked_of_kind in kinds.items()
            },
            generations=texts,
        )
        for index, (fact, kinds, texts) in enumerate(zip(facts, asked, generations, strict=True))
    ]


def score_and_keep(
    lm: LanguageModel,
    facts: Sequence[Fact],
    folder: Path,
    *,
    settings: EvaluationSettings = DEFAULTS,
    report: Report | None = None,
) -> list[RecordScores]:
    """Like `score_facts`, but store scores in `folder` as they are computed, and reuse the scores stored there."""
    run = {**computing(lm), **fingerprint_inputs(lm, facts), "generate": settings.generate}
    with kept_scores(folder, run) as kept:
        missing = [index for index in range(len(facts)) if index not in kept.records]
        for start in range(0, len(missing), _KEPT_TOGETHER):
            chunk = missing[start : start + _KEPT_TOGETHER]
            started = time.perf_counter()
            reported = subprogress(report, start, len(chunk), len(missing))
            scored = score_facts(lm, [facts[index] for index in chunk], settings=settings, report=reported)
            kept.add(dict(zip(chunk, scored, strict=True)), time.perf_counter() - started)
        return [kept.records[index] for index in range(len(facts))]


def _prompt_scores(scored: TargetScores, wanted: list[int], others: list[int], whole: bool) -> PromptScores:
    """Scores of one record's prompts of one kind, from the indices of their (prompt, answer) pairs in `scored`."""
    shares = scored.token_accuracy[wanted]
    return PromptScores(
        nll=scored.nll[wanted],
        nll_other=scored.nll[others] if others else None,
        accuracy=accuracy(shares) if whole else shares,
        predicted=tuple(scored.predicted[index] for index in wanted),
    )


class _WrittenTexts:
    """The texts to generate for facts.

    Attributes:
        cost: time of generating them, relative to scoring one answer.
    """

    def __init__(self, facts: Sequence[Fact], edits: RowwiseEdits) -> None:
        self.facts, self.edits = facts, edits
        asked = [(index, prompt) for index, fact in enumerate(facts) for prompt in _generation_prompts(fact)]
        self.prompts, self.of_prompt = [prompt for _, prompt in asked], edits.rows([fact for fact, _ in asked])
        self._texts_cost = _TEXT_COST * len(set(zip(self.of_prompt.of_row.tolist(), self.prompts, strict=True)))
        self.cost = self._texts_cost + _CONTINUATION_COST * len({fact.text for fact in facts})

    def generations(self, lm: LanguageModel, report: Report) -> list[Generations]:
        """Generate all texts with `lm`."""
        rest = self.cost - self._texts_cost
        drawing = subprogress(report, 0, self._texts_cost, self.cost)
        drawn = iter(generation.generate(lm, self.prompts, report=drawing, edits=self.of_prompt))
        texts = [tuple(islice(drawn, len(_generation_prompts(fact)))) for fact in self.facts]
        following = subprogress(report, self._texts_cost, rest, self.cost)
        continued = continuations(lm, self.facts, report=following, edits=self.edits)
        found = zip(texts, continued, self.facts, strict=True)
        return [Generations(drawn, continuation, fact.target_new) for drawn, continuation, fact in found]


def _generation_prompts(fact: Fact) -> tuple[str, ...]:
    return fact.generation_prompts or (fact.text, *fact.paraphrase_prompts)


def continuations(
    lm: LanguageModel,
    facts: Sequence[Fact],
    *,
    tokens: int = _ANSWER_TOKENS,
    report: Report | None = None,
    edits: RowwiseEdits | None = None,
) -> list[str]:
    """The greedy continuation of each fact's own prompt, without that prompt.

    Args:
        lm: the model, with its present weights.
        facts: n facts.
        tokens: new tokens of each; twice the longest target's tokens if that is more.
        report: called after each batch with (tokens written, tokens in all).
        edits: the edit with which each prompt runs, in addition to the model's weights; n rows.
    """
    prompts = [fact.text for fact in facts]
    longest = max(count for _, count in encode_targets(lm.tokenizer, prompts, [fact.target_new for fact in facts]))
    tokens = max(tokens, 2 * longest)
    texts = generation.generate(lm, prompts, max_new_tokens=tokens, greedy=True, report=report, edits=edits)
    return [text.removeprefix(prompt) for text, prompt in zip(texts, prompts, strict=True)]
