"""The base of locate-then-edit methods: where values are found, what is preserved, how residuals are spread."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, Self

from torch import Tensor

from lightedit.data.facts import Fact
from lightedit.data.prompts import Contexts, ContextSettings, tokenize_facts
from lightedit.errors import ArgumentError
from lightedit.lm import LanguageModel, Place
from lightedit.lm.arguments import check_model
from lightedit.lm.changes import LowRankUpdate
from lightedit.methods.closed_form.behind_norm import before_norm, behind_norm, remaining_delta
from lightedit.methods.closed_form.collisions import equal_keys, refuse
from lightedit.methods.closed_form.keys import KeyWalk
from lightedit.methods.closed_form.preservation import IndefiniteTermError, Preservation, low_rank_update
from lightedit.methods.closed_form.value_settings import ValueSettings
from lightedit.methods.closed_form.values import Site
from lightedit.methods.protocol import EditorSettings, Method
from lightedit.statistics.covariance import Covariance, CovarianceError


@dataclass(frozen=True)
class ClosedForm(Method):
    """Base of the locate-then-edit methods: frozen settings, which `ClosedFormEditor` reads.

    Attributes:
        layers: the edited layers, ascending; values are found at the last of them.
        values: settings of the value optimisation.
        contexts: how the contexts of keys and values are sampled.
        passes: most searches of a round, each followed by a solve. After the first one, facts whose target is not yet
            the most probable continuation are searched again in the edited model; 1 is the published way. See
            `FurtherPasses`.
        site: where δ is added.
        keeps_past_keys: whether later rounds of a run preserve the keys of its earlier rounds.
    """

    layers: tuple[int, ...]
    values: ValueSettings = field(default_factory=ValueSettings)
    contexts: ContextSettings = field(default_factory=ContextSettings)
    passes: int = field(default=1, kw_only=True)

    keeps_past_keys: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", as_layers(self.layers))
        if self.passes < 1:
            raise ArgumentError(f"passes must be at least 1, got {self.passes}")
        if self.passes > 1 and self.erases:
            raise ArgumentError(
                "passes: further ones raise the target's probability, and objective 'erase' lowers it; give 1"
            )

    @property
    def value_layer(self) -> int:
        """The last edited layer, where the values are found."""
        return self.layers[-1]

    @property
    def value_place(self) -> Place:
        """The MLP's matrix of the value layer."""
        return Place(self.value_layer)

    @property
    def places(self) -> tuple[Place, ...]:
        """The matrices that are written, in order."""
        return tuple(Place(layer) for layer in self.layers)

    @property
    def covariance_places(self) -> tuple[Place, ...]:
        return self.places

    def at(self, layers: Sequence[int]) -> Self:
        return replace(self, layers=tuple(layers))

    def erasing(self) -> Self:
        """See `Method.erasing`. As published, no loss ends the search early."""
        return replace(
            self, values=replace(self.values, objective="erase", stopping=None, loss_threshold=0.0), passes=1
        )

    @property
    def erases(self) -> bool:
        return self.values.objective == "erase"

    def check(self, lm: LanguageModel) -> None:
        check_model(lm, self.kinds, type(self).__name__)
        lm.check_layers(self.layers)

    def check_facts(
        self, lm: LanguageModel, facts: Sequence[Fact], rounds: Sequence[Sequence[int]], settings: EditorSettings
    ) -> None:
        """Refuse facts whose keys are equal because their tokens are, if collisions are to be refused."""
        if settings.on_collision == "error":
            refuse(facts, equal_keys(tokenize_facts(lm.tokenizer, facts, Contexts()), rounds))

    def search_inputs(self) -> dict[str, Any]:
        return {
            "site": self.site,
            "layer": self.value_layer,
            "values": repr(self.values),  # includes the class of `stopping`
            "contexts": repr(self.contexts),
        }

    def same_preservation(self, other: Method) -> bool:
        """Whether `other` has the same preservation terms as this method when a run starts."""
        if type(other) is not type(self):
            return False
        return replace(other, values=self.values, contexts=self.contexts, passes=self.passes) == self

    @property
    def site(self) -> Site:
        return "block"

    def value_size(self, lm: LanguageModel) -> int:
        """Entries of a value: d, or 2 d for two sites, and for "block" with a norm after the MLP (see `Values`)."""
        two = self.site == "attention+mlp" or (self.site == "block" and lm.mlp_norm(self.value_layer) is not None)
        return lm.d_model * (2 if two else 1)

    @property
    def reads_keys_after_writing(self) -> bool:
        """Whether past keys are read again after their round was written; False keeps the keys of the solve."""
        return False

    @abstractmethod
    def preservation(self, covariance: Covariance, matrix: Place) -> Preservation:
        """The preservation term A of one matrix."""

    def factors(self, lm: LanguageModel, covariance: Covariance) -> dict[Place, Preservation]:
        """The factored preservation term of every edited matrix, on the device of the matrix.

        Raises:
            CovarianceError: `covariance` is of another model, lacks a matrix, or is not positive definite.
        """
        covariance.check(lm, self.places, factor=False)  # the factors below show whether A is definite
        factors = {}
        for matrix in self.places:
            try:
                device = lm.weight(matrix).device
                factors[matrix] = self.preservation(covariance.on(device, matrix), matrix).to(device)
            except IndefiniteTermError as error:
                raise covariance.indefinite(matrix) from error
            except ArgumentError as error:
                raise CovarianceError(f"{matrix}: {error}") from error
        return factors

    def gamma(self, facts: int) -> float:
        """γ of the closed form, for a solve of this many facts; 0 writes residuals exactly."""
        return 1.0

    def spread(self, layer: int) -> float:
        """The share of the remaining residual that `layer` takes: 1 / (L - l + 1), counted in edited layers."""
        return 1 / (len(self.layers) - self.layers.index(layer))

    def keys(self, walk: KeyWalk) -> Tensor:
        """K at the walk's matrix, [d_in, B] float64."""
        return walk.keys()

    def residuals(self, walk: KeyWalk, keys: Tensor, targets: Tensor) -> Tensor:
        """The share of the residuals that the walk's layer takes, [d, B] float64.

        Residuals are the targets minus the present activations at the site.

        At site "block", residuals are carried back through a norm that follows the MLP, so that they fit the matrix's
        output.

        Args:
            walk: a walk at the matrix to write.
            keys: K at this matrix, [d_in, B].
            targets: v at the site, [d, B]; [2 d, B] for two sites, and for "block" with a norm (see `Values`).
        """
        if self.site != "block":
            left = targets - walk.outputs(replace(walk.place, layer=self.value_layer))
            if walk.place.name != "mlp" or walk.layer == self.value_layer:
                return self.spread(walk.layer) * left
            return before_norm(walk, self.spread(walk.layer) * behind_norm(walk, self.value_layer, left))
        present = walk.outputs(Place(self.value_layer, "block"))
        left = targets[: len(present)] - present
        if walk.layer == self.value_layer and len(targets) > len(present):
            return remaining_delta(walk, targets[len(present) :], left)
        return before_norm(walk, self.spread(walk.layer) * left)

    def update(self, preservation: Preservation, keys: Tensor, residuals: Tensor, walk: KeyWalk) -> LowRankUpdate:
        """The update of the walk's matrix that writes `residuals` [..., d, B] at `keys` [..., d_in, B]."""
        return low_rank_update(preservation, keys, residuals, self.gamma(keys.shape[-1]))

    def to_dict(self) -> dict[str, Any]:
        """Name and settings, for the record of a run."""
        settings = super().to_dict()
        if (stopping := self.values.stopping) is not None:
            settings["values"]["stopping"] = {"name": type(stopping).__name__, **asdict(stopping)}
        return settings


def as_layers(layers: Sequence[int] | int) -> tuple[int, ...]:
    """Layers as a tuple; raises ArgumentError unless they are ascending, distinct and not negative."""
    result = (layers,) if isinstance(layers, int) else tuple(int(layer) for layer in layers)
    if not result or list(result) != sorted(set(result)) or result[0] < 0:
        raise ArgumentError(f"layers must be ascending, distinct and not negative, got {layers!r}")
    return result
