"""Single facts of a run: the best, median and worst, with the model's continuations before and after."""

import math
from collections.abc import Sequence
from statistics import fmean, harmonic_mean
from typing import Any

from lightedit.reports.html import Html, element, group, scrolling_table
from lightedit.reports.reading import ReportedRun
from lightedit.reports.scores import ACCURACIES, fact_key, number

EACH = 3
"""Number of best, of median and of worst facts that are shown."""

_KINDS = {"efficacy": "its own prompt", "paraphrase": "paraphrases", "neighborhood": "neighbourhood"}
_SHOWN = _KINDS | {"portability": "portability"}  # portability is shown, but does not count in the order
_RULE = (
    "Facts are ordered by the harmonic mean of their own ES, PS and NS (of their accuracies, where there is no true "
    "target), and those alike in it by the margin: by how many nats per token the wanted answer is ahead of the "
    "other, averaged over the three kinds of prompts. A share is won where the wanted answer is the more probable one: "
    "the new target on the fact's own prompt and its paraphrases, the true one on its neighbourhood. Probabilities are "
    "per token (geometric means), of the wanted answer : of the other."
)


def facts_section(runs: Sequence[ReportedRun]) -> Html | None:
    """The best, median and worst facts of each run; None if no run has records of facts."""
    parts = [part for run in runs if (part := _of_run(run, len(runs) > 1)) is not None]
    if not parts:
        return None
    rule = element("details", element("summary", "How these are chosen, and how to read them"), element("p", _RULE))
    return element("section", element("h2", "Facts"), rule, *parts, id="facts")


def ranked(records: Sequence[dict[str, Any]]) -> list[int]:
    """Indices of records, best first: by harmonic mean, then by margin, then by index."""
    return sorted(range(len(records)), key=lambda index: (-_score(records[index]), -_margin(records[index])))


def chosen(order: Sequence[int], each: int = EACH) -> dict[str, list[int]]:
    """The `each` best, median and worst indices of a ranking; all under one name if there are at most 3 `each`."""
    if len(order) <= 3 * each:
        return {"All, best first": list(order)}
    middle = (len(order) - each) // 2
    return {
        "Best": list(order[:each]),
        "Median": list(order[middle : middle + each]),
        "Worst": list(order[: -each - 1 : -1]),
    }


def _score(record: dict[str, Any]) -> float:
    """Harmonic mean of ES, PS and NS, or of the accuracies, in percent, over those that the record has."""
    names = ("ES", "PS", "NS") if "ES" in record else ACCURACIES
    values = [record[name] for name in names if name in record]
    return harmonic_mean(values) if values else 0.0


def _margin(record: dict[str, Any]) -> float:
    """Mean margin over kinds of prompts, in nats per token; without other answers, minus the wanted answers' NLL."""
    margins = []
    for kind in _KINDS:
        if kind in record:
            wanted = record[kind]["nll_wanted"]
            others = record[kind].get("nll_other") or [0.0] * len(wanted)
            margins.append(fmean(other - nll for other, nll in zip(others, wanted, strict=True)))
    return fmean(margins) if margins else -math.inf


def _of_run(run: ReportedRun, named: bool) -> Html | None:
    evaluation = next((scores for scores in (run.after, run.before) if scores is not None and scores.records), None)
    if evaluation is None:
        return None
    befores = {} if run.before is None else {fact_key(record): record for record in run.before.records}
    groups = []
    for title, indexes in chosen(ranked(evaluation.records)).items():
        cards = []
        for index in indexes:
            record = evaluation.records[index]
            before = befores.get(fact_key(record)) if evaluation is run.after else None
            cards.append(_card(record, before))
        groups.append(group(element("h4", title), element("div", *cards, class_="cards")))
    return element("div", element("h3", element("bdi", run.name)) if named else None, *groups)


