"""MEMIT: mass editing by least squares over several layers."""

from dataclasses import dataclass

from lightedit.lm import Place
from lightedit.methods.closed_form.method import Method
from lightedit.methods.closed_form.preservation import Preservation
from lightedit.statistics.covariance import Covariance


@dataclass(frozen=True)
class MEMIT(Method):
    """Mass-Editing Memory in a Transformer (Meng et al., 2023, arXiv 2210.07229).

    Attributes:
        lambda_: weight of preservation, λ in A = λ C0. It weighs the facts of a round against the covariance, so the
            best value depends on model and round size; 15000 is the published one for 6B to 8B models.
    """

    lambda_: float = 15_000.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.lambda_ > 0:
            raise ValueError(f"lambda_ must be positive, got {self.lambda_}")

    def preservation(self, covariance: Covariance, matrix: Place) -> Preservation:
        """A = λ C0."""
        return Preservation.from_covariance(covariance[matrix], scale=self.lambda_)
