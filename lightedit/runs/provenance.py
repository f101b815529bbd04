"""How a run was made, and all that determines what comes of it."""

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
    """How an edit came about.

    Attributes:
        method: the method's name and settings.
        inputs: what else its editor read, by name, such as "contexts" and the provenance of the "covariance".
        dtype: the model's.
        versions: of the libraries that computed.
        on_top_of: ids of the edits that the model carried.
        seconds: time spent in each step: "values" for the search, "update" for writing.
        stopped: why a limit ended the run, if one did.
    """

    method: dict[str, Any]
    inputs: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    versions: dict[str, str] = field(default_factory=dict)
    on_top_of: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=lambda: {"values": 0.0, "update": 0.0})
    stopped: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """All fields by name, as JSON holds them."""
        return asdict(self) | {"on_top_of": list(self.on_top_of)}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        """Build a record from what `to_dict` returns.

        Raises:
            TypeError: a field is unknown or missing.
        """
        return cls(**{**record, "on_top_of": tuple(record["on_top_of"])})


def computing(lm: LanguageModel) -> dict[str, Any]:
    """With what `lm` computes: its dtype and the versions of libraries."""
    return {
        "dtype": str(lm.dtype).removeprefix("torch."),
        "versions": {name: version(name) for name in ("lightedit", "torch", "transformers", "lightning")},
    }


def fingerprint_inputs(lm: LanguageModel, facts: Sequence[Fact], places: Collection[Place] = ()) -> dict[str, Any]:
    """What determines the scores of `lm` as it is now beside `computing`; of `places` every bit counts."""
    # also those that carry an edit
    weights = {place.key: lm.weight(place) for place in {*places, *lm.weights.places}}
    return {
        "model": lm.fingerprint,
        "weights": digest("", weights),
        "facts": digest(json.dumps([fact.to_dict() for fact in facts]), {}),
        "device": lm.device.type,
    }
