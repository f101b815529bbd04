"""Scores of facts: the probabilities of answers under the model's present weights, and generated texts."""

import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from lightedit.data.fact import Fact, FactError, Serving
from lightedit.data.served import encode_pairs
from lightedit.errors import ArgumentError, UnsupportedModelError
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
    """One prompt of a record, the wanted answer, the competing answer, if any, and how they reach the model."""

    prompt: str
    wanted: str
    other: str | None
    serving: Serving


def questions(fact: Fact) -> dict[str, list[Question]]:
    """A fact's questions by field of `RecordScores`; fields without questions are left out."""
    new, true = fact.target_new, fact.target_true
    told = fact.serving
    asked = told._replace(end_turn=False)  # only the answers that were taught end their turn
    found = {
        "efficacy": [Question(fact.text, new, true, told)],
        "paraphrase": [Question(prompt, new, true, told) for prompt in fact.paraphrase_prompts],
        "portability": [Question(prompt, answer, None, asked) for prompt, answer in fact.portability],
    }
    # answers other than the true target (zsRE) do not compete with the new target
    other = new if {right for _, right in fact.neighborhood} == {true} else None
    found["neighborhood"] = [Question(prompt, right, other, asked) for prompt, right in fact.neighborhood]
    return {kind: questions for kind, questions in found.items() if questions}


def check_scored(lm: LanguageModel, facts: Sequence[Fact], settings: EvaluationSettings = DEFAULTS) -> None:
    """Check, before work starts, that `lm` can be asked all that `score_facts` asks.

    Raises:
        FactError: an answer cannot be tokenised or served as the fact asks for; or a text is longer than the model's
            positions, new tokens included, or holds a token without a row in the embedding. The message says which
            fact, from 0.
        UnsupportedModelError: a fact is served in the chat template, and there is none.
    """
    asked = [
        (number, question.prompt, answer, question.serving)
        for number, fact in enumerate(facts)
        for kind in questions(fact).values()
        for question in kind
        for answer in (question.wanted, question.other)
        if answer is not None
    ]
    if not asked:
        return
    numbers, *columns = zip(*asked, strict=True)
    if settings.generate and lm.kind == "classifier":
        raise UnsupportedModelError(f"generate: {lm.name} is a classifier, which writes no text; leave generate out")
    pairs = encode_pairs(lm, *columns)
    answered = [[] if lm.answers.apart else pair.targets for pair in pairs]
    rows = [pair.ids for pair in pairs]
    new = [0] * len(rows)
    if settings.generate:
        written = _WrittenTexts(facts, RowwiseEdits.none(len(facts)))
        sampled = written.of_prompt.of_row.tolist()
        numbers += (*sampled, *range(len(facts)))
        rows += generation.encode(lm, written.prompts, written.chat)
        rows += generation.encode(lm, [fact.text for fact in facts], [fact.chat for fact in facts])
        new += [max(0, generation.MAX_LENGTH - len(row)) for row in rows[len(new) : len(new) + len(sampled)]]
        new += [_continued_tokens(lm, facts)] * len(facts)
    for index, (number, row, extra) in enumerate(zip(numbers, rows, new, strict=True)):
        try:
            lm.check_tokens(answered[index : index + 1])
            lm.check_rows([row], extra)
        except ArgumentError as error:
            raise FactError(f"fact {number}: {error}") from error


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
        (fact, question.prompt, answer, question.serving)
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
        [prompt for _, prompt, *_ in pairs],
        [answer for *_, answer, _ in pairs],
        batch_size=settings.batch_size,
        report=subprogress(report, 0, len(place), total),
        edits=edits.rows([fact for fact, *_ in pairs]),
        servings=[serving for *_, serving in pairs],
    )
    generations: Sequence[Generations | None] = [None] * len(facts)
    if written:
        generations = written.generations(lm, subprogress(report, len(place), written.cost, total))
    return [
        RecordScores(
            **{
                kind: _prompt_scores(
                    scored,
                    [place[index, q.prompt, q.wanted, q.serving] for q in asked_of_kind],
                    [place[index, q.prompt, q.other, q.serving] for q in asked_of_kind if q.other is not None],
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
        self.chat = [facts[index].chat for index, _ in asked]
        self._texts_cost = _TEXT_COST * len(set(zip(self.of_prompt.of_row.tolist(), self.prompts, strict=True)))
        self.cost = self._texts_cost + _CONTINUATION_COST * len({fact.text for fact in facts})

    def generations(self, lm: LanguageModel, report: Report) -> list[Generations]:
        """Generate all texts with `lm`."""
        rest = self.cost - self._texts_cost
        drawing = subprogress(report, 0, self._texts_cost, self.cost)
        drawn = iter(generation.generate(lm, self.prompts, report=drawing, edits=self.of_prompt, chat=self.chat))
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
    tokens: int | None = None,
    report: Report | None = None,
    edits: RowwiseEdits | None = None,
) -> list[str]:
    """The greedy continuation of each fact's own prompt, without that prompt.

    Args:
        lm: the model, with its present weights.
        facts: n facts.
        tokens: new tokens of each; by default enough for line ends and the longest target.
        report: called after each batch with (tokens written, tokens in all).
        edits: the edit with which each prompt runs, in addition to the model's weights; n rows.
    """
    prompts, chat = [fact.text for fact in facts], [fact.chat for fact in facts]
    tokens = tokens or _continued_tokens(lm, facts)
    texts = generation.generate(lm, prompts, max_new_tokens=tokens, greedy=True, report=report, edits=edits, chat=chat)
    return [text.removeprefix(prompt) for text, prompt in zip(texts, prompts, strict=True)]


def _continued_tokens(lm: LanguageModel, facts: Sequence[Fact]) -> int:
    """New tokens of a greedy continuation: enough for the longest target."""
    texts, targets, servings = zip(*((fact.text, fact.target_new, fact.serving) for fact in facts), strict=True)
    longest = max(len(pair.targets) for pair in encode_pairs(lm, texts, targets, servings))
    return max(_ANSWER_TOKENS, 2 * longest)
