"""MEMIT: many facts at once, written into several layers by least squares."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lightedit.errors import ArgumentError
from lightedit.lm import Place
from lightedit.lm.changes import LowRankUpdate
from lightedit.methods.closed_form.editor import ClosedFormEditor
from lightedit.methods.closed_form.keys import KeyWalk
from lightedit.methods.closed_form.method import ClosedForm
from lightedit.methods.closed_form.preservation import Preservation, low_rank_update
from lightedit.methods.protocol import Editor
from lightedit.statistics.covariance import Covariance


@dataclass(frozen=True)
class MEMIT(ClosedForm):
    """Mass-Editing Memory in a Transformer (Meng et al., 2023, arXiv 2210.07229).

    Attributes:
        lambda_: weight of preservation, λ in A = λ C0. It weighs the covariance against the facts of a round, so the
            best value depends on model and round size. 15000 is the published value for 6B to 8B models.
        share: share of its residual that each solve writes, on average over the facts of a round, above 0 and below 1.
            If given, it sets λ for every matrix and round, so that it carries over between models; see
            `gamma_for_share`. `lambda_` is then not used.
    """

    lambda_: float = 15_000.0
    share: float | None = None

    editor_type: ClassVar[type[Editor]] = ClosedFormEditor

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.lambda_ > 0:
            raise ArgumentError(f"lambda_ must be positive, got {self.lambda_}")
        if self.share is not None and not 0 < self.share < 1:
            raise ArgumentError(f"share is above 0 and below 1, got {self.share}")

    def preservation(self, covariance: Covariance, matrix: Place) -> Preservation:
        """A = λ C0; C0 alone if λ follows from the share, because γ then takes its place."""
        return Preservation.from_covariance(covariance[matrix], scale=self.lambda_ if self.share is None else 1.0)

    def update(self, preservation: Preservation, keys: Tensor, residuals: Tensor, walk: KeyWalk) -> LowRankUpdate:
        return low_rank_update(preservation, keys, residuals, 1.0, self.share)
