"""Rows "evaluation" and "single-...": scoring against the published way, which takes one record after the other."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import isfinite
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks import Options, Result, WrongResultError
from benchmarks.published import Request, published_memit, published_rome, weight_view
from benchmarks.values import load_facts, products_seconds, published_value, search_values, stock_seconds
from lightedit.data.facts import Fact
from lightedit.data.prompts import Contexts
from lightedit.editing.run import edit
from lightedit.editing.settings import RunSettings
from lightedit.evaluation.evaluate import evaluate
from lightedit.evaluation.settings import EvaluationSettings
from lightedit.evaluation.single import evaluate_single
from lightedit.lm import LanguageModel, Place
from lightedit.methods import MEMIT, ROME, Method
from lightedit.progress import progress
from lightedit.statistics.covariance import Covariance
from lightedit.statistics.estimation import estimate_covariance

METHODS = {"single-rome": ROME(layers=(5,)), "single-memit": MEMIT(layers=(4, 5, 6, 7, 8), lambda_=1000.0)}
_QUIET = EvaluationSettings(progress_bar=False)
RECORDS = 100  # of the row "evaluation"
TOLERANCE = 1e-3  # nats, of an answer's mean NLL per token; after an edit, of the median fact
SEARCHED = 16  # facts, of the row "single-limit"
PUBLISHED_FACTS = 5  # single edits as published take about a minute each
# Adam's first step is lr g / (|g| + 1e-8): where a component of the gradient is nothing but rounding, so is its step,
# and two orders of summation find two values. How far that moves a fact's answers hangs on the machine; a fact that it
# moves beyond this many nats, or to another score, must agree in float64
UNSTABLE = 1e-2
EXACT_TOLERANCE = 1e-5
EXACT_TOGETHER = 8  # facts edited together in float64, so that more than one is


def row(options: Options) -> Result:
    """Score the built-in model on the CPU in float32, on records of about 26 (prompt, answer) pairs each."""
    facts, source = load_facts(RECORDS)
    return run(LanguageModel.load("smollm2", dtype="float32", device="cpu"), facts, [source])


def run(lm: LanguageModel, facts: Sequence[Fact], notes: Sequence[str] = ()) -> Result:
    """Time ours, the published way, and ours again, so that a change of the machine's load shows.

    Raises:
        WrongResultError: an answer's NLL differs by more than `TOLERANCE`.
    """
    first, before = _timed(lambda: evaluate(lm, facts, settings=_QUIET).records)
    published, theirs = _timed(lambda: [published_scores(lm, fact) for fact in facts])
    second, after = _timed(lambda: evaluate(lm, facts, settings=_QUIET).records)
    ours = [answers_of(record) for record in (*first, *second)]
    difference = max(float((one - other).abs().max()) for one, other in zip(ours, 2 * published, strict=True))
    _check(difference, TOLERANCE)
    pairs = sum(map(len, published))
    figures = {"records": len(facts), "pairs": pairs, "seconds": [before, after], "published_seconds": theirs,
               "ratio": theirs / median([before, after]), "largest_difference": difference}  # fmt: skip
    table = [
        (f"ours, {len(facts)} records, {pairs} answers", f"{before:.1f} s before and {after:.1f} s after the other"),
        ("published way, over ours", f"{figures['ratio']:.2f}"),
        ("largest difference of an answer's NLL", f"{difference:.1e} nats"),
    ]
    return Result(table, figures, list(notes))


def single_row(method: ROME | MEMIT, options: Options) -> Result:
    """Run the protocol of single edits with the built-in model, on the CPU in float32."""
    facts, source = load_facts(options.facts)
    lm = LanguageModel.load("smollm2", dtype="float32", device="cpu")
    covariance = estimate_covariance(lm, [4, 5, 6, 7, 8], cache=True)
    exact = partial(LanguageModel.load, "smollm2", dtype="float64", device="cpu")
    return run_single(lm, facts, method, covariance, exact, options.reference_facts, [source])


def run_single(
    lm: LanguageModel,
    facts: Sequence[Fact],
    method: ROME | MEMIT,
    covariance: Covariance,
    exact: Callable[[], LanguageModel],
    reference_facts: int | None = None,
    notes: Sequence[str] = (),
) -> Result:
    """Time the protocol of single edits against writing, scoring and undoing one fact after the other.

    That loop is run twice: by what the package offers for one fact, on all of them, whose scores must be the same; and
    as published, on a few.

    Args:
        lm: the model, on the CPU; so it is left.
        facts: the facts.
        method: the method.
        covariance: second moments at the method's matrices.
        exact: loads the model in float64, where a fact's answers differ too much in the model's own precision.
        reference_facts: run the loops on the first so many facts only; None runs the package's own on all.
        notes: passed on to the result.

    Raises:
        WrongResultError: the answers' NLL of half of the facts differ by more than `TOLERANCE` from those of a loop, or
            of one by more than `UNSTABLE` or in its scores, and by more than `EXACT_TOLERANCE` in float64.
    """
    ours = partial(_together, method, covariance)
    start = time.perf_counter()
    answers = ours(lm, facts)
    seconds = (time.perf_counter() - start) / len(facts)
    figures: dict[str, Any] = {"facts": len(facts), "seconds_per_fact": seconds}
    table = [(f"{len(facts)} facts at once", f"{seconds:.2f} s/fact")]
    written = partial(_written_single, method, covariance)
    published = partial(_published_single, method, method.contexts.sample(lm), covariance)
    few = facts[: min(reference_facts or len(facts), PUBLISHED_FACTS)]
    for kind, words, single, of_kind in (
        ("published", "as published", published, few),
        ("loop", "by `edit`, `evaluate` and `revert`", written, facts[:reference_facts]),
    ):
        loop = _loop(partial(single, lm), of_kind, answers, f"one by one {words}")
        if loop.unstable:
            _check_exactly(exact, single, ours, of_kind, loop)
        ratio = loop.seconds_per_fact / seconds
        figures[kind] = {**asdict(loop), "ratio": ratio}
        table += [
            (f"one by one {words}, {loop.facts} facts, over ours", f"{ratio:.2f}"),
            ("facts with the same ES, PS and NS", f"{loop.same_scores} of {loop.facts}"),
            ("largest difference of an answer's NLL, median fact", f"{loop.median_difference:.1e} nats"),
            ("the same, worst fact", f"{loop.largest_difference:.1e} nats"),
        ]
        if loop.unstable:
            places = ", ".join(map(str, loop.unstable))
            table.append((f"facts beyond {UNSTABLE:.0e} nats or of other scores, equal in float64", f"number {places}"))
    return Result(table, figures, list(notes))


def limit_row(options: Options) -> Result:
    """Measure what the search for values, most of a single edit, must take."""
    facts, source = load_facts(SEARCHED)
    lm = LanguageModel.load("smollm2", dtype="float32", device="cpu")
    return run_limit(
        lm, facts, {name: (method, method.contexts.sample(lm)) for name, method in METHODS.items()}, [source]
    )


def run_limit(
    lm: LanguageModel,
    facts: Sequence[Fact],
    methods: Mapping[str, tuple[ROME | MEMIT, Contexts]],
    notes: Sequence[str] = (),
) -> Result:
    """Time the search for values of all facts together and of one after the other, and the arithmetic in it alone.

    However many facts are searched together, the model's matrix products stay, and, unless its blocks are written anew,
    so do its elementwise operations and its attention.

    Args:
        lm: the model, on the CPU.
        facts: the facts.
        methods: row -> method and contexts.
        notes: passed on to the result.
    """
    figures: dict[str, Any] = {"facts": len(facts)}
    table = []
    for name, (method, contexts) in methods.items():
        layer = method.value_layer
        together = search_values(lm, facts, contexts, layer, method.values, f"{name}, together")
        alone = [search_values(lm, [fact], contexts, layer, method.values, f"{name}, one by one") for fact in facts]
        seconds = {
            "facts together": together.seconds,
            "one fact after the other": sum(search.seconds for search in alone),
            "the stock model's blocks alone": stock_seconds(lm, layer, together),
            "the matrix products alone": products_seconds(lm, layer, together),
        }
        figures[name] = {part: taken / len(facts) for part, taken in seconds.items()}
        table += [(f"{name}: {part}", f"{taken:.2f} s/fact") for part, taken in figures[name].items()]
    return Result(table, figures, list(notes))


@dataclass(frozen=True)
class _Loop:
    facts: int
    seconds_per_fact: float
    median_difference: float  # over the facts, of the largest of a fact's answers' NLL
    largest_difference: float
    same_scores: int  # facts of which every prompt's better answer is the same
    unstable: list[int]  # facts beyond `UNSTABLE`, or of another ES, PS or NS


def _loop(single: Callable[[Fact], Tensor], facts: Sequence[Fact], expected: Sequence[Tensor], name: str) -> _Loop:
    """Time `single`, fact -> NLLs of its answers, on one fact after the other, and compare them with those `expected`.

    Raises:
        WrongResultError: the median fact differs by more than `TOLERANCE`, or one is NaN.
    """
    seconds = 0.0
    same: list[bool] = []
    differences: list[float] = []
    with progress(name) as report:
        for done, (fact, answers) in enumerate(zip(facts, expected, strict=False), start=1):
            start = time.perf_counter()
            found = single(fact)
            seconds += time.perf_counter() - start
            difference = float((found - answers).abs().max())
            differences.append(difference if isfinite(difference) else _check(difference, TOLERANCE))
            same.append(bool((_better(fact, found) == _better(fact, answers)).all()))
            report(done, len(facts))
    _check(median(differences), TOLERANCE)
    unstable = [index for index, difference in enumerate(differences) if difference > UNSTABLE or not same[index]]
    return _Loop(len(facts), seconds / len(facts), median(differences), max(differences), sum(same), unstable)


def _check_exactly(
    exact: Callable[[], LanguageModel],
    single: Callable[[LanguageModel, Fact], Tensor],
    ours: Callable[[LanguageModel, Sequence[Fact]], Sequence[Tensor]],
    facts: Sequence[Fact],
    loop: _Loop,
) -> None:
    """Make sure that the unstable facts' answers are the same in float64, or raise WrongResultError."""
    lm = exact()
    unstable = [facts[index] for index in loop.unstable]
    others = [fact for index, fact in enumerate(facts) if index not in loop.unstable]
    together = unstable + others[: max(0, EXACT_TOGETHER - len(unstable))]
    for fact, answers in zip(unstable, ours(lm, together), strict=False):
        _check(float((single(lm, fact) - answers).abs().max()), EXACT_TOLERANCE)


