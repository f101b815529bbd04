"""What methods need before they can edit."""

from collections.abc import Sequence

from lightedit.lm import LanguageModel
from lightedit.methods.protocol import Method
from lightedit.statistics.covariance import Covariance
from lightedit.statistics.estimation import estimate_covariance


def covariance_for(lm: LanguageModel, methods: Sequence[Method], *, progress_bar: bool = True) -> Covariance | None:
    """The covariance that `methods` need together, estimated from self-generated text and kept in the cache.

    None if no method needs one.
    """
    for method in methods:
        method.check(lm)
    places = sorted({place for method in methods for place in method.covariance_places})
    return estimate_covariance(lm, places, cache=True, progress_bar=progress_bar) if places else None
