"""An edit: the changes that a run wrote into a model. It can be applied, reverted, saved and loaded."""

import hashlib
import json
import uuid
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from lightedit.data.facts import Fact
from lightedit.data.lookup import place_of, with_target
from lightedit.data.words import counted
from lightedit.editing.outcomes import Damage, Outcome
from lightedit.editing.summary import count_held, lines_of
from lightedit.errors import LightEditError, MissingFileError
from lightedit.evaluation.result import Evaluation
from lightedit.files import whole_folder
from lightedit.lm import LanguageModel, Place
from lightedit.lm.arguments import check_model
from lightedit.lm.changes import Change, load_changes, save_changes
from lightedit.lm.fingerprint import differing_dtypes
from lightedit.lm.kinds import KINDS
from lightedit.lm.weights import Owner
from lightedit.methods.protocol import Editor
from lightedit.runs.provenance import RunRecord, computing
from lightedit.runs.tables import write_table

_FORMAT = 2
_EVALUATIONS = ("before", "after")


class EditError(LightEditError, ValueError):
    """An edit cannot be saved, loaded, applied or reverted; the message says why and what to do."""


@dataclass
class Edit:
    """The result of a run: its changes, the facts, and the record and scores that document them.

    Attributes:
        model: name of the edited model.
        fingerprint: fingerprint of its unedited weights.
        record: how the edit was made.
        facts: the facts written, round after round, in the order they were given.
        rounds: for each round written, place -> change.
        facts_in_round: number of facts written in each round.
        before: scores of the unedited model on the facts.
        after: scores of the edited model.
        id: a unique name.
        outcomes: what became of each written fact, in the order of `facts`; empty if the run did not ask.
        damage: what changed at prompts that the edit should leave alone, the largest KL first.
        values: fact's index -> the result of its search, if that was on the weights with which the run started and for
            this fact alone: [d], or [2 d] for two sites. `Editor.give` takes them in a later run.
        tables: rows that the run recorded after its rounds: "retention" (see `EditModule`), "health" (see `Health`).
            `save` writes them for `lightedit report`; `load` does not read them.
    """

    model: str
    fingerprint: str
    record: RunRecord = field(default_factory=lambda: RunRecord({}))
    facts: list[Fact] = field(default_factory=list)
    rounds: list[dict[Place, Change]] = field(default_factory=list)
    facts_in_round: list[int] = field(default_factory=list)
    before: Evaluation | None = None
    after: Evaluation | None = None
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    outcomes: tuple[Outcome, ...] = ()
    damage: tuple[Damage, ...] = ()
    values: dict[int, Tensor] = field(default_factory=dict, compare=False, repr=False)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict, compare=False)

    solver: ClassVar[Callable[..., "Edit"]]
    """(edit, lm, facts, **arguments) -> a new edit of these facts; `again` sets it, which knows how runs are made."""

    @classmethod
    def begin(cls, editor: Editor) -> Self:
        """The edit of a run that has written nothing yet."""
        lm = editor.lm
        method, inputs = json.loads(json.dumps([editor.method.to_dict(), editor.record()]))  # as `load` returns them
        collisions = {name: getattr(editor.settings, name) for name in ("on_collision", "collision_similarity")}
        inputs |= {"collisions": collisions}
        record = RunRecord(method, inputs, **computing(lm), on_top_of=tuple(lm.weights.edits))
        return cls(lm.name, lm.fingerprint, record)

    def __str__(self) -> str:
        """What the run wrote, one line a fact, and what changed elsewhere."""
        wrote = f"{self.record.method.get('name', 'a method')} wrote {counted(len(self.facts))} into {self.model}"
        if not self.outcomes:
            return f"{wrote}, layers {self.layers}"
        title = f"{wrote}, layers {self.layers}: {count_held(self.outcomes)}"
        return "\n".join([title, *lines_of(self.outcomes, self.damage)])

    @property
    def held(self) -> bool:
        """Whether all written facts hold, as far as the run asked; see `Outcome.held`."""
        return all(outcome.held for outcome in self.outcomes)

    @property
    def layers(self) -> list[int]:
        """The layers that the edit changes."""
        return sorted({place.layer for changes in self.rounds for place in changes})

    def owner(self, round_: int) -> Owner:
        """The name under which the changes of round `round_`, counted from 0, are kept in the model's weights."""
        return self.id, round_

    def is_applied(self, lm: LanguageModel) -> bool:
        """Whether `lm` carries this edit."""
        return self.id in lm.weights.edits

    def check_model(self, lm: LanguageModel) -> None:
        """Check that the edit was made for `lm`.

        Raises:
            EditError: it was made for another model.
            UnsupportedModelError: a PEFT adapter was added to `lm` since it was loaded.
        """
        check_model(lm, KINDS)
        if lm.fingerprint != self.fingerprint:
            raise EditError(
                f"this edit was made for {self.model} with fingerprint {self.fingerprint}, "
                f"but {lm.name} has {lm.fingerprint}; load the model it was made for"
                f"{differing_dtypes(self.record.dtype, lm.dtype)}"
            )

    def apply(self, lm: LanguageModel) -> None:
        """Write the edit into `lm`. Warns if the edit was made on top of other edits that `lm` lacks.

        Raises:
            EditError: the edit was made for another model, or is applied already.
        """
        self.check_model(lm)
        if self.is_applied(lm):
            raise EditError(f"edit {self.id} is applied already; revert it first")
        if missing := [other for other in self.record.on_top_of if other not in lm.weights.edits]:
            warnings.warn(
                f"edit {self.id} was made in a model that carried edit {' and '.join(missing)}, which {lm.name} does "
                "not; its values and scores are those of both together, so apply that one first",
                stacklevel=2,
            )
        lm.weights.made_on[self.id] = self.record.on_top_of
        for index, changes in enumerate(self.rounds):
            for place, change in changes.items():
                lm.weights.add(self.owner(index), place, change)

    def revert(self, lm: LanguageModel) -> None:
        """Undo the edit. If the model carries no other edit, its weights are then the unedited ones, bit for bit.

        Warns if `lm` carries an edit that was made on top of this one.

        Raises:
            EditError: `lm` does not carry the edit.
        """
        if not self.is_applied(lm):
            raise EditError(f"edit {self.id} is not applied to {lm.name}, so there is nothing to revert")
        lm.weights.remove({self.owner(index) for index in range(len(self.rounds))})
        if above := [other for other in lm.weights.edits if self.id in lm.weights.made_on.get(other, ())]:
            warnings.warn(
                f"edit {self.id} is reverted, but {lm.name} still carries edit {' and '.join(above)}, made on top "
                "of it; its values and scores are those of both together, so revert that one too",
                stacklevel=2,
            )

    def without(self, lm: LanguageModel, fact: Fact | str, **arguments: Any) -> "Edit":
        """A new edit of all other facts. `lm` carries it afterwards, instead of this one.

        All facts are solved together again, from the unedited weights. Values that this edit found are reused.

        Args:
            lm: the model. It may carry this edit, but no other.
            fact: one of `facts`, or its text (prompt with subject).
            arguments: `method` and `settings` (by default those of this edit), and `covariance` (by default one of
                self-generated text, as for `lightedit.edit`).

        Raises:
            FactError: the fact is not in the edit; names the closest ones.
            EditError: `lm` carries other edits, or the covariance is not that of this edit.
            ArgumentError: the method writes one fact at a time.
        """
        index = place_of(self.facts, fact)
        return Edit.solver(self, lm, [*self.facts[:index], *self.facts[index + 1 :]], **arguments)

    def replace(self, lm: LanguageModel, old: Fact | str, new: Fact | str, **arguments: Any) -> "Edit":
        """A new edit with `new`, a fact or another target of the same fact, in place of `old`; see `without`."""
        index = place_of(self.facts, old)
        facts = [*self.facts[:index], with_target(self.facts[index], new), *self.facts[index + 1 :]]
        return Edit.solver(self, lm, facts, **arguments)

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write `edit.safetensors` and `edit.json` into a new folder, atomically.

        The folder also holds the evaluations, as before.json and after.json, and the tables, as retention.csv and
        health.csv.

        Args:
            folder: path of the new folder.
            overwrite: replace the whole folder of an earlier edit.

        Raises:
            EditError: the folder exists and `overwrite` is not given.
        """
        folder = Path(folder)
        check_free(folder, overwrite)
        saved = [save_changes(changes, f"round.{index}.layer.") for index, changes in enumerate(self.rounds)]
        named = {name: tensor for of_round, _ in saved for name, tensor in of_round.items()}
        tensors = save_tensors(named | {f"value.{index}": value for index, value in self.values.items()})
        content = {
            "format": _FORMAT,
            "id": self.id,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "layers": self.layers,
            "facts_in_round": self.facts_in_round,
            "rounds": [settings for _, settings in saved],
            "record": self.record.to_dict(),
            "tensors_sha256": hashlib.sha256(tensors).hexdigest(),
            "facts": [fact.to_dict() for fact in self.facts],
            "outcomes": [outcome.to_dict() for outcome in self.outcomes],
            "damage": [row.to_dict() for row in self.damage],
        }
        with whole_folder(folder) as unfinished:
            (unfinished / "edit.safetensors").write_bytes(tensors)
            (unfinished / "edit.json").write_text(
                json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
            )
            for name, rows in self.tables.items():
                if rows:
                    write_table(unfinished / f"{name}.csv", rows)
            for name in _EVALUATIONS:
                if (evaluation := getattr(self, name)) is not None:
                    evaluation.save(unfinished / f"{name}.json")
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> "Edit":
        """Read what `save` wrote, and check that it is complete and unaltered.

        Raises:
            FileNotFoundError: there is no edit in `folder`.
            EditError: a file is truncated or has another format, or the tensors were altered.
        """
        folder = Path(folder)
        path = folder / "edit.json"
        if not path.is_file():
            raise MissingFileError(f"no edit in {folder}: {path} does not exist")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != _FORMAT:
                raise EditError(f"{path} has format {content['format']}, this version reads {_FORMAT}")
            data = (folder / "edit.safetensors").read_bytes()
            if hashlib.sha256(data).hexdigest() != content["tensors_sha256"]:
                raise EditError(f"{folder / 'edit.safetensors'} is truncated or was altered: its checksum is wrong")
            # copies, because views into the file's buffer may be unaligned, which changes sums' order
            tensors = {name: tensor.clone() for name, tensor in load_tensors(data).items()}
            rounds = [
                load_changes(tensors, settings, f"round.{index}.layer.")
                for index, settings in enumerate(content["rounds"])
            ]
            if len(content["facts_in_round"]) != len(rounds):
                raise ValueError(f"{len(rounds)} rounds, but facts of {len(content['facts_in_round'])}")
            files = {name: folder / f"{name}.json" for name in _EVALUATIONS}
            scores = {name: Evaluation.load(file) if file.is_file() else None for name, file in files.items()}
            facts = [Fact.from_dict(fact) for fact in content["facts"]]
            outcomes = content.get("outcomes", [])
            return cls(
                model=content["model"],
                fingerprint=content["fingerprint"],
                record=RunRecord.from_dict(content["record"]),
                facts=facts,
                rounds=rounds,
                facts_in_round=content["facts_in_round"],
                before=scores["before"],
                after=scores["after"],
                id=content["id"],
                outcomes=tuple(map(Outcome.from_dict, facts, outcomes)),
                damage=tuple(Damage(**row) for row in content.get("damage", [])),
                values={int(name[6:]): tensor for name, tensor in tensors.items() if name.startswith("value.")},
            )
        except EditError:
            raise
        except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:
            raise EditError(f"{folder} does not hold a whole edit: {type(error).__name__}: {error}") from error


def check_free(folder: Path, overwrite: bool = False) -> None:
    """Raise EditError if `folder` exists, unless it holds an edit and `overwrite` is given."""
    if folder.exists() and not (overwrite and (folder / "edit.json").is_file()):
        way_out = "choose another folder" + (", or allow overwriting" if (folder / "edit.json").is_file() else "")
        raise EditError(f"{folder} exists already; {way_out}")
