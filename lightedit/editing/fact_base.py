"""A fact base: facts that change over time, and the edit that writes all of them."""

import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors

from lightedit.data.facts import Fact, FactError
from lightedit.data.lookup import place_of, with_more, with_target
from lightedit.data.modules import Chunk
from lightedit.digests import digest
from lightedit.editing.again import Known, check_together, instead_of, own_text, searched_with, solve
from lightedit.editing.artefact import Edit, EditError
from lightedit.editing.module import EditModule, compact
from lightedit.editing.settings import RunSettings
from lightedit.editing.tuning import tuned_method
from lightedit.files import whole_file
from lightedit.lm import LanguageModel
from lightedit.lm.arguments import check_model
from lightedit.lm.kinds import KINDS
from lightedit.methods.protocol import Method
from lightedit.methods.recorded import method_of
from lightedit.runs.folder import locked
from lightedit.runs.provenance import computing
from lightedit.statistics.covariance import Covariance

_FORMAT = 1
_BASE, _VALUES, _EDIT = "base.json", "values", "edit"


class FactBase:
    """Facts in a folder, with the results of their searches and the last edit that wrote them.

    Changing a fact needs a search for that fact alone. All facts are then solved together again, from the unedited
    weights, so the others stay as they are.

        base = FactBase("facts/acme", MEMIT(layers=[4, 5, 6, 7, 8], lambda_=1000.0))
        base.add(facts)
        print(base.apply(lm))
        base.replace("The capital of France is", "Rome")
        print(base.apply(lm))  # searches one value, and replaces the earlier edit in lm

    The folder holds `base.json` (facts, method, ids of the edits), `values/` (a file a fact) and `edit/`, which
    `Edit.load` reads.

    Args:
        folder: the folder; a new one is created when facts are added.
        method: the method; by default the one of the last `apply`, or MEMIT as `tune` finds it for the model.
        covariance: as for `lightedit.edit`.
        settings: settings of the runs, without `facts_per_round`.

    Raises:
        EditError: the folder holds something else, or a damaged base.
    """

    def __init__(
        self,
        folder: str | Path,
        method: Method | None = None,
        *,
        covariance: Covariance | None = None,
        settings: RunSettings | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.covariance, self.settings = covariance, settings or RunSettings()
        self._method = method
        self._state = _State.read(self.folder)

    def __iter__(self) -> Iterator[Fact]:
        return iter(self._state.facts)

    def __len__(self) -> int:
        return len(self._state.facts)

    @property
    def edit(self) -> Edit | None:
        """The edit of the last `apply`; None if there is none. It may lack later changes of the base."""
        folder = self.folder / _EDIT
        return Edit.load(folder) if (folder / "edit.json").is_file() else None

    def add(self, facts: Sequence[Fact]) -> None:
        """Add facts.

        Of a fact that is there already with this target, with a warning, only those other fields are taken over that
        the new record has, such as paraphrases.

        Raises:
            FactError: a fact with the same text, served alike, and another target is there.
        """
        found = list(self._state.facts)
        known = {(fact.text, fact.serving): index for index, fact in enumerate(found)}
        for fact in [facts] if isinstance(facts, Fact) else facts:
            index = known.setdefault((fact.text, fact.serving), len(found))
            if index == len(found):
                found.append(fact)
            elif (there := found[index]).target_new == fact.target_new:
                found[index] = with_more(there, fact)
                done = "left out" if found[index] == there else "its other fields are taken over"
                warnings.warn(f"{fact.text!r} -> {fact.target_new!r} is there already; {done}", stacklevel=2)
            else:
                raise FactError(
                    f"{fact.text!r} is there already with the target {there.target_new!r}, not {fact.target_new!r}; "
                    "replace it instead"
                )
        self._change(found)

    def replace(self, old: Fact | str, new: Fact | str) -> None:
        """Replace a fact.

        Args:
            old: the fact, or its text (prompt with subject).
            new: another fact, or a new target for the same one.

        Raises:
            FactError: `old` is not there (the closest facts are named), or `new` is there already.
        """
        facts = self._state.facts
        index = place_of(facts, old)
        changed = with_target(facts[index], new)
        others = [*facts[:index], *facts[index + 1 :]]
        if (changed.text, changed.serving) in {(fact.text, fact.serving) for fact in others}:
            raise FactError(f"{changed.text!r} is there already; replace or remove that one")
        self._change([*facts[:index], changed, *facts[index + 1 :]])

    def remove(self, fact: Fact | str) -> None:
        """Remove a fact, given itself or its text (prompt with subject).

        Raises:
            FactError: it is not there; the closest facts are named.
        """
        facts = self._state.facts
        index = place_of(facts, fact)
        self._change([*facts[:index], *facts[index + 1 :]])

    def _change(self, facts: list[Fact]) -> None:
        self._state.facts = facts
        self._state.write(self.folder)

    def apply(self, lm: LanguageModel) -> Edit:
        """Write all facts into `lm`, in place of an earlier edit of this base, and save the edit in `edit/`.

        Values are searched only where a fact, the method's search or the model has changed. They are stored as they
        are found, so an interrupted call goes on when it is called again.

        Returns:
            The edit with its outcomes. `lm` carries it.

        Raises:
            FactError: there are no facts.
            ArgumentError: the method writes one fact at a time.
            EditError: `lm` carries an edit that is not of this base. It is unchanged then.
            The errors of `lightedit.edit`; `lm` then carries the earlier edit, if it did before.
        """
        self.check()
        check_model(lm, KINDS)
        method = self.method or tuned_method(lm, progress_bar=self.settings.progress_bar)
        last = self.edit
        own = {*self._state.edits, *([last.id] if last else [])}
        with locked(self.folder), instead_of(lm, own, last, f"fact base {self.folder}"):
            store = _Values(self.folder / _VALUES, lm, method, self._state.facts)
            known = store.read()
            edit = solve(
                lm,
                self._state.facts,
                method,
                known,
                covariance=self.covariance,
                settings=self.settings,
                callbacks=[_Keep(store)],
            )
            self._state.edits.append(edit.id)
            self._state.method = json.loads(json.dumps(method.to_dict()))
            self._state.write(self.folder)
            edit.save(self.folder / _EDIT, overwrite=True)
            store.tidy()
        return edit

    def check(self) -> None:
        """Check what needs no model; raises as `apply` does."""
        if not self._state.facts:
            raise FactError(f"{self.folder} holds no facts; add some")
        if (method := self.method) is not None:
            check_together(self._state.facts, method, self.settings)

    @property
    def method(self) -> Method | None:
        """The method given, or that of the last `apply`; None before the first."""
        if self._method is None and self._state.method is not None:
            return method_of(self._state.method)
        return self._method


@dataclass
class _State:
    """What `base.json` holds: the facts, the settings of the last method, and ids of all edits of the base."""

    facts: list[Fact]
    method: dict[str, Any] | None
    edits: list[str]

    @classmethod
    def read(cls, folder: Path) -> "_State":
        path = folder / _BASE
        if not path.is_file():
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise EditError(f"{folder} exists and is no fact base; choose another folder")
            return cls([], None, [])
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != _FORMAT:
                raise EditError(f"{path} has format {content['format']}, this version reads {_FORMAT}")
            return cls([Fact.from_dict(fact) for fact in content["facts"]], content["method"], content["edits"])
        except EditError:
            raise
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise EditError(f"{path} is damaged: {type(error).__name__}: {error}") from error

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        content = {"format": _FORMAT, **asdict(self), "facts": [fact.to_dict() for fact in self.facts]}
        with whole_file(folder / _BASE) as unfinished:
            unfinished.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


class _Values:
    """The stored results of searches, a file each. Its name is a digest of all that determines the result."""

    def __init__(self, folder: Path, lm: LanguageModel, method: Method, facts: Sequence[Fact]) -> None:
        self.folder = folder
        inputs = method.search_inputs()
        shared = {"model": lm.fingerprint, "dtype": computing(lm)["dtype"], "search": inputs}
        names = [digest(json.dumps([shared, own_text(fact)], sort_keys=True))[:24] for fact in facts]
        self._files = [folder / f"{name}.safetensors" for name in names]

    def read(self) -> dict[int, Known]:
        """Fact's index -> its result, for results that are stored; a damaged file counts as missing."""
        found = {}
        for index, file in enumerate(self._files):
            if file.is_file():
                try:
                    with safe_open(file, "pt") as opened:
                        written = opened.metadata() or {}
                        loss = float(written["loss"]) if written["loss"] else None
                        found[index] = Known(
                            opened.get_tensor("value").clone(), loss, tuple(json.loads(written["together"]))
                        )
                except (SafetensorError, KeyError, ValueError):
                    file.unlink()
        return found

    def write(self, index: int, one: Known) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        loss = "" if one.loss is None else repr(one.loss)
        written = {"loss": loss, "together": json.dumps(one.together)}
        content = save_tensors({"value": compact(one.value).contiguous()}, written)
        with whole_file(self._files[index]) as unfinished:
            unfinished.write_bytes(content)

    def tidy(self) -> None:
        """Delete results that no present fact has."""
        for file in set(self.folder.glob("*.safetensors")) - set(self._files):
            file.unlink()


class _Keep(Callback):
    """Stores the results of a chunk when its search is over."""

    def __init__(self, store: "_Values") -> None:
        self._store, self._stored = store, set[int]()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Chunk, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, EditModule)
        if not batch.finished:
            return
        editor = pl_module.editor
        for index in editor.results.keys() - self._stored:
            self._stored.add(index)
            self._store.write(
                index, Known(editor.results[index], editor.losses.get(index), searched_with(editor, index))
            )
