"""ENCORE: sequential editing with a norm constraint, past keys and most-probable early stopping."""

from dataclasses import dataclass, field
from typing import ClassVar

from lightedit.errors import ArgumentError
from lightedit.lm import Place
from lightedit.methods.closed_form.editor import ClosedFormEditor
from lightedit.methods.closed_form.method import ClosedForm
from lightedit.methods.closed_form.preservation import Preservation
from lightedit.methods.closed_form.stopping import MostProbable
from lightedit.methods.closed_form.value_settings import ValueSettings
from lightedit.methods.protocol import Editor
from lightedit.statistics.covariance import Covariance


@dataclass(frozen=True)
class ENCORE(ClosedForm):
    """Early stopping and Norm-Constrained Robust knowledge Editing (Gupta et al., 2025, arXiv 2502.01636).

    Attributes:
        lambda_: weight of preservation, λp in A = λp C0 + λn I.
        norm_weight: weight of the update's Frobenius norm, λn.
    """

    values: ValueSettings = field(default_factory=lambda: ValueSettings(stopping=MostProbable()))
    lambda_: float = 15_000.0
    norm_weight: float = 20.0

    editor_type: ClassVar[type[Editor]] = ClosedFormEditor
    keeps_past_keys: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.lambda_ > 0 and self.norm_weight >= 0):
            raise ArgumentError(
                f"lambda_ must be positive and norm_weight not negative, got {self.lambda_} and {self.norm_weight}"
            )

    def preservation(self, covariance: Covariance, matrix: Place) -> Preservation:
        """A = λp C0 + λn I."""
        if self.norm_weight:
            covariance.check_definite(matrix)  # A is definite even where C0 is not
        return Preservation.from_covariance(covariance[matrix], scale=self.lambda_, ridge=self.norm_weight)
