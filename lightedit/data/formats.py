"""The forms of records by name, and how one is recognised."""

from collections.abc import Callable
from typing import Any, NamedTuple

from lightedit.data import readers
from lightedit.data.fact import Fact, FactError
from lightedit.data.fields import lookup
from lightedit.data.ripple_edits import from_ripple_edits


class Form(NamedTuple):
    """A form of records.

    Attributes:
        format: its name.
        fields: dotted paths that its records have; `*` stands for any field.
        read: function of (record, its number from 0) that returns the record's facts.
        others: whether its records may have further fields.
    """

    format: str
    fields: tuple[str, ...]
    read: Callable[[dict[str, Any], int], list[Fact]]
    others: bool = True

    def missing(self, record: dict[str, Any]) -> list[str]:
        """The fields that a record lacks."""
        return [path for path in self.fields if not _has(record, path)]

    def fits(self, record: dict[str, Any]) -> bool:
        """Whether a record may be of this form."""
        return not self.missing(record) and (self.others or _only_of_fact(record))


_REWRITE = ("prompt", "subject", "target_new.str")
_EASYEDIT = (
    "ground_truth", "rephrase_prompt", "rephrase", "locality", "portability", "locality_prompt", "portability_prompt",
)  # fmt: skip

# The first form of which a record has all fields is taken, so those with more fields come first
FORMS = (
    Form("fact", ("prompt", "target_new"), readers.from_fact, others=False),
    Form("mquake", tuple(f"requested_rewrite.0.{path}" for path in _REWRITE), readers.from_mquake),
    Form("counterfact", tuple(f"requested_rewrite.{path}" for path in _REWRITE), readers.from_counterfact),
    Form("rippleedits", ("edit.prompt", "edit.relation", "edit.target_id"), from_ripple_edits),
    Form("mzsre", ("*.src", "*.subject", "*.alt"), readers.from_mzsre),
    Form("zsre", ("src", "subject", "answers"), readers.from_zsre),
    Form("wikibigedit", ("update", "ans"), readers.from_wikibigedit),
    Form("easyedit", ("prompts", "target_new"), readers.from_easyedit_call),
    *(Form("easyedit", ("prompt", "target_new", field), readers.from_easyedit) for field in _EASYEDIT),
    Form("fact", ("prompt", "target_new"), readers.from_fact),
    Form("known", ("prompt", "subject", "attribute"), readers.from_known),
    Form("qaedit", ("question", "answer"), readers.from_qaedit),
    *(Form("qaedit", ("prompt", "target", field), readers.from_qaedit) for field in ("rephrase", "locality")),
    *(Form("labelled", (field, "label"), readers.from_labelled) for field in ("claim", "text")),
    Form("fastedit", ("prompt", "subject", "target"), readers.from_fastedit),
)
FORMATS = tuple(sorted({form.format for form in FORMS}))
"""Names of the formats."""


def form_of(record: dict[str, Any], format: str | None = None) -> Form:
    """The form of a record, of those of one format or of all.

    Raises:
        FactError: it has the fields of none. The message names the form that comes closest, and what it lacks.
    """
    forms = [form for form in FORMS if format in (None, form.format)]
    found = next((form for form in forms if form.fits(record)), None)
    if found is not None:
        return found
    closest = min(forms, key=lambda form: (form.missing(record) == [*form.fields], len(form.missing(record))))
    missing = closest.missing(record)
    have = f"the record has {', '.join(record) or 'none'}"
    if format is None and len(missing) == len(closest.fields):
        raise FactError(f"no field of any format: {have}; the formats are {', '.join(FORMATS)}")
    which = f"the format {format}" if format else f"the closest format, {closest.format},"
    raise FactError(f"{missing[0]}: missing; {which} has {', '.join(closest.fields)}, and {have}")


def _only_of_fact(record: dict[str, Any]) -> bool:
    """Whether all fields are those of `Fact`; EasyEdit's portability, an object, is not."""
    return record.keys() <= set(readers.FACT_FIELDS) and not isinstance(record.get("portability"), dict)


def _has(record: Any, path: str) -> bool:
    if path.startswith("*."):
        return any(lookup(value, path[2:]) is not None for value in record.values() if isinstance(value, dict))
    return lookup(record, path) is not None