def _better(fact: Fact, answers: Tensor) -> Tensor:
    """Whether the wanted answer is the more probable one, prompt by prompt; `answers` as of `answers_of`."""
    counts = [1, len(fact.paraphrase_prompts), len(fact.neighborhood_prompts)]
    parts = answers.split([count for count in counts for _ in range(2)])
    return torch.cat([wanted < other for wanted, other in zip(parts[::2], parts[1::2], strict=True)])


def _together(method: Method, covariance: Covariance, lm: LanguageModel, facts: Sequence[Fact]) -> list[Tensor]:
    return [answers_of(record) for record in evaluate_single(lm, facts, method, covariance=covariance).records]


def _written_single(method: Method, covariance: Covariance, lm: LanguageModel, fact: Fact) -> Tensor:
    """What the package offers for one fact."""
    written = edit(lm, [fact], method, covariance=covariance, settings=RunSettings(progress_bar=False))
    try:
        return answers_of(evaluate(lm, [fact], settings=_QUIET).records[0])
    finally:
        written.revert(lm)


def _published_single(
    method: ROME | MEMIT, contexts: Contexts, covariance: Covariance, lm: LanguageModel, fact: Fact
) -> Tensor:
    """Values, closed form and scores as published, the change added to the weights and taken back."""
    request = Request(fact.prompt, fact.subject, fact.target_new)
    value = published_value(lm, fact, contexts, method.value_layer, method.site, method.values).target
    if isinstance(method, MEMIT):
        changes = published_memit(
            lm.model, lm.tokenizer, [request], contexts.templates, [value], method.layers,
            {layer: covariance[Place(layer)] for layer in method.layers}, method.lambda_,
        )  # fmt: skip
    else:
        (layer,) = method.layers
        change = published_rome(
            lm.model, lm.tokenizer, request, contexts.templates, value, layer, covariance[Place(layer)]
        )
        changes = {layer: change}
    before = {layer: weight_view(lm.model, layer).clone() for layer in changes}
    try:
        for layer, change in changes.items():
            weight_view(lm.model, layer).add_(change)
        return published_scores(lm, fact)
    finally:
        for layer, weight in before.items():
            weight_view(lm.model, layer).copy_(weight)


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    return work(), time.perf_counter() - start


