"""Retention: how well the facts of each round are still stated after later rounds."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torchmetrics import MetricCollection

from lightedit.metrics import RecordScores, edit_metrics, reported

FILE = "retention.csv"
_CURVES = 10  # with at most this many rounds, each has a curve of its own in the loggers


class RetentionScores:
    """The scores of one validation, by the round in which the facts were written (their origin)."""

    def __init__(self) -> None:
        self._metrics: dict[int, MetricCollection] = {}
        self._facts: Counter[int] = Counter()

    def update(self, origin: int, records: Sequence[RecordScores]) -> None:
        """Add the scores of facts written in round `origin`, counted from 1."""
        if origin not in self._metrics:
            self._metrics[origin] = edit_metrics(sync_on_compute=False)  # every process scores all facts
        self._metrics[origin].update(records)
        self._facts[origin] += len(records)

    def rows(self, round_: int) -> list[dict[str, Any]]:
        """One row for each origin: the present round, the origin, its number of facts, and its scores in percent."""
        return [
            {"round": round_, "origin": origin, "facts": self._facts[origin], **defined(self._metrics[origin])}
            for origin in sorted(self._metrics)
        ]


def defined(metrics: MetricCollection) -> dict[str, float]:
    """The values of the metrics that the facts allow, in reporting order."""
    return reported(metrics.compute())


def curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """One validation's rows as values for loggers, such as "retention/round_1/ES".

    With more than 10 rounds, only the first has such a curve, and the latest is logged as "retention/latest/ES".
    """
    named = {f"round_{row['origin']}": row for row in rows}
    if len(rows) > _CURVES:
        first = f"round_{rows[0]['origin']}"
        named = {first: named[first], "latest": rows[-1]}
    return {
        f"retention/{name}/{metric}": value
        for name, row in named.items()
        for metric, value in row.items()
        if metric not in ("round", "origin", "facts")
    }
