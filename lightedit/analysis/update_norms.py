"""How much edits change each matrix: the norm of ΔW by layer and place, for an edit beside its ablations."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightedit.editing.artefact import Edit, EditError
from lightedit.errors import ArgumentError
from lightedit.figures import Axis, Drawing, Line, Panel, line_chart, save
from lightedit.lm import Place
from lightedit.lm.changes import Change, LowRankUpdate, total
from lightedit.lm.place import Name
from lightedit.runs.tables import write_table

NORMS_TABLE = "update_norms.csv"

_PANEL = (360, 270)  # points
_TITLES: dict[Name, str] = {"mlp": "MLP's second matrix", "attention_out": "attention's output matrix"}


@dataclass(frozen=True)
class UpdateNorms:
    """Frobenius norms of what edits of one model add to its matrices.

    Attributes:
        model: the model's name.
        norms: name of an edit -> place -> norm of ΔW, summed over all rounds; of ΔW and Δb together where a bias is
            changed too.
    """

    model: str
    norms: Mapping[str, Mapping[Place, float]]

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows of update_norms.csv."""
        for name, norms in self.norms.items():
            for place, norm in sorted(norms.items()):
                yield {"edit": name, "layer": place.layer, "place": place.name, "norm": norm}

    def __str__(self) -> str:
        lines = [f"norm of ΔW by layer in {self.model}:"]
        for name, norms in self.norms.items():
            values = ", ".join(f"{place} {norm:.3g}" for place, norm in sorted(norms.items()))
            lines.append(f"  {name}: {values or 'no matrix is changed'}")
        return "\n".join(lines)

    def figure(self) -> Drawing:
        """One panel for each kind of place, by layer, a line for each edit.

        Raises:
            ArgumentError: no edit changes a matrix.
        """
        kinds = list(dict.fromkeys(place.name for place in sorted(p for norms in self.norms.values() for p in norms)))
        if not kinds:
            raise ArgumentError("edits: none of them changes a matrix, so there are no norms to draw")
        panels = []
        for kind in kinds:
            lines = []
            for series, (name, norms) in enumerate(self.norms.items()):
                points = [(p.layer, norm) for p, norm in sorted(norms.items()) if p.name == kind]
                if points:
                    lines.append(Line(name, points, series))
            panels.append(Panel(_TITLES.get(kind, kind), lines, Axis("layer", whole=True), Axis("norm of ΔW", base=0)))
        columns = min(2, len(panels))
        size = (_PANEL[0] * columns, _PANEL[1] * -(-len(panels) // columns))
        return line_chart(panels, size, columns=columns, legend_columns=columns)

    def save(self, folder: str | Path) -> Path:
        """Write update_norms.csv, .svg and .png.

        Returns:
            The folder.

        Raises:
            ArgumentError: no edit changes a matrix.
        """
        folder = Path(folder)
        drawing = self.figure()
        folder.mkdir(parents=True, exist_ok=True)
        write_table(folder / NORMS_TABLE, list(self.rows()))
        for suffix in ("svg", "png"):
            save(drawing, folder / f"update_norms.{suffix}")
        return folder


Saved = Edit | str | Path
"""An edit, or the folder of a saved one."""


def update_norms(edits: Saved | Sequence[Saved] | Mapping[str, Saved]) -> UpdateNorms:
    """The Frobenius norm of ΔW at every place that edits change.

        norms = update_norms({"PMET": pmet, "even spread": "edits/even"})
        norms.save("studies/norms")

    Args:
        edits: an edit, the folder of a saved one, several of them, or several by name. Without names, folders are named
            by their last part, and edits by their method; equal names are numbered.

    Raises:
        ArgumentError: there is no edit, or one changes a place by an adaptor, which adds to no matrix.
        EditError: the edits are of different models, or a folder holds no whole edit.
        FileNotFoundError: a folder holds no edit.
    """
    named = edits_by_name(edits)
    if not named:
        raise ArgumentError("edits: none given; give an edit, or the folder of a saved one")
    first, *others = named
    for other in others:
        if named[other].fingerprint != named[first].fingerprint:
            raise EditError(
                f"edit {other!r} was made for {named[other].model} with fingerprint {named[other].fingerprint}, but "
                f"{first!r} for {named[first].model} with {named[first].fingerprint}; compare edits of one model"
            )
    return UpdateNorms(named[first].model, {name: _norms(name, edit) for name, edit in named.items()})


def edits_by_name(edits: Saved | Sequence[Saved] | Mapping[str, Saved]) -> dict[str, Edit]:
    """Each edit, loaded where a folder is given, under its name; see `update_norms`.

    Raises:
        EditError: a folder holds no whole edit.
        FileNotFoundError: a folder holds no edit.
    """
    if isinstance(edits, Mapping):
        return {name: _loaded(edit) for name, edit in edits.items()}
    found: dict[str, Edit] = {}
    for given in [edits] if isinstance(edits, Edit | str | Path) else edits:
        edit = _loaded(given)
        name = str(edit.record.method.get("name", "edit")) if isinstance(given, Edit) else Path(given).resolve().name
        number = next(n for n in range(1, len(found) + 2) if _numbered(name, n) not in found)
        found[_numbered(name, number)] = edit
    return found


def _numbered(name: str, number: int) -> str:
    return name if number == 1 else f"{name} {number}"


def _loaded(edit: Saved) -> Edit:
    return edit if isinstance(edit, Edit) else Edit.load(edit)


def _norms(name: str, edit: Edit) -> dict[Place, float]:
    """The norm of an edit's whole change at each place."""
    changes: dict[Place, list[Change]] = {}
    for of_round in edit.rounds:
        for place, change in of_round.items():
            changes.setdefault(place, []).append(change)
    return {place: _norm(f"edit {name!r}, {place}", own) for place, own in sorted(changes.items())}


def _norm(where: str, changes: Sequence[Change]) -> float:
    try:
        whole = total(changes)
    except ArgumentError as error:
        raise ArgumentError(f"{where} is changed by an adaptor, which adds to no matrix; leave it out") from error
    # many rounds of factors take more numbers than the matrix itself
    return (whole.compact() if isinstance(whole, LowRankUpdate) else whole).norm()
