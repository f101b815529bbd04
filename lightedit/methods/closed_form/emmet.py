"""EMMET: equality-constrained mass editing."""

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
class EMMET(ClosedForm):
    """Equality-constrained Mass Model Editing (Gupta et al., 2024, arXiv 2403.14236).

    ROME's objective for many facts at once: of all ΔW that write every residual exactly, the one with the smallest
    tr(ΔW A ΔWᵀ).

    Attributes:
        lambda_: scale of C0 in A = λ C0. At μ = 0 it has no effect; otherwise EMMET(μ, λ) equals MEMIT(μ λ).
        mu: μ, added to the diagonal of the B × B system if a solve has more than one fact. 0 is the paper's equality
            constraint. The published code uses 0.1, which makes updates smaller and inexact.
    """

    lambda_: float = 1.0
    mu: float = 0.0

    editor_type: ClassVar[type[Editor]] = ClosedFormEditor

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.lambda_ > 0 and self.mu >= 0):
            raise ArgumentError(f"lambda_ must be positive and mu not negative, got {self.lambda_} and {self.mu}")

    def preservation(self, covariance: Covariance, matrix: Place) -> Preservation:
        """A = λ C0."""
        return Preservation.from_covariance(covariance[matrix], scale=self.lambda_)

    def gamma(self, facts: int) -> float:
        return self.mu if facts > 1 else 0.0
