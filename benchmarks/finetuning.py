"""Row "ft": facts fine-tuned one at a time, against the published loop of training, scoring and undoing each."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks import Options, Result, WrongResultError
from benchmarks.evaluation import published_scores
from benchmarks.published import Request
from benchmarks.published.finetuning import parameters_of, published_ft
from benchmarks.values import load_facts
from lightedit.data.facts import Fact
from lightedit.evaluation.settings import EvaluationSettings
from lightedit.evaluation.single import evaluate_single
from lightedit.lm import LanguageModel, Place
from lightedit.methods import FT
from lightedit.progress import progress

METHODS = {"FT": FT(layers=(21,)), "FT-L": FT(layers=(0,), norm=2e-3)}
TOLERANCE = 1e-2  # ||ours - published|| / ||published|| of ΔW, of the median fact
PUBLISHED_FACTS = 5  # the loop takes seconds a fact


def row(options: Options) -> Result:
    """Measure the built-in model on the CPU in float32, with the settings of configs/smollm2."""
    facts, source = load_facts(options.facts)
    lm = LanguageModel.load("smollm2", dtype="float32", device="cpu")
    return run(lm, facts, METHODS, options.reference_facts or PUBLISHED_FACTS, [source])


def run(
    lm: LanguageModel, facts: Sequence[Fact], methods: Mapping[str, FT], reference_facts: int, notes: Sequence[str] = ()
) -> Result:
    """Time the single protocol against the published loop on the first `reference_facts` facts.

    Both train the same loss with the option `published`, and ΔW is compared. Ours is timed with the corrected loss as
    well, which has as many steps and longer rows.

    Raises:
        WrongResultError: ΔW of the median fact differs by more than `TOLERANCE`.
    """
    figures: dict[str, Any] = {"facts": len(facts), "reference_facts": min(reference_facts, len(facts))}
    table = []
    for name, method in methods.items():
        published = replace(method, published=True)
        ours, corrected = _seconds(lm, facts, published), _seconds(lm, facts, method)
        few = facts[:reference_facts]
        loop, expected = _loop(lm, few, published, name)
        difference = median(_differences(lm, few, published, expected))
        if not difference <= TOLERANCE:
            raise WrongResultError(
                f"{name}: ΔW of the median fact is {difference:.1e} from the published loop's; at most {TOLERANCE:.0e} "
                "is expected, so no speed is reported"
            )
        figures[name] = {"seconds_per_fact": ours, "corrected_seconds_per_fact": corrected,
                         "published_seconds_per_fact": loop, "ratio": loop / ours,
                         "median_difference": difference}  # fmt: skip
        table += [
            (f"{name}: {len(facts)} facts at once", f"{ours:.2f} s/fact"),
            (f"{name}: the same with the corrected loss", f"{corrected:.2f} s/fact"),
            (f"{name}: one by one as published, over ours", f"{loop / ours:.2f}"),
            (f"{name}: relative difference of ΔW, median fact", f"{difference:.1e}"),
        ]
    return Result(table, figures, list(notes))


def _seconds(lm: LanguageModel, facts: Sequence[Fact], method: FT) -> float:
    """Seconds a fact of training and scoring, all facts at once."""
    started = time.perf_counter()
    evaluate_single(lm, facts, method, settings=EvaluationSettings(progress_bar=False))
    return (time.perf_counter() - started) / len(facts)


def _loop(lm: LanguageModel, facts: Sequence[Fact], method: FT, name: str) -> tuple[float, list[Tensor]]:
    """Seconds a fact of the published loop, scores included, and the ΔW that it finds, [d_out, d_in] each."""
    (layer,) = method.layers
    template = f"{lm.module_name(Place(layer))}."
    found, seconds = [], 0.0
    with progress(f"{name} as published, one fact at a time") as report:
        for done, fact in enumerate(facts, start=1):
            started = time.perf_counter()
            request = Request(fact.prompt, str(fact.subject), fact.target_new)
            changes = published_ft(
                lm.model, lm.tokenizer, [request], template, method.lr, method.epochs, norm=method.norm
            )
            trained = parameters_of(lm.model, template)
            before = {key: parameter.detach().clone() for key, parameter in trained.items()}
            with torch.no_grad():
                for key, change in changes.items():
                    trained[key].add_(change)
                published_scores(lm, fact)
                for key, start in before.items():
                    trained[key].copy_(start)
            seconds += time.perf_counter() - started
            weight = changes[f"{template}weight"]
            found.append(weight if weight.shape == lm.weight(Place(layer)).shape else weight.T)
            report(done, len(facts))
    return seconds / len(facts), found


def _differences(lm: LanguageModel, facts: Sequence[Fact], method: FT, expected: Sequence[Tensor]) -> list[float]:
    editor = method.editor(lm)
    editor.prepare(facts, None)
    edits = editor.separate(range(len(facts)))
    assert edits is not None
    (place,) = method.places
    updates = edits.updates[place]
    assert isinstance(updates, tuple)
    return [
        float((update.weight - delta).norm() / delta.norm()) for update, delta in zip(updates, expected, strict=True)
    ]
