"""The record of a run, and the inputs that determine its result."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any, Self

from lightedit.data.facts import Fact
from lightedit.digests import digest
from lightedit.lm import LanguageModel, Place


@dataclass
class RunRecord:
    """The record of a run: how its edit was made.

    Attributes:
        method: the method's name and settings.
        inputs: other inputs of its editor by name, such as "contexts" and the provenance of the "covariance".
        dtype: dtype of the model.
        versions: library -> its version.
        on_top_of: ids of the edits that the model carried before.
        seconds: time spent in each step: "values" for the search, "update" for writing.
        stopped: the reason, if a limit ended the run.
    """

    method: dict[str, Any]
    inputs: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    versions: dict[str, str] = field(default_factory=dict)
    on_top_of: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=lambda: {"values": 0.0, "update": 0.0})
    stopped: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """All fields by name, ready for JSON."""
        return asdict(self) | {"on_top_of": list(self.on_top_of)}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        """Build a record from what `to_dict` returns.

        Raises:
            TypeError: a field is unknown or missing.
        """
        return cls(**{**record, "on_top_of": tuple(record["on_top_of"])})


def computing(lm: LanguageModel) -> dict[str, Any]:
    """The dtype of `lm`, and the versions of the libraries that compute."""
    return {
        "dtype": str(lm.dtype).removeprefix("torch."),
        "versions": {name: version(name) for name in ("lightedit", "torch", "transformers", "lightning")},
    }


def fingerprint_inputs(lm: LanguageModel, facts: Sequence[Fact], places: Collection[Place] = ()) -> dict[str, Any]:
    """Digests of all that determines the scores of `lm` in its present state, besides `computing`.

    The digest of the weights covers every element at `places` and at all edited places. Adaptors have a digest of
    their own.
    """
    weights = {place.key: lm.weight(place) for place in {*places, *lm.weights.places} if place.has_matrix}
    adaptors = {
        f"{place.key}.{number}.{name}": tensor
        for place in lm.weights.places
        for number, adaptor in enumerate(lm.weights.adaptors(place))
        for name, tensor in adaptor.tensors().items()
    }
    return {
        **({"adaptors": digest("", adaptors)} if adaptors else {}),
        "model": lm.fingerprint,
        "weights": digest("", weights),
        "facts": digest(json.dumps([fact.to_dict() for fact in facts]), {}),
        "device": lm.device.type,
    }
