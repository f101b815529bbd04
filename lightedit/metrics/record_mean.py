"""The base of every metric that is a mean over records."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from lightedit.metrics import functional
from lightedit.metrics.records import RecordScores


class RecordMean(Metric):
    """Mean over records of a record's value, times 100. A record's value is a mean over its prompts.

    Records without prompts of the metric's kind, or without the scores that its value needs, do not count.

    Attributes:
        name: its short name in papers, and its key in a collection.
        prompts: the field of `RecordScores` that it reads.
        requires: name of a metric without which it is not reported, because it would repeat other metrics.
    """

    name: ClassVar[str]
    prompts: ClassVar[Literal["efficacy", "paraphrase", "neighborhood", "generations", "portability", "held_out"]]
    requires: ClassVar[str | None] = None
    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # The sum of values, of their squares, and their number. Each metric's state has its own name, because a
        # MetricCollection merges metrics whose states have equal names and equal first values.
        self._sums = f"sums_{self.name}"
        self.add_state(self._sums, torch.zeros(3, dtype=torch.float64), dist_reduce_fx="sum")

    @staticmethod
    @abstractmethod
    def values(scores: Any) -> Tensor | None:
        """The value on each prompt, [n]; None if the scores do not allow it. `prompts` names the kind of `scores`."""

    @classmethod
    def of(cls, record: RecordScores) -> float | None:
        """The value of one record, not in percent; None if it has none."""
        scores = getattr(record, cls.prompts)
        values = None if scores is None else cls.values(scores)
        return None if values is None else values.double().mean().item()

    def update(self, records: Sequence[RecordScores]) -> None:
        """Add records. The result does not depend on their order within the call, to the bit."""
        found = sorted(value for record in records if (value := self.of(record)) is not None)
        values = torch.tensor(found, dtype=torch.float64, device=self.device)
        sums = torch.stack([values.sum(), values.square().sum(), values.new_tensor(len(found))])
        setattr(self, self._sums, getattr(self, self._sums) + sums)

    def compute(self) -> Tensor:
        """The mean, a float64 scalar; NaN if no record counted."""
        total, _, count = getattr(self, self._sums).unbind()
        return 100 * total / count

    def interval(self) -> Tensor:
        """Ends of the mean's 95 % confidence interval, [2]; see `functional.mean_interval`."""
        with self.sync_context(self.dist_sync_fn, should_sync=self.sync_on_compute):
            return 100 * functional.mean_interval(getattr(self, self._sums))
