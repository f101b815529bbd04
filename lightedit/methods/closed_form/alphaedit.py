"""AlphaEdit: updates within the null space of the covariance."""

from dataclasses import dataclass
from typing import ClassVar

from lightedit.errors import ArgumentError
from lightedit.lm import Place
from lightedit.methods.closed_form.editor import ClosedFormEditor
from lightedit.methods.closed_form.method import ClosedForm
from lightedit.methods.closed_form.preservation import Preservation
from lightedit.methods.protocol import Editor
from lightedit.statistics.covariance import Covariance


@dataclass(frozen=True)
class AlphaEdit(ClosedForm):
    """Null-space constrained editing (Fang et al., 2025, arXiv 2410.02355).

    Attributes:
        threshold: the null space is the span of C0's eigenvectors whose eigenvalue is below this.
        relative: `threshold` is a share of C0's largest eigenvalue. The published threshold is absolute; it fits only
            models whose keys are as large as those of the published models.
        ridge: weight of the update's squared norm, L2.
        published_history: past keys are read again after their round was written, as in the published code. False
            keeps the keys that the round was solved with.
    """

    threshold: float = 0.02
    relative: bool = False
    ridge: float = 10.0
    published_history: bool = False

    editor_type: ClassVar[type[Editor]] = ClosedFormEditor
    keeps_past_keys: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.threshold > 0 and self.ridge > 0):
            raise ArgumentError(f"threshold and ridge must be positive, got {self.threshold} and {self.ridge}")

    @property
    def reads_keys_after_writing(self) -> bool:
        return self.published_history

    def preservation(self, covariance: Covariance, matrix: Place) -> Preservation:
        """A⁻¹ = P / L2."""
        values, vectors = covariance.eigen(matrix)
        if not values[0] > -1e-10 * values[-1]:  # rounding may give a slightly negative eigenvalue
            raise covariance.indefinite(matrix)
        threshold = self.threshold * float(values[-1]) if self.relative else self.threshold
        return Preservation.from_null_space(values, vectors, threshold, self.ridge)
