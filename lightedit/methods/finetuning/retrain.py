"""Fine-tuning with retraining: from time to time all facts so far are trained again, from the unedited weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from lightedit.data.facts import Fact
from lightedit.errors import ArgumentError
from lightedit.lm import Place
from lightedit.lm.changes import DenseUpdate, total
from lightedit.lm.weights import Owner
from lightedit.methods.finetuning.editor import FineTuningEditor
from lightedit.methods.finetuning.method import FineTuning
from lightedit.methods.protocol import Editor


class RetrainEditor(FineTuningEditor):
    """The editor of `Retrain`."""

    method: "Retrain"

    def prepare(
        self, facts: Sequence[Fact], rounds: Sequence[Sequence[int]] | None, like: Editor | None = None
    ) -> None:
        if others := self.lm.weights.edits:
            raise ArgumentError(
                f"{self.lm.name} carries edits ({', '.join(others)}); Retrain starts again from the unedited weights, "
                "so revert them first"
            )
        if rounds is None and self.method.every == 1:
            raise ArgumentError(
                "every: 1 retrains after every fact, which facts that are each edited alone do not need; take FT"
            )
        super().prepare(facts, rounds, like)

    def train(self, indices: Sequence[int], owner: Owner) -> Mapping[Place, DenseUpdate]:
        every, facts = self.method.every, [*self.written, *indices]
        if len(facts) // every == len(self.written) // every:
            return self.trained(indices)
        last = facts if self.method.last is None else facts[-self.method.last :]
        with self.lm.weights.unedited():
            whole = self.trained(last, self.method.passes)
        # the round's change replaces those of earlier rounds
        return {place: self._instead(place, change) for place, change in whole.items()}

    def _instead(self, place: Place, change: DenseUpdate) -> DenseUpdate:
        """What makes the sum of all changes of `place` equal to `change`."""
        if place not in self.lm.weights.places:
            return change
        earlier = self.lm.weights.change(place)
        assert isinstance(earlier, DenseUpdate)
        taken_back = DenseUpdate(**{name: -part.to(change.tensors()[name]) for name, part in earlier.tensors().items()})
        both = total([change, taken_back])
        assert isinstance(both, DenseUpdate)
        return both


@dataclass(frozen=True)
class Retrain(FineTuning):
    """Fine-tuning with retraining, as in GRACE's tables (Hartvigsen et al., 2023, arXiv 2211.11031).

    A round is fine-tuned. Once `every` more facts are written, the round instead trains on all facts so far, starting
    from the unedited weights. It is for runs of many rounds.

    Attributes:
        every: number of facts after which retraining is due.
        passes: most passes over the facts when retraining.
        last: number of latest facts to retrain on; None for all.
    """

    lr: float = 1e-2
    epochs: int = 100
    every: int = 50
    passes: int = 5
    last: int | None = None

    editor_type: ClassVar[type[Editor]] = RetrainEditor

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every < 1 or self.passes < 1 or (self.last is not None and self.last < 1):
            raise ArgumentError(
                f"every, passes and last must be at least 1, got {self.every}, {self.passes} and {self.last}"
            )
        if self.published:
            raise ArgumentError("published: the published retraining does not run as released; leave it out")
