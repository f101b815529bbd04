"""PMET: values are found for attention and MLP together; by default only the MLP's are written."""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from lightedit.errors import ArgumentError
from lightedit.lm import Place
from lightedit.methods.closed_form.editor import ClosedFormEditor
from lightedit.methods.closed_form.keys import KeyWalk
from lightedit.methods.closed_form.method import ClosedForm
from lightedit.methods.closed_form.preservation import Preservation
from lightedit.methods.closed_form.stopping import KLBelow
from lightedit.methods.closed_form.value_settings import ValueSettings
from lightedit.methods.closed_form.values import Site
from lightedit.methods.protocol import Editor
from lightedit.statistics.covariance import Covariance


@dataclass(frozen=True)
class PMET(ClosedForm):
    """Precise Model Editing in a Transformer (Li et al., 2024, arXiv 2308.08742).

    Two δ are optimised together, one for the attention's output and one for the MLP's, so that the MLP's δ need not
    hold the attention's part. By default only the MLP's δ is written. A layer takes the share 1 / sqrt(L - l + 1) of
    the residual, which is more than MEMIT's 1 / (L - l + 1), so less is left to later layers.

    Attributes:
        lambda_: weight of preservation, λ in A = λ C0.
        attention_delta: False finds a δ for the MLP's output only (the paper's first ablation).
        write_attention: True writes the attention's δ too, into the attention's output matrices (the paper's second
            ablation). The covariance must then hold these places: `estimate_covariance(lm, method)` estimates them.
        even_spread: True spreads residuals as MEMIT does (the paper's third ablation).
    """

    values: ValueSettings = field(
        default_factory=lambda: ValueSettings(lr=0.2, steps=30, kl_factor=1.0, stopping=KLBelow())
    )
    lambda_: float = 6_000.0
    attention_delta: bool = True
    write_attention: bool = False
    even_spread: bool = False

    editor_type: ClassVar[type[Editor]] = ClosedFormEditor

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.lambda_ > 0:
            raise ArgumentError(f"lambda_ must be positive, got {self.lambda_}")
        if self.write_attention and not self.attention_delta:
            raise ArgumentError(
                "write_attention=True writes the attention's δ, which attention_delta=False does not find; change one"
            )

    @property
    def site(self) -> Site:
        return "attention+mlp" if self.attention_delta else "mlp"

    @property
    def places(self) -> tuple[Place, ...]:
        if not self.write_attention:
            return super().places
        return tuple(matrix for layer in self.layers for matrix in (Place(layer, "attention_out"), Place(layer)))

    def preservation(self, covariance: Covariance, matrix: Place) -> Preservation:
        """A = λ C0."""
        return Preservation.from_covariance(covariance[matrix], scale=self.lambda_)

    def spread(self, layer: int) -> float:
        """1 / sqrt(L - l + 1), counted in edited layers (equation 10)."""
        even = super().spread(layer)
        return even if self.even_spread else even**0.5

    def residuals(self, walk: KeyWalk, keys: Tensor, targets: Tensor) -> Tensor:
        """The target of the walk's place minus its present output at the value layer, [d, B] float64."""
        if self.attention_delta:
            attention, mlp = targets.chunk(2)
            targets = attention if walk.place.name == "attention_out" else mlp
        return super().residuals(walk, keys, targets)
