"""Solving facts together again: values that are known are given, the others are searched, all are written at once."""

import json
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from lightning import Callback
from torch import Tensor

from lightedit.data.fact import PROMPT_LISTS
from lightedit.data.facts import Fact
from lightedit.editing.artefact import Edit, EditError
from lightedit.editing.run import edit, prepare
from lightedit.editing.settings import RunSettings
from lightedit.errors import ArgumentError
from lightedit.lm import LanguageModel
from lightedit.methods import METHODS
from lightedit.methods.needs import covariance_for
from lightedit.methods.protocol import Editor, Method, check_model_and_method
from lightedit.methods.recorded import method_of
from lightedit.runs.provenance import computing
from lightedit.statistics.covariance import Covariance

_NOT_SEARCHED = (
    *PROMPT_LISTS,
    "target_true",
    "neighborhood_target",
    "neighborhood_answers",
    "relation",
    "id",
    "target_id",
    "portability",
)
_OF_COVARIANCE = ("corpus", "tokens", "sequence_length", "dtype", "seed")


@dataclass(frozen=True)
class Known:
    """The result of a fact's search on the unedited model.

    Attributes:
        value: the result, as `Editor.give` takes it.
        loss: the last loss of the search, in nats; None if that is not known.
        together: what `searched_with` returned where the value was found.
    """

    value: Tensor
    loss: float | None
    together: tuple[str, ...] = ()


def solve(
    lm: LanguageModel,
    facts: Sequence[Fact],
    method: Method,
    known: Mapping[int, Known],
    *,
    covariance: Covariance | None = None,
    settings: RunSettings | None = None,
    callbacks: Sequence[Callback] = (),
) -> Edit:
    """Write `facts` into the unedited `lm` in one round, and search only the values that are not known.

    Args:
        lm: the unedited model.
        facts: the facts.
        method: the method.
        known: fact's index -> its result. It is used if it depends on the same other facts as in this run.
        covariance: as for `edit`.
        settings: as for `edit`, without `facts_per_round`.
        callbacks: as for `edit`.

    Raises:
        ArgumentError: the method does not solve facts together, or `facts_per_round` is given.
        The errors of `edit`.
    """
    check_model_and_method(lm, method)
    settings = settings or RunSettings()
    check_together(facts, method, settings)
    if covariance is None:
        covariance = covariance_for(lm, [method], progress_bar=settings.progress_bar)
    prepared = prepare(lm, facts, method, covariance=covariance, settings=settings)
    known = {index: one for index, one in known.items() if one.together == searched_with(prepared, index)}
    if settings.progress_bar and method.search_inputs() is not None:
        print(f"{len(known)} of {len(facts)} values are reused", file=sys.stderr)
    prepared.give({index: one.value for index, one in known.items()}, with_others=True)
    prepared.losses.update({index: one.loss for index, one in known.items() if one.loss is not None})
    return edit(lm, facts, method, settings=settings, callbacks=callbacks, prepared=prepared)


def check_together(facts: Sequence[Fact], method: Method, settings: RunSettings) -> None:
    """Raise ArgumentError unless the method solves all facts together."""
    if settings.facts_per_round is not None:
        raise ArgumentError("facts_per_round: all facts are solved together here; leave it out")
    if (most := method.facts_per_solve) is not None and len(facts) > most:
        name = type(method).__name__
        raise ArgumentError(f"{name} solves {most} fact at a time, but here are {len(facts)}; take MEMIT, for example")


@contextmanager
def instead_of(lm: LanguageModel, own: Collection[str], last: Edit | None, who: str) -> Iterator[None]:
    """Within the context, `lm` lacks the edits `own`. If the context raises, the edit `last` is put back.

    Args:
        lm: the model.
        own: ids of the edits that may be taken back.
        last: the edit of these that can be put back, if `lm` carries it.
        who: what they belong to, for the message.

    Raises:
        EditError: `lm` carries other edits.
    """
    if others := [other for other in lm.weights.edits if other not in own]:
        raise EditError(
            f"{lm.name} carries edit {' and '.join(others)}, not of {who}; facts are solved together on the unedited "
            "model, so revert that first and make it again afterwards"
        )
    back = last if last is not None and last.is_applied(lm) else None
    lm.weights.remove([owner for owner in lm.weights.owners if owner[0] in own])
    try:
        yield
    except BaseException:
        if back is not None:
            back.apply(lm)
        raise


def solve_again(
    old: Edit,
    lm: LanguageModel,
    facts: Sequence[Fact],
    *,
    method: Method | None = None,
    covariance: Covariance | None = None,
    settings: RunSettings | None = None,
) -> Edit:
    """A new edit of `facts` in place of `old`, whose values are reused; see `Edit.without`."""
    old.check_model(lm)
    method = method or method_of(old.record.method)
    settings = settings or RunSettings(**old.record.inputs.get("collisions", {}))
    check_model_and_method(lm, method)
    check_together(facts, method, settings)
    if covariance is None:
        covariance = covariance_for(lm, [method], progress_bar=settings.progress_bar)
    _check_covariance(old, covariance)
    known = {}
    if not old.record.on_top_of and old.record.dtype == computing(lm)["dtype"] and _searches_alike(method, old):
        losses = {outcome.fact: outcome.loss for outcome in old.outcomes}
        before = {own_text(old.facts[index]): index for index in old.values}
        places = {index: place for index, fact in enumerate(facts) if (place := before.get(own_text(fact))) is not None}
        known = {index: Known(old.values[place], losses.get(old.facts[place])) for index, place in places.items()}
    with instead_of(lm, [old.id], old, f"edit {old.id}"):
        return solve(lm, facts, method, known, covariance=covariance, settings=settings)


def searched_with(editor: Editor, index: int) -> tuple[str, ...]:
    """What the result of a fact depends on besides the fact and the search: other facts' `own_text`, and the method.

    Empty for a fact that is searched by itself. A joint search depends on what the solve writes, so on its settings.
    """
    others = sorted(own_text(editor.facts[other]) for other in editor.searched_with(index))
    return (*others, json.dumps(editor.method.to_dict())) if others else ()


def own_text(fact: Fact) -> str:
    """All that a search reads of a fact, as text: its fields without those that score, name or explain it."""
    return json.dumps({name: value for name, value in fact.to_dict().items() if name not in _NOT_SEARCHED})


def _searches_alike(method: Method, old: Edit) -> bool:
    record = old.record.method
    if record.get("name") in METHODS:
        return method.search_inputs() == method_of(record).search_inputs()
    return bool(json.loads(json.dumps(method.to_dict())) == record)


def _check_covariance(old: Edit, covariance: Covariance | None) -> None:
    """Raise EditError if `old` was made with another covariance, so that facts would change that are not meant to."""
    recorded = old.record.inputs.get("covariance")
    if covariance is None or recorded is None:
        return
    now = asdict(covariance.provenance)
    if other := [name for name in _OF_COVARIANCE if recorded.get(name) != now[name]]:
        there, here = (", ".join(f"{name} {values[name]}" for name in other) for values in (recorded, now))
        raise EditError(f"edit {old.id} was made with a covariance of {there}, not {here}; pass it as covariance=")


Edit.solver = solve_again
