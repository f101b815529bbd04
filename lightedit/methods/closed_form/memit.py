"""MEMIT: many facts at once, written into several layers by least squares."""

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
class MEMIT(ClosedForm):
    """Mass-Editing Memory in a Transformer (Meng et al., 2023, arXiv 2210.07229).

    Attributes:
        lambda_: weight of preservation, λ in A = λ C0. It weighs the covariance against the facts of a round, so the
            best value depends on model and round size. 15000 is the published value for 6B to 8B models.
    """

    lambda_: float = 15_000.0

    editor_type: ClassVar[type[Editor]] = ClosedFormEditor

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.lambda_ > 0:
            raise ArgumentError(f"lambda_ must be positive, got {self.lambda_}")

    def preservation(self, covariance: Covariance, matrix: Place) -> Preservation:
        """A = λ C0."""
        return Preservation.from_covariance(covariance[matrix], scale=self.lambda_)
