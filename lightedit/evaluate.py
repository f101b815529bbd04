"""Evaluation: how well a model, as it is now, states edited facts and keeps what is near them."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lightedit import generation
from lightedit.data.facts import Fact, FactError
from lightedit.data.prompts import encode_targets
from lightedit.files import whole_file
from lightedit.lm import LanguageModel
from lightedit.lm.rowwise import RowwiseEdits
from lightedit.metrics import Generations, PromptScores, RecordScores, TargetScores, edit_metrics, score_targets
from lightedit.metrics.functional import accuracy
from lightedit.metrics.metrics import METRICS, RECORD_MEANS, EditScore, RecordMean
from lightedit.progress import Report, part, progress

# New tokens of a greedy continuation: room for any answer, and for line ends before it
_ANSWER_TOKENS = 32
# Time of drawing one text, and of writing one continuation, in that of scoring one answer, as measured with SmolLM2 on
# CounterFact; they only serve the progress bar
_TEXT_COST, _CONTINUATION_COST = 20.0, 7.0
_UNITS = {"GE": "GE (bits x 100)"}


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        scores: metric -> value in percent, for those metrics that the facts allow: ES, PS, NS, EM, PM, NM, S,
            efficacy_accuracy, paraphrase_accuracy, neighborhood_accuracy; and, if texts were generated, GE, which is
            in bits times 100, and generation_success.
        intervals: metric -> ends of its 95 % confidence interval, same keys; NaN if only one record counted.
        records: one per fact, in order: id, subject, prompt, target_new, target_true; the record's own value
            of each metric that it has, in the same unit; under "efficacy", "paraphrase" and "neighborhood" one
            value a prompt of nll_wanted and nll_other (mean NLL per token, in nats) and accuracy (share); and, if
            texts were generated, "generations", a list of texts with their prompts, and "continuation", the greedy
            one of the fact's own prompt.
    """

    scores: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    records: list[dict[str, Any]]

    def table(self, before: "Evaluation | None" = None) -> str:
        """Lay the scores out as aligned text, one metric a line, with half the width of its interval.

        Args:
            before: an evaluation of the same facts to set beside it, such as the unedited model's.
        """
        columns = [self] if before is None else [before, self]
        heads = ["score"] if before is None else ["before", "after"]
        names = list(dict.fromkeys(name for column in columns for name in column.scores))
        lines = [[f"%, {len(self.records)} facts", *heads]]
        lines += [
            [_UNITS.get(name, name.replace("_", " ")), *(column._cell(name) for column in columns)] for name in names
        ]
        widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines
        )

    def _cell(self, name: str) -> str:
        if name not in self.scores:
            return "-"
        low, high = self.intervals[name]
        spread = "" if math.isnan(low) else f" ± {(high - low) / 2:4.1f}"
        return f"{self.scores[name]:.1f}{spread}"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything as one JSON file, which appears complete or not at all; NaN is written as null."""
        path = Path(path)
        content = asdict(self)
        content["intervals"] = {
            name: [None if math.isnan(end) else end for end in ends] for name, ends in self.intervals.items()
        }
        with whole_file(path) as unfinished, unfinished.open("w", encoding="utf-8", newline="\n") as file:
            json.dump(content, file, ensure_ascii=False, allow_nan=False)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Evaluation":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file holds something else, or is truncated.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            intervals = {
                name: (math.nan if low is None else low, math.nan if high is None else high)
                for name, (low, high) in content["intervals"].items()
            }
            return cls(content["scores"], intervals, content["records"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a saved evaluation ({error!r}); evaluate again") from error


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
    their text. See `lightedit.generation.generate`.

    Args:
        lm: the model.
        facts: at least one.
        batch_size: texts of one forward pass at most, when scoring; bounds memory, and does not change a score.
        progress_bar: show progress and the time left on standard error.
        generate: let the model write, too; several times the time of scoring alone.

    Raises:
        FactError: there are no facts, or an answer cannot be tokenised.
        FloatingPointError: a score is NaN or infinite.
    """
    if not facts:
        raise FactError("facts: the list is empty; give at least one fact to evaluate")
    with progress(f"scoring {len(facts)} facts", progress_bar) as report:
        records = score_facts(lm, facts, batch_size, report, generate)
    return summarize(facts, records)


def summarize(facts: Sequence[Fact], records: Sequence[RecordScores]) -> Evaluation:
    """Average the scores of `facts`, one record each; see `evaluate`."""
    metrics = edit_metrics(sync_on_compute=False)  # these facts are evaluated by this process alone
    metrics.update(records)
    scores, intervals = {}, {}
    for name in (kind.name for kind in METRICS):
        metric = metrics[name]
        assert isinstance(metric, RecordMean | EditScore)
        value = metric.compute().item()
        if not math.isnan(value):
            low, high = metric.interval().tolist()
            scores[name], intervals[name] = value, (low, high)
    return Evaluation(scores, intervals, [_as_dict(fact, record) for fact, record in zip(facts, records, strict=True)])


def _prompt_scores(scored: TargetScores, wanted: list[int], others: list[int], whole: bool) -> PromptScores:
    """Scores of one record's prompts of one kind, from the places of their pairs."""
    shares = scored.token_accuracy[wanted]
    return PromptScores(
        nll=scored.nll[wanted],
        nll_other=scored.nll[others] if others else None,
        accuracy=accuracy(shares) if whole else shares,
    )


def _as_dict(fact: Fact, record: RecordScores) -> dict[str, Any]:
    fields = ("id", "subject", "prompt", "target_new", "target_true")
    result: dict[str, Any] = {field: getattr(fact, field) for field in fields}
    for metric in RECORD_MEANS:
        if (value := metric.of(record)) is not None:
            result[metric.name] = 100 * value
    for kind in ("efficacy", "paraphrase", "neighborhood"):
        scores: PromptScores | None = getattr(record, kind)
        if scores is not None:
            result[kind] = {"nll_wanted": scores.nll.tolist(), "accuracy": scores.accuracy.tolist()}
            if scores.nll_other is not None:
                result[kind]["nll_other"] = scores.nll_other.tolist()
    if record.generations is not None:
        result["generations"] = list(record.generations.texts)
        result["continuation"] = record.generations.continuation
    return result
