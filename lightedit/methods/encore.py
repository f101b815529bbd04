"""ENCORE: sequential editing with a norm constraint, past keys and most-probable early stopping."""

from dataclasses import dataclass, field
from typing import ClassVar

from lightedit.covariance import Covariance
from lightedit.lm import Matrix
from lightedit.methods.base import Method
from lightedit.stopping import MostProbable
from lightedit.update import Preservation
from lightedit.values import ValueSettings


@dataclass(frozen=True)
class ENCORE(Method):
    """Early stopping and Norm-Constrained Robust knowledge Editing (Gupta et al., 2025, arXiv 2502.01636).

    Attributes:
        lambda_: weight of preservation, λp in A = λp C0 + λn I.
        norm_weight: weight of the update's Frobenius norm, λn.
    """

    values: ValueSettings = field(default_factory=lambda: ValueSettings(stopping=MostProbable()))
    lambda_: float = 15_000.0
    norm_weight: float = 20.0

    keeps_past_keys: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.lambda_ > 0 and self.norm_weight >= 0):
            raise ValueError(
                f"lambda_ must be positive and norm_weight not negative, got {self.lambda_} and {self.norm_weight}"
            )

    def preservation(self, covariance: Covariance, matrix: int | Matrix) -> Preservation:
        """A = λp C0 + λn I."""
        return Preservation.from_covariance(covariance[matrix], scale=self.lambda_, ridge=self.norm_weight)
