"""Comparison of a model's predictions with those of an earlier evaluation."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lightedit.data.fact import Fact, Serving
from lightedit.data.words import counted
from lightedit.errors import ArgumentError
from lightedit.metrics import RecordScores
from lightedit.metrics.functional import unchanged

_UNSAID = Serving()._asdict()  # records say how a fact was served only where it was not so


def check_same_facts(facts: Sequence[Fact], before: Sequence[Mapping[str, Any]]) -> None:
    """Check that the records of an earlier evaluation are of `facts`.

    Raises:
        ArgumentError: the records are of other facts, in another order, or hold no predictions.
    """
    if len(facts) != len(before):
        raise ArgumentError(
            f"before: it evaluated {counted(len(before))}, and here are {len(facts)}; evaluate the same ones"
        )
    for number, (fact, record) in enumerate(zip(facts, before, strict=True)):
        fields = {name: getattr(fact, name) for name in ("prompt", "subject", "target_new", "target_true")}
        for field, value in {**fields, **fact.serving._asdict()}.items():
            then = record.get(field, _UNSAID.get(field))
            if then != value:
                raise ArgumentError(
                    f"before: the {field} of its record {number} is {then!r}, that of the fact is "
                    f"{value!r}; evaluate the same facts in the same order"
                )
        asked = record.get("neighborhood") or {}
        answered = tuple(prompt for prompt, _ in fact.neighborhood)
        if tuple(asked.get("prompts", ())) != answered or len(asked.get("predicted", ())) != len(answered):
            raise ArgumentError(
                f"before: its record {number} lacks what was predicted on the fact's {len(answered)} neighbourhood "
                "prompts; evaluate again"
            )


def with_unchanged(records: Sequence[RecordScores], before: Sequence[Mapping[str, Any]]) -> list[RecordScores]:
    """Add to each record the neighbourhood prompts whose prediction is the same as in the records `before`."""
    return [_with_unchanged(record, earlier) for record, earlier in zip(records, before, strict=True)]


def _with_unchanged(record: RecordScores, earlier: Mapping[str, Any]) -> RecordScores:
    now, then = record.neighborhood, earlier.get("neighborhood")
    if now is None or then is None:
        return record
    return replace(record, neighborhood=replace(now, unchanged=unchanged(now.predicted, then["predicted"])))
