"""The result of an evaluation: scores with their intervals, as a table and as a file."""

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightedit.data.words import counted
from lightedit.errors import ArgumentError
from lightedit.files import whole_file
from lightedit.metrics.scores import METRICS

_LABELS = {
    "GE": "GE (bits × 100)",
    "RS_own": "RS (own references)",
    "perplexity": "perplexity (no unit)",
    "kl": "KL (nats per token)",
}
_DECIMALS = {"kl": 4}
_ORDER = [*(metric.name for metric in METRICS), "perplexity", "kl"]


def label(metric: str) -> str:
    """A metric's name for display, with its unit unless that is percent."""
    return _LABELS.get(metric, metric.replace("_", " "))


def decimals(metric: str) -> int:
    """The number of decimals to show."""
    return _DECIMALS.get(metric, 1)


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    Attributes:
        scores: metric -> value, in percent unless another unit is named; only metrics that the facts allow. Always
            possible are ES, PS, NS, EM, PM, NM, S, efficacy_accuracy, paraphrase_accuracy, neighborhood_accuracy and
            portability_accuracy. A comparison with an earlier evaluation adds success_rate, retain_accuracy and
            equivalence_accuracy. Held-out facts add ERR and TRR. Generated texts add GE (bits times 100),
            generation_success, and RS, or RS_own if the references are self-generated. Held-out text adds perplexity
            (no unit) and kl (nats per token).
        intervals: metric -> ends of its 95 % confidence interval, same keys; NaN if only one record counted. For means
            over records it is the mean ± 1.96 standard errors (0 wide if all records agree). For S, perplexity and kl
            it is bootstrapped, over records or over windows of text.
        records: one per fact, in order. Each holds id, subject, prompt, target_new and target_true, and the record's
            value of each metric that it has, in the metric's unit. Under "efficacy", "paraphrase", "neighborhood" and
            "portability" it holds lists with one entry a prompt: nll_wanted and nll_other (mean NLL per token, in
            nats), accuracy (share), predicted (ids of the most probable tokens at the answer's positions), prompts,
            and for portability answers. If texts were generated, it holds "generations", a list of texts with their
            prompts, and "continuation", the greedy continuation of the fact's own prompt.
    """

    scores: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    records: list[dict[str, Any]]

    def __str__(self) -> str:
        return self.table()

    def table(self, before: "Evaluation | None" = None) -> str:
        """The scores as aligned text, one metric a line, with half the width of its interval.

        Args:
            before: an evaluation of the same facts for a column of its own, such as the unedited model's.
        """
        columns = [self] if before is None else [before, self]
        heads = ["score"] if before is None else ["before", "after"]
        found = list(dict.fromkeys(name for column in columns for name in column.scores))
        names = sorted(found, key=lambda name: _ORDER.index(name) if name in _ORDER else len(_ORDER))
        lines = [[f"%, {counted(len(self.records))}", *heads]]
        lines += [[label(name), *(column._cell(name) for column in columns)] for name in names]
        widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines
        )

    def _cell(self, name: str) -> str:
        if name not in self.scores:
            return "-"
        low, high = self.intervals[name]
        digits = decimals(name)
        spread = "" if math.isnan(low) else f" ± {(high - low) / 2:4.{digits}f}"
        return f"{self.scores[name]:.{digits}f}{spread}"

    def save(self, path: str | os.PathLike[str], before: "Evaluation | None" = None) -> None:
        """Write the evaluation as one JSON file, atomically; NaN is written as null.

        Args:
            path: the file.
            before: an evaluation of the same facts to store with it, such as the unedited model's, for `lightedit
                report`.
        """
        path = Path(path)
        content = self._content() | ({} if before is None else {"before": before._content()})
        with whole_file(path) as unfinished, unfinished.open("w", encoding="utf-8", newline="\n") as file:
            json.dump(content, file, ensure_ascii=False, allow_nan=False)

    def _content(self) -> dict[str, Any]:
        ends = {name: [None if math.isnan(end) else end for end in both] for name, both in self.intervals.items()}
        return asdict(self) | {"intervals": ends}

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Evaluation":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: the file does not exist.
            ArgumentError: the file is not a saved evaluation, or is truncated.
        """
        return cls.load_with_before(path)[0]

    @classmethod
    def load_with_before(cls, path: str | os.PathLike[str]) -> tuple["Evaluation", "Evaluation | None"]:
        """Read what `save` wrote: the evaluation, and its `before` or None. Errors are those of `load`."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            before = content.get("before")
            return cls._from_content(content), None if before is None else cls._from_content(before)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArgumentError(f"{path} is not a saved evaluation ({error!r}); evaluate again") from error

    @classmethod
    def _from_content(cls, content: dict[str, Any]) -> "Evaluation":
        intervals = {
            name: (math.nan if low is None else low, math.nan if high is None else high)
            for name, (low, high) in content["intervals"].items()
        }
        return cls(content["scores"], intervals, content["records"])
