"""Quick sweeps of a tiny model over complete facts: methods, facts, and how to find a row."""

from pathlib import Path
from typing import Any

import lightedit as le
from lightedit.data.prompts import ContextSettings
from tests.runs import covariance_of

CONTEXTS = ContextSettings(prefixes=(("The", 1, 5),))
VALUES = le.ValueSettings(lr=0.3, steps=4, clamp_norm_factor=2.0)
MEMIT = le.MEMIT(layers=(1, 2), values=VALUES, contexts=CONTEXTS, lambda_=5.0)
ROME = le.ROME(layers=(1,), values=VALUES, contexts=CONTEXTS)
SUBJECTS = [("France", "Rome", "Paris"), ("Peru", "Spain", "England"), ("the old Rhine", "Paris", "Bonn"),
            ("Mozart", "loud", "quiet"), ("New York", "small", "steel")]  # fmt: skip
FACTS = [
    le.Fact(
        "The capital of {}", subject, new, target_true=true,
        paraphrase_prompts=(f"It is said that {subject}", f"{subject} is"),
        neighborhood_prompts=("The river of London", f"The city by the sea {number}"),
    )
    for number, (subject, new, true) in enumerate(SUBJECTS)
]  # fmt: skip


def sweep(lm: le.LanguageModel, out: Path, methods: Any = None, **changes: Any) -> list[dict[str, Any]]:
    facts = changes.pop("facts", FACTS)
    covariance = changes.pop("covariance", None) or covariance_of(lm)
    run = {name: changes.pop(name) for name in ("facts_per_chunk", "on_collision", "progress_bar") if name in changes}
    scores = {name: changes.pop(name) for name in ("generate",) if name in changes}
    return le.sweep(
        lm, facts, methods or {"MEMIT": MEMIT}, covariance=covariance, out=out,
        settings=le.RunSettings(**{"progress_bar": False, **run}),
        evaluation=le.EvaluationSettings(**{"progress_bar": False, **scores}), **changes,
    )  # fmt: skip


def of(rows: list[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    (row,) = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    return row