def _card(record: dict[str, Any], before: dict[str, Any] | None) -> Html:
    start, _, end = record["prompt"].partition("{}")
    subject = [] if record["subject"] is None else [element("mark", record["subject"])]
    prompt = element("bdi", start, *subject, end)
    target = element("bdi", record["target_new"], class_="target")
    true = record.get("target_true")
    instead = None if true is None else group(" instead of ", element("bdi", true, class_="target"))
    identity = "" if record.get("id") is None else f" · record {record['id']}"
    return element(
        "article",
        element("p", prompt, " → ", target, instead, class_="fact"),
        element(
            "p", f"score {_score(record):.1f} · margin {number(_margin(record), 2)} nats{identity}", class_="about"
        ),
        _continuations(record, before),
        _outcomes(record, before),
        _prompts(record, before),
    )


def _continuations(record: dict[str, Any], before: dict[str, Any] | None) -> Html | None:
    """The model's greedy continuations of the fact's prompt, if texts were generated."""
    said = [("before", before), ("after" if before is not None else "says", record)]
    rows = [
        group(element("dt", name), element("dd", element("bdi", " ".join(found["continuation"].split()))))
        for name, found in said
        if found is not None and "continuation" in found
    ]
    return element("dl", *rows) if rows else None


def _outcomes(record: dict[str, Any], before: dict[str, Any] | None) -> Html:
    columns = [record] if before is None else [before, record]
    names = ["score"] if before is None else ["before", "after"]
    heads = [element("th", name, scope="col") for name in ("prompts", *names)]
    rows = [
        element("tr", element("th", title, scope="row"), *(_outcome(column.get(kind)) for column in columns))
        for kind, title in _SHOWN.items()
        if kind in record
    ]
    return scrolling_table("Outcomes of this fact", element("tr", *heads), *rows)


def _outcome(scores: dict[str, Any] | None) -> Html:
    if scores is None:
        return element("td", "–")
    wanted, others = scores["nll_wanted"], scores.get("nll_other")
    chance = fmean(math.exp(-nll) for nll in wanted)
    if others is None:
        right = 100 * fmean(scores["accuracy"])
        return element("td", f"{right:.0f} % right", element("small", f"p {chance:.2f}", class_="about"))
    won = sum(nll < other for nll, other in zip(wanted, others, strict=True))
    other_chance = fmean(math.exp(-nll) for nll in others)
    about = element("small", f"p {chance:.2f} : {other_chance:.2f}", class_="about")
    return element("td", f"{won} of {len(wanted)} won", about)


def _prompts(record: dict[str, Any], before: dict[str, Any] | None) -> Html | None:
    """Each paraphrase, neighbourhood and portability prompt with its outcome."""
    lists = []
    for kind in ("paraphrase", "neighborhood", "portability"):
        scores, old = record.get(kind), (before or {}).get(kind)
        if scores is None or "prompts" not in scores:  # a file of an earlier version
            continue
        prompts = scores["prompts"]
        found_of = [found for found in (old, scores) if found and found.get("prompts") == prompts]
        if "answers" in scores:
            prompts = [f"{question} → {answer}" for question, answer in zip(prompts, scores["answers"], strict=True)]
        items = [
            element(
                "li",
                element("bdi", prompt),
                " ",
                element("span", *(_answer(found, index) for found in found_of), class_="about"),
            )
            for index, prompt in enumerate(prompts)
        ]
        lists.append(group(element("h5", _SHOWN[kind]), element("ul", *items)))
    return element("details", element("summary", "every prompt"), *lists) if lists else None


def _answer(scores: dict[str, Any], index: int) -> str:
    chance = math.exp(-scores["nll_wanted"][index])
    others = scores.get("nll_other")
    if others is None:
        return f" {100 * scores['accuracy'][index]:.0f} % "
    sign = "✓" if scores["nll_wanted"][index] < others[index] else "✗"
    return f" {sign} {chance:.2f} : {math.exp(-others[index]):.2f} "
