"""ROME: one fact at a time, written exactly into one layer."""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from lightedit.data.prompts import ContextSettings
from lightedit.methods.base import Method
from lightedit.update import Preservation
from lightedit.values import Site, ValueSettings


@dataclass(frozen=True)
class ROME(Method):
    """Rank-One Model Editing (Meng et al., 2022, arXiv 2202.05262), with one key everywhere.

    The key averaged over contexts stands in the numerator and in the divisor of the rank-one update alike, so
    W k = v holds exactly. Published code used the bare prompt's key in the divisor, which can break a model with a
    single edit (Gupta et al., 2024, arXiv 2403.07175).
    """

    values: ValueSettings = field(default_factory=lambda: ValueSettings(steps=20, clamp_norm_factor=4.0))
    contexts: ContextSettings = field(
        default_factory=lambda: ContextSettings(prefixes=(("", 10, 5), ("", 10, 10)), bare_weight=None)
    )

    site: ClassVar[Site] = "mlp"
    gamma: ClassVar[float] = 0.0
    facts_per_solve: ClassVar[int | None] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.layers) != 1:
            raise ValueError(f"ROME edits one layer, got {list(self.layers)}; MEMIT spreads an edit over several")

    def preservation(self, covariance: Tensor) -> Preservation:
        """A = C0; its scale does not matter at γ = 0."""
        return Preservation.from_covariance(covariance)
