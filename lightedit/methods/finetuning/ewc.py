"""Fine-tuning with elastic weight consolidation: weights that earlier edits depend on are held."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from lightedit.errors import ArgumentError
from lightedit.lm import Place
from lightedit.lm.changes import DenseUpdate
from lightedit.lm.weights import Owner
from lightedit.methods.finetuning.editor import FineTuningEditor
from lightedit.methods.finetuning.method import FineTuning
from lightedit.methods.protocol import Editor
from lightedit.statistics.fisher import fisher_information


class EWCEditor(FineTuningEditor):
    """The editor of `EWC`. A round that has no earlier one is plain fine-tuning."""

    method: "EWC"

    def train(self, indices: Sequence[int], owner: Owner) -> Mapping[Place, DenseUpdate]:
        earlier = [self.prompts[index] for index in self.written[-self.method.last :]]
        if not earlier or not self.method.lambda_:
            return self.trained(indices)
        fisher = fisher_information(self.lm, earlier, self.method.trained(self.lm))
        return self.trained(indices, penalty={place: self.method.lambda_ * part for place, part in fisher.items()})


@dataclass(frozen=True)
class EWC(FineTuning):
    """Fine-tuning with elastic weight consolidation (Kirkpatrick et al., 2017, arXiv 1612.00796), as in GRACE's tables.

    The loss of a round is that of fine-tuning plus λ sum(F ΔW²). F is the Fisher information of the latest facts of
    earlier rounds (see `fisher_information`), at the weights before the round. It is for runs of many rounds.

    Attributes:
        lambda_: λ, the weight of the penalty; 0 is fine-tuning.
        last: number of facts over which F is a mean, the latest of earlier rounds.
    """

    lr: float = 1e-2
    epochs: int = 100
    lambda_: float = 0.1
    last: int = 10

    editor_type: ClassVar[type[Editor]] = EWCEditor

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.lambda_ >= 0 and self.last >= 1):
            raise ArgumentError(f"lambda_ must not be negative and last at least 1, got {self.lambda_} and {self.last}")
        if self.published:
            raise ArgumentError("published: the published EWC does not run as released; leave it out")
