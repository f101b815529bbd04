"""Rows "evaluation" and "single": scoring against the published way, which takes one record after the other."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks import Options, Result, WrongResultError
from benchmarks.values import load_facts, published_value
from lightedit.covariance import Covariance
from lightedit.data.facts import Fact
from lightedit.data.prompts import Contexts
from lightedit.estimation import estimate_covariance
from lightedit.evaluate import evaluate
from lightedit.lm import LanguageModel
from lightedit.methods import MEMIT, ROME, Method
from lightedit.progress import progress
from lightedit.run import edit
from lightedit.single import evaluate_single
from tests.reference import Request, published_memit, published_rome, weight_view

RECORDS = 100  # of the row "evaluation"
TOLERANCE = 1e-3  # nats, of an answer's mean NLL per token
PUBLISHED_TOLERANCE = 1e-2  # after an edit, whose value the published loop finds from other roundings on
PUBLISHED_FACTS = 5  # single edits as published take about a minute each


def row(options: Options) -> Result:
    """Score the built-in model on the CPU in float32, on records of about 26 (prompt, answer) pairs each."""
    facts, source = load_facts(RECORDS)
    return run(LanguageModel.load("smollm2", dtype="float32", device="cpu"), facts, [source])


def run(lm: LanguageModel, facts: Sequence[Fact], notes: Sequence[str] = ()) -> Result:
    """Time ours, the published way, and ours again, so that a change of the machine's load shows.

    Raises:
        WrongResultError: an answer's NLL differs by more than `TOLERANCE`.
    """
    first, before = _timed(lambda: evaluate(lm, facts, progress_bar=False).records)
    published, theirs = _timed(lambda: [_published(lm, fact) for fact in facts])
    second, after = _timed(lambda: evaluate(lm, facts, progress_bar=False).records)
    ours = [_answers(record) for record in (*first, *second)]
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


def single_row(options: Options) -> Result:
    """Run the protocol of single edits with ROME and MEMIT on the built-in model, on the CPU in float32."""
    facts, source = load_facts(options.facts)
    lm = LanguageModel.load("smollm2", dtype="float32", device="cpu")
    methods = {"ROME": ROME(layers=(5,)), "MEMIT": MEMIT(layers=(4, 5, 6, 7, 8), lambda_=1000.0)}
    covariance = estimate_covariance(lm, [4, 5, 6, 7, 8], cache=True)
    return run_single(lm, facts, methods, covariance, options.reference_facts, [source])


def run_single(
    lm: LanguageModel,
    facts: Sequence[Fact],
    methods: Mapping[str, ROME | MEMIT],
    covariance: Covariance,
    reference_facts: int | None = None,
    notes: Sequence[str] = (),
) -> Result:
    """Time the protocol of single edits against writing, scoring and undoing one fact after the other.

    That loop is run twice: by what the package offers for one fact, on all of them, whose scores must be the same; and
    as published, on a few.

    Args:
        lm: the model, on the CPU; so it is left.
        facts: the facts.
        methods: name -> method.
        covariance: second moments at the methods' matrices.
        reference_facts: run the loops on the first so many facts only; None runs the package's own on all.
        notes: passed on to the result.

    Raises:
        WrongResultError: an answer's NLL differs by more than `TOLERANCE` from the package's loop, or by more than
            `PUBLISHED_TOLERANCE` from the published one.
    """
    figures, table = {}, []
    for name, method in methods.items():
        start = time.perf_counter()
        records = evaluate_single(lm, facts, method, covariance).records
        ours = (time.perf_counter() - start) / len(facts)
        answers = [_answers(record) for record in records]
        published = partial(_published_single, lm, method, method.contexts.sample(lm), covariance)
        few = facts[: min(reference_facts or len(facts), PUBLISHED_FACTS)]
        loops = {
            "published": _loop(published, few, answers, PUBLISHED_TOLERANCE, f"{name}, published loop"),
            "loop": _loop(partial(_written_single, lm, method, covariance), facts[:reference_facts], answers, TOLERANCE,
                          f"{name}, one by one"),
        }  # fmt: skip
        figures[name] = {"facts": len(facts), "seconds_per_fact": ours}
        table.append((f"{name}, {len(facts)} facts at once", f"{ours:.2f} s/fact"))
        for kind, loop in loops.items():
            ratio = loop.seconds_per_fact / ours
            figures[name][kind] = {**asdict(loop), "ratio": ratio}
            words = "as published" if kind == "published" else "by `edit`, `evaluate` and `revert`"
            table += [
                (f"{name}, one by one {words}, {loop.facts} facts, over ours", f"{ratio:.2f}"),
                (f"{name}, largest difference of an answer's NLL", f"{loop.largest_difference:.1e} nats"),
            ]
    return Result(table, figures, list(notes))


@dataclass(frozen=True)
class _Loop:
    facts: int
    seconds_per_fact: float
    largest_difference: float  # of an answer's NLL


def _loop(
    single: Callable[[Fact], Tensor], facts: Sequence[Fact], expected: Sequence[Tensor], tolerance: float, name: str
) -> _Loop:
    """Time `single`, fact -> NLLs of its answers, on one fact after the other; it ends with the first that is wrong."""
    seconds, differences = 0.0, []
    with progress(name) as report:
        for done, (fact, answers) in enumerate(zip(facts, expected, strict=False), start=1):
            start = time.perf_counter()
            found = single(fact)
            seconds += time.perf_counter() - start
            differences.append(_check(float((found - answers).abs().max()), tolerance))
            report(done, len(facts))
    return _Loop(len(differences), seconds / len(differences), max(differences))


def _written_single(lm: LanguageModel, method: Method, covariance: Covariance, fact: Fact) -> Tensor:
    """What the package offers for one fact."""
    written = edit(lm, [fact], method, covariance, progress_bar=False)
    try:
        return _answers(evaluate(lm, [fact], progress_bar=False).records[0])
    finally:
        written.revert(lm)


def _published_single(
    lm: LanguageModel, method: ROME | MEMIT, contexts: Contexts, covariance: Covariance, fact: Fact
) -> Tensor:
    """Values, closed form and scores as published, the change added to the weights and taken back."""
    request = Request(fact.prompt, fact.subject, fact.target_new)
    value = published_value(lm, fact, contexts, method.value_layer, method.site, method.values).target
    if isinstance(method, MEMIT):
        changes = published_memit(
            lm.model, lm.tokenizer, [request], contexts.templates, [value], method.layers,
            {layer: covariance[layer] for layer in method.layers}, method.lambda_,
        )  # fmt: skip
    else:
        (layer,) = method.layers
        change = published_rome(lm.model, lm.tokenizer, request, contexts.templates, value, layer, covariance[layer])
        changes = {layer: change}
    before = {layer: weight_view(lm.model, layer).clone() for layer in changes}
    try:
        for layer, change in changes.items():
            weight_view(lm.model, layer).add_(change)
        return _published(lm, fact)
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


def _answers(record: dict[str, object]) -> Tensor:
    """All NLLs of a record, in the order of `_published`."""
    kinds = [record[kind] for kind in ("efficacy", "paraphrase", "neighborhood") if kind in record]
    numbers = [kind[name] for kind in kinds if isinstance(kind, dict) for name in ("nll_wanted", "nll_other")]
    return torch.tensor([number for of_prompts in numbers for number in of_prompts])


@torch.no_grad()
def _published(lm: LanguageModel, fact: Fact) -> Tensor:
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
