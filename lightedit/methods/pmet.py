"""PMET: values for attention and MLP together, of which the MLP's are written."""

from dataclasses import dataclass, field

from lightedit.covariance import Covariance
from lightedit.methods.base import Method
from lightedit.stopping import KLBelow
from lightedit.update import Preservation
from lightedit.values import Site, ValueSettings


@dataclass(frozen=True)
class PMET(Method):
    """Precise Model Editing in a Transformer (Li et al., 2024, arXiv 2308.08742).

    One δ is found for the attention's output and one for the MLP's at the same time, so that the MLP need not carry
    what attention says; only the MLP's is written. Residuals are spread by square roots, so that less of them is left
    to later layers.

    Attributes:
        lambda_: weight of preservation, λ in A = λ C0.
        attention_delta: False finds a δ for the MLP's output alone (the paper's first ablation).
        even_spread: True spreads residuals as MEMIT does (the paper's third ablation).
    """

    values: ValueSettings = field(
        default_factory=lambda: ValueSettings(lr=0.2, steps=30, kl_factor=1.0, stopping=KLBelow())
    )
    lambda_: float = 6_000.0
    attention_delta: bool = True
    even_spread: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lambda_ <= 0:
            raise ValueError(f"lambda_ must be positive, got {self.lambda_}")

    @property
    def site(self) -> Site:
        return "attention+mlp" if self.attention_delta else "mlp"

    def preservation(self, covariance: Covariance, layer: int) -> Preservation:
        """A = λ C0."""
        return Preservation.from_covariance(covariance[layer], scale=self.lambda_)

    def spread(self, layer: int) -> float:
        """1 / sqrt(L - l + 1), counted in edited layers (equation 10)."""
        even = super().spread(layer)
        return even if self.even_spread else even**0.5