def _check(difference: float, tolerance: float) -> float:
    if not difference <= tolerance:  # NaN fails too
        raise WrongResultError(
            f"an answer's NLL is {difference:.1e} nats from the reference's; at most {tolerance:.0e} is expected, so "
            "no speed is reported"
        )
    return difference


def answers_of(record: dict[str, object]) -> Tensor:
    """All NLLs of a record, in the order of `published_scores`."""
    kinds = [record[kind] for kind in ("efficacy", "paraphrase", "neighborhood") if kind in record]
    numbers = [kind[name] for kind in kinds if isinstance(kind, dict) for name in ("nll_wanted", "nll_other")]
    return torch.tensor([number for of_prompts in numbers for number in of_prompts], dtype=torch.float64)


@torch.no_grad()
def published_scores(lm: LanguageModel, fact: Fact) -> Tensor:
    """One forward pass for all prompts of one record, each with every answer, and logits everywhere."""
    new, true = fact.target_new, fact.target_true
    prompts = [([fact.text], new, true), (fact.paraphrase_prompts, new, true), (fact.neighborhood_prompts, true, new)]
    pairs = [(prompt, answer) for asked, *answers in prompts for answer in answers for prompt in asked]
    tokenizer = lm.tokenizer
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    texts = tokenizer(
        [f"{prompt} {answer}" for prompt, answer in pairs], padding=True, padding_side="right", return_tensors="pt"
    )
    logits = lm.model(**texts).logits.log_softmax(-1)
    scores = []
    for index, (prompt, answer) in enumerate(pairs):
        start, tokens = (len(tokenizer(text)["input_ids"]) for text in (prompt, f"{prompt} {answer}"))
        places = torch.arange(start, tokens)
        scores.append(-logits[index, places - 1, texts["input_ids"][index, places]].double().mean())
    return torch.stack(scores)
