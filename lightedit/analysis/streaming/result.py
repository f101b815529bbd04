"""What a stream of edits gives: scores by number of edits, and what became of each fact."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Self

from lightedit.analysis.saved import read_record, write_record
from lightedit.analysis.streaming.settings import StreamSettings
from lightedit.data.words import counted
from lightedit.editing.artefact import Edit
from lightedit.runs.tables import write_table

_FORMAT = 1
STREAM_FILE, STREAM_TABLE = "stream.json", "stream.csv"
SCORES = ("TRR", "ERR", "ES", "generalization")


@dataclass(frozen=True)
class StreamedFact:
    """What became of one fact of a stream.

    Attributes:
        fact: its prompt with the subject.
        target: the answer that was to be written.
        said: the model's greedy continuation before.
        edited: whether it was edited; otherwise the model stated it already.
        score: its score right after the edit; None without one.
        held: whether the model stated it right after the edit; None without one.
    """

    fact: str
    target: str
    said: str
    edited: bool
    score: float | None = None
    held: bool | None = None


@dataclass(frozen=True)
class StreamStep:
    """Scores after a number of edits. A score of no facts is None.

    Attributes:
        edits: edits made so far.
        seen: facts that came so far, the skipped ones included.
        TRR: mean score of the upstream facts.
        ERR: mean score of all facts edited so far.
        ES: mean of the scores that these facts had right after their edits.
        generalization: mean score of their paraphrases.
    """

    edits: int
    seen: int
    TRR: float | None = None
    ERR: float | None = None
    ES: float | None = None
    generalization: float | None = None

    @property
    def skipped(self) -> int:
        """Facts that the model stated before they came."""
        return self.seen - self.edits

    @property
    def mean(self) -> float | None:
        """Mean of TRR and ERR; None if one is missing."""
        return None if self.TRR is None or self.ERR is None else (self.TRR + self.ERR) / 2

    def row(self) -> dict[str, Any]:
        """The row of stream.csv."""
        own = {name: getattr(self, name) for name in SCORES}
        return {"edits": self.edits, "seen": self.seen, "skipped": self.skipped, **own, "mean": self.mean}


@dataclass(frozen=True)
class Stream:
    """A stream of edits by one method.

    Attributes:
        model: the model's name.
        method: the method's name and settings.
        settings: the settings.
        upstream: number of upstream facts.
        steps: the scores, before the first edit, after every `score_every` edits, and at the end.
        facts: the facts that came, in order.
        stopped: why the stream ended early, such as values that became NaN; None if it did not.
        edit: what the stream wrote, if it is at hand; `save` does not write it.
    """

    model: str
    method: dict[str, Any]
    settings: StreamSettings
    upstream: int
    steps: tuple[StreamStep, ...]
    facts: tuple[StreamedFact, ...]
    stopped: str | None = None
    edit: Edit | None = field(default=None, compare=False, repr=False)

    @property
    def last(self) -> StreamStep:
        """The scores at the end."""
        return self.steps[-1]

    @property
    def held(self) -> bool:
        """Whether each fact was stated right after its edit."""
        return all(fact.held for fact in self.facts if fact.edited)

    def __str__(self) -> str:
        """The scores before and after, and the counts."""
        last, first = self.last, self.steps[0]
        name = self.method.get("name", "a method")
        skipped = f", {last.skipped} skipped, which the model stated already" if last.skipped else ""
        came = f"{counted(last.seen)} came, {last.edits} edited{skipped}"
        lines = [f"{name} in {self.model}: {came}; score: {self.settings.score}"]
        if last.TRR is not None and first.TRR is not None:
            lines.append(f"  TRR  {_shown(last.TRR)}, before edits {_shown(first.TRR)} ({counted(self.upstream)})")
            if first.TRR == 0:
                lines.append("       the model knows none of the upstream facts, so TRR says nothing; give others")
        for label, value in (("ERR", last.ERR), ("mean", self._mean), ("ES", last.ES)):
            if value is not None:
                lines.append(f"  {label:<4} {_shown(value)}")
        if last.generalization is not None:
            lines.append(f"  generalization {_shown(last.generalization)}, of paraphrases")
        missed = [fact for fact in self.facts if fact.edited and not fact.held]
        if missed:
            shown = ", ".join(f"{fact.fact!r} -> {fact.target!r}" for fact in missed[:3])
            lines.append(f"  not held right after the edit: {counted(len(missed))}, such as {shown}")
        if self.stopped is not None:
            lines.append(f"  ended early: {self.stopped}")
        return "\n".join(lines)

    @property
    def _mean(self) -> float | None:
        return None if self.settings.score == "perplexity" else self.last.mean

    def save(self, folder: str | Path) -> Path:
        """Write stream.json, which `load` reads, and stream.csv, one row for each of `steps`.

        Returns:
            The folder.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_table(folder / STREAM_TABLE, [step.row() for step in self.steps])
        names = ("model", "method", "upstream", "stopped")
        record = {name: getattr(self, name) for name in names} | {
            "settings": asdict(self.settings),
            "steps": [asdict(step) for step in self.steps],
            "facts": [asdict(fact) for fact in self.facts],
        }
        write_record(folder / STREAM_FILE, _FORMAT, record)
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            MissingFileError: the folder holds no stream.json.
            ArgumentError: the file is damaged or of another version.
        """
        with read_record(Path(folder) / STREAM_FILE, _FORMAT, "stream", "run the stream again") as record:
            return cls(**{**record, "settings": StreamSettings(**record["settings"]), **of_records(record)})


def of_records(record: Mapping[str, Any]) -> dict[str, Any]:
    """The steps and facts of a record, as `Stream` takes them."""
    return {
        "steps": tuple(StreamStep(**step) for step in record["steps"]),
        "facts": tuple(StreamedFact(**fact) for fact in record["facts"]),
    }


def fmean_or_none(values: list[float]) -> float | None:
    """The mean; None of nothing."""
    return fmean(values) if values else None


def _shown(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}"
