"""An edit: what a run wrote into a model. It can be applied, reverted, saved and loaded."""

import hashlib
import json
import uuid
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from lightedit.data.facts import Fact
from lightedit.evaluation.result import Evaluation
from lightedit.files import whole_folder
from lightedit.lm import LanguageModel, Place
from lightedit.lm.weights import LowRankUpdate
from lightedit.runs.tables import write_table

_FORMAT = 1


class EditError(ValueError):
    """An edit cannot be saved, loaded, applied or reverted; the message says why and what to do."""


@dataclass
class Edit:
    """The outcome of a run: low-rank updates of a few matrices, with all that is needed to trust and undo them.

    Attributes:
        model: name of the edited model.
        fingerprint: fingerprint of its unedited weights.
        provenance: method, settings, contexts, covariance, versions, seconds; "on_top_of", the ids of edits that the
            model carried, if it did.
        facts: the facts written, round after round, in the order they were given.
        rounds: for each round written, matrix -> update; a layer's number means its MLP's matrix.
        facts_in_round: number of facts written in each round.
        scores: named evaluations, such as "before" and "after".
        id: a unique name.
        tables: rows of figures that a run gathered over its rounds: "retention" (see `EditModule`), "health" (see
            `Health`). They are saved for `lightedit report`, not loaded.
    """

    model: str
    fingerprint: str
    provenance: dict[str, Any] = field(default_factory=dict)
    facts: list[Fact] = field(default_factory=list)
    rounds: list[dict[Place, LowRankUpdate]] = field(default_factory=list)
    facts_in_round: list[int] = field(default_factory=list)
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict, compare=False)

    @property
    def layers(self) -> list[int]:
        """The layers that the edit changes."""
        return sorted({matrix.layer for updates in self.rounds for matrix in updates})

    def owner(self, round_: int) -> str:
        """The name under which a round's updates are kept in the model's weights."""
        return f"{self.id}:{round_}"

    def is_applied(self, lm: LanguageModel) -> bool:
        """Whether `lm` carries this edit."""
        return any(owner.startswith(f"{self.id}:") for owner in lm.weights.owners)

    def check_model(self, lm: LanguageModel) -> None:
        """Raise EditError unless the edit was made for `lm`."""
        if lm.fingerprint != self.fingerprint:
            raise EditError(
                f"this edit was made for {self.model} with fingerprint {self.fingerprint}, "
                f"but {lm.name} has {lm.fingerprint}; load the model it was made for"
            )

    def apply(self, lm: LanguageModel) -> None:
        """Write the edit into `lm`. A warning says so if it was made on top of others that `lm` lacks.

        Raises:
            EditError: another model, or the edit is applied already.
        """
        self.check_model(lm)
        if self.is_applied(lm):
            raise EditError(f"edit {self.id} is applied already; revert it first")
        present = {owner.partition(":")[0] for owner in lm.weights.owners}
        if missing := [other for other in self.provenance.get("on_top_of", ()) if other not in present]:
            warnings.warn(
                f"edit {self.id} was made in a model that carried edit {' and '.join(missing)}, which {lm.name} does "
                "not; its values and scores are those of both together, so apply that one first",
                stacklevel=2,
            )
        for index, updates in enumerate(self.rounds):
            for matrix, update in updates.items():
                lm.weights.add(self.owner(index), matrix, update)

    def revert(self, lm: LanguageModel) -> None:
        """Undo the edit; without other edits the weights are the unedited ones bit for bit.

        Raises:
            EditError: `lm` does not carry the edit.
        """
        if not self.is_applied(lm):
            raise EditError(f"edit {self.id} is not applied to {lm.name}, so there is nothing to revert")
        lm.weights.remove({self.owner(index) for index in range(len(self.rounds))})

    def save(
        self,
        folder: str | Path,
        overwrite: bool = False,
        before: Evaluation | None = None,
        after: Evaluation | None = None,
    ) -> Path:
        """Write `edit.safetensors` and `edit.json` into `folder`, which appears whole or not at all.

        `lightedit report` also reads what is kept beside them: the tables as retention.csv and health.csv, and the
        evaluations.

        Args:
            folder: a new one.
            overwrite: replace the whole folder of an earlier edit.
            before: scores of the unedited model, kept as before.json.
            after: scores of the edited model, kept as after.json.

        Raises:
            EditError: the folder exists and `overwrite` is not given.
        """
        folder = Path(folder)
        check_free(folder, overwrite)
        tensors = save_tensors(
            {
                f"round.{index}.layer.{matrix.key}.{name}": getattr(update, name).cpu().contiguous()
                for index, updates in enumerate(self.rounds)
                for matrix, update in updates.items()
                for name in ("left", "right")
            }
        )
        record = {
            "format": _FORMAT,
            "id": self.id,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "layers": self.layers,
            "facts_in_round": self.facts_in_round,
            "scores": self.scores,
            "provenance": self.provenance,
            "tensors_sha256": hashlib.sha256(tensors).hexdigest(),
            "facts": [fact.to_dict() for fact in self.facts],
        }
        with whole_folder(folder) as unfinished:
            (unfinished / "edit.safetensors").write_bytes(tensors)
            (unfinished / "edit.json").write_text(
                json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
            )
            for name, rows in self.tables.items():
                if rows:
                    write_table(unfinished / f"{name}.csv", rows)
            for name, evaluation in (("before", before), ("after", after)):
                if evaluation is not None:
                    evaluation.save(unfinished / f"{name}.json")
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> "Edit":
        """Read what `save` wrote, and check that it is whole.

        Raises:
            FileNotFoundError: there is no edit in `folder`.
            EditError: a file is truncated or of another format, or the tensors were altered.
        """
        folder = Path(folder)
        path = folder / "edit.json"
        if not path.is_file():
            raise FileNotFoundError(f"no edit in {folder}: {path} does not exist")
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["format"] != _FORMAT:
                raise EditError(f"{path} has format {record['format']}, this version reads {_FORMAT}")
            data = (folder / "edit.safetensors").read_bytes()
            if hashlib.sha256(data).hexdigest() != record["tensors_sha256"]:
                raise EditError(f"{folder / 'edit.safetensors'} is truncated or was altered: its checksum is wrong")
            rounds: list[dict[Place, LowRankUpdate]] = [{} for _ in record["facts_in_round"]]
            tensors = load_tensors(data)
            for name in sorted(tensors):
                if name.endswith(".left"):
                    _, index, _, key, _ = name.split(".")
                    right = tensors[name.removesuffix("left") + "right"]
                    # copies, because views into the file's buffer may be unaligned, which changes sums' order
                    update = LowRankUpdate(tensors[name].clone(), right.clone())
                    rounds[int(index)][Place.from_key(key)] = update
            return cls(
                model=record["model"],
                fingerprint=record["fingerprint"],
                provenance=record["provenance"],
                facts=[Fact.from_dict(fact) for fact in record["facts"]],
                rounds=[dict(sorted(updates.items())) for updates in rounds],
                facts_in_round=record["facts_in_round"],
                scores=record["scores"],
                id=record["id"],
            )
        except EditError:
            raise
        except (ValueError, LookupError, TypeError, OSError) as error:
            raise EditError(f"{folder} does not hold a whole edit: {type(error).__name__}: {error}") from error


def check_free(folder: Path, overwrite: bool = False) -> None:
    """Raise EditError if saving an edit to `folder` would replace something."""
    if folder.exists() and not (overwrite and (folder / "edit.json").is_file()):
        way_out = "choose another folder" + (", or allow overwriting" if (folder / "edit.json").is_file() else "")
        raise EditError(f"{folder} exists already; {way_out}")
