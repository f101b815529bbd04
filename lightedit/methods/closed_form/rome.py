"""ROME: one fact at a time, written exactly."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from lightedit.data.prompts import ContextSettings
from lightedit.errors import ArgumentError
from lightedit.lm import Place
from lightedit.lm.changes import LowRankUpdate
from lightedit.methods.closed_form.editor import ClosedFormEditor
from lightedit.methods.closed_form.keys import KeyWalk, values_of
from lightedit.methods.closed_form.method import ClosedForm
from lightedit.methods.closed_form.preservation import Preservation
from lightedit.methods.closed_form.value_settings import ValueSettings
from lightedit.methods.closed_form.values import Site
from lightedit.methods.protocol import Editor
from lightedit.statistics.covariance import Covariance


@dataclass(frozen=True)
class ROME(ClosedForm):
    """Rank-One Model Editing (Meng et al., 2022, arXiv 2202.05262), by default as r-ROME.

    Attributes:
        key: the key of the rank-one update. "averaged" uses the key averaged over contexts in numerator and divisor,
            so W k = v holds exactly (r-ROME, Gupta et al., 2024, arXiv 2403.07175). "bare" uses the bare prompt's key
            in both (p-ROME, ibid.). "published" uses the averaged key in C⁻¹ k, and the bare prompt's key in divisor
            and residual, as the published code does; it can ruin a model with a single edit.
    """

    values: ValueSettings = field(default_factory=lambda: ValueSettings(steps=20, clamp_norm_factor=4.0))
    contexts: ContextSettings = field(
        default_factory=lambda: ContextSettings(prefixes=(("", 10, 5), ("", 10, 10)), bare_weight=None)
    )
    key: Literal["averaged", "bare", "published"] = "averaged"

    editor_type: ClassVar[type[Editor]] = ClosedFormEditor
    facts_per_solve: ClassVar[int | None] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.key not in ("averaged", "bare", "published"):
            raise ArgumentError(f"key is 'averaged', 'bare' or 'published', got {self.key!r}")
        if self.contexts.separate:
            raise ArgumentError("contexts.separate writes a key for every context, but ROME writes one; leave it out")

    @property
    def site(self) -> Site:
        return "mlp"

    def preservation(self, covariance: Covariance, matrix: Place) -> Preservation:
        """A = C0; its scale does not matter at γ = 0."""
        return Preservation.from_covariance(covariance[matrix])

    def gamma(self, facts: int) -> float:
        return 0.0

    def keys(self, walk: KeyWalk) -> Tensor:
        return walk.keys(bare=self.key == "bare")

    def residuals(self, walk: KeyWalk, keys: Tensor, targets: Tensor) -> Tensor:
        """v - W k at the value layer, so that W k = v afterwards; at earlier layers, the bare prompt's residual."""
        if walk.layer != self.value_layer:
            return super().residuals(walk, keys, targets)
        return targets - values_of(walk.lm, walk.place, walk.keys(bare=True) if self.key == "published" else keys)

    def update(self, preservation: Preservation, keys: Tensor, residuals: Tensor, walk: KeyWalk) -> LowRankUpdate:
        if self.key != "published":
            return super().update(preservation, keys, residuals, walk)
        solved = preservation.solve(keys)
        bare = walk.keys(bare=True).to(solved).T.reshape(keys.shape)  # each solve has one key
        return LowRankUpdate(residuals.to(solved), solved / (bare.mT @ solved))
