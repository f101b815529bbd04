"""How a run was made, and all that determines what comes of it."""

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from lightedit.data.facts import Fact
from lightedit.data.prompts import Contexts
from lightedit.digests import digest
from lightedit.lm import LanguageModel, Place
from lightedit.methods import Method
from lightedit.statistics.covariance import Covariance


def provenance(lm: LanguageModel, method: Method, contexts: Contexts, covariance: Covariance) -> dict[str, Any]:
    """What an edit by `method` is made with, as JSON can hold it."""
    return {
        "method": method.to_dict(),
        "contexts": asdict(contexts),
        "covariance": asdict(covariance.provenance),
        **computing(lm),
    }


def computing(lm: LanguageModel) -> dict[str, Any]:
    """With what `lm` computes: its dtype and the versions of libraries."""
    return {
        "dtype": str(lm.dtype).removeprefix("torch."),
        "versions": {name: version(name) for name in ("lightedit", "torch", "transformers", "lightning")},
    }


def determining(lm: LanguageModel, method: Method, covariance: Covariance, facts: Sequence[Fact]) -> dict[str, Any]:
    """What determines a run beside its provenance: the weights, tensors and facts themselves, and the machine."""
    tensors = {matrix.key: covariance[matrix] for matrix in method.places}
    return {**determining_scores(lm, facts, method.places), "covariance tensors": digest(tensors=tensors)}


def determining_scores(lm: LanguageModel, facts: Sequence[Fact], matrices: Collection[Place] = ()) -> dict[str, Any]:
    """What determines the scores of `lm` as it is now beside versions and dtype; of `matrices` every bit counts."""
    # also those that carry an edit
    weights = {matrix.key: lm.weight(matrix) for matrix in {*matrices, *lm.weights.places}}
    return {
        "model": lm.fingerprint,
        "weights": digest(tensors=weights),
        "facts": digest(json.dumps([fact.to_dict() for fact in facts])),
        "device": lm.device.type,
    }
