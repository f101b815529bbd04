"""Rows "evaluation" and "single": scoring against the published way, which takes one record after the other."""

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks import Options, Result, WrongResultError
from benchmarks.values import load_facts
from lightedit.covariance import Covariance
from lightedit.data.facts import Fact
from lightedit.estimation import estimate_covariance
from lightedit.evaluate import evaluate
from lightedit.lm import LanguageModel
from lightedit.methods import MEMIT, ROME, Method
from lightedit.run import edit
from lightedit.single import evaluate_single

RECORDS = 100  # of the row "evaluation"
TOLERANCE = 1e-3  # nats, of an answer's mean NLL per token


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
    _check(difference)
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
    methods: dict[str, Method],
    covariance: Covariance,
    reference_facts: int | None = None,
    notes: Sequence[str] = (),
) -> Result:
    """Time the protocol of single edits against writing, scoring and undoing one fact after the other.

    Args:
        lm: the model, on the CPU; so it is left.
        facts: the facts.
        methods: name -> method.
        covariance: second moments at the methods' matrices.
        reference_facts: run the loop on the first so many facts only; None runs it on all.
        notes: passed on to the result.

    Raises:
        WrongResultError: an answer's NLL differs by more than `TOLERANCE`.
    """
    figures, table = {}, []
    for name, method in methods.items():
        start = time.perf_counter()
        records = evaluate_single(lm, facts, method, covariance, progress_bar=False).records
        ours = (time.perf_counter() - start) / len(facts)
        loop: list[dict[str, object]] = []
        start = time.perf_counter()
        for fact in facts[:reference_facts]:
            written = edit(lm, [fact], method, covariance, progress_bar=False)
            loop += evaluate(lm, [fact], progress_bar=False).records
            written.revert(lm)
        theirs = (time.perf_counter() - start) / len(loop)
        pairs = [(_answers(one), _answers(other)) for one, other in zip(records, loop, strict=False)]
        difference = max(float((one - other).abs().max()) for one, other in pairs)
        _check(difference)
        figures[name] = {"facts": len(facts), "loop_facts": len(loop), "seconds_per_fact": ours,
                         "loop_seconds_per_fact": theirs, "ratio": theirs / ours,
                         "largest_difference": difference}  # fmt: skip
        table += [
            (f"{name}, {len(facts)} facts at once", f"{ours:.2f} s/fact"),
            (f"{name}, written, scored and undone one by one, over ours", f"{theirs / ours:.2f}"),
            (f"{name}, largest difference of an answer's NLL", f"{difference:.1e} nats"),
        ]
    return Result(table, figures, list(notes))


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    return work(), time.perf_counter() - start


def _check(difference: float) -> None:
    if not difference <= TOLERANCE:  # NaN fails too
        raise WrongResultError(
            f"an answer's NLL is {difference:.1e} nats from the reference's; at most {TOLERANCE:.0e} is expected, so "
            "no speed is reported"
        )


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
