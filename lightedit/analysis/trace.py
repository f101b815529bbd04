"""What causal tracing finds: of each fact, and averaged over facts."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from lightedit.analysis.averages import ANY, CLASSES, Mean, mean_of, profiles
from lightedit.analysis.prompts import TokenClass
from lightedit.analysis.saved import read_record, write_record
from lightedit.analysis.settings import TraceSettings
from lightedit.data.words import counted
from lightedit.runs.tables import write_table

_FORMAT = 1
FILE, TABLE, AVERAGES = "trace.json", "trace.csv", "averages.csv"
_SITES = ("last subject", "last")  # the classes of the early and the late site, in whose averages most facts count


@dataclass(frozen=True)
class FactTrace:
    """One fact, traced.

    Attributes:
        fact: its prompt with the subject.
        answer: the text whose probability is explained.
        tokens: the text of each token of the prompt.
        classes: the class of each token.
        subject: positions of the subject's first token and behind its last one.
        p_clean: P, the probability of the answer.
        p_corrupted: P*, that with a corrupted subject, averaged over samples.
        p_restored: kind -> position of the restored token -> by layer, the probability of the answer with a corrupted
            subject and that token restored, averaged over samples. Kinds are those of the settings, "mlp severed" and
            "attention severed".
    """

    fact: str
    answer: str
    tokens: tuple[str, ...]
    classes: tuple[TokenClass, ...]
    subject: tuple[int, int]
    p_clean: float
    p_corrupted: float
    p_restored: Mapping[str, Mapping[int, Sequence[float]]]

    @property
    def total_effect(self) -> float:
        """TE = P - P*."""
        return self.p_clean - self.p_corrupted

    def effects(self, kind: str, position: int) -> list[float]:
        """The indirect effects IE = p_restored - P* of a token, by layer."""
        return [p - self.p_corrupted for p in self.p_restored[kind][position]]

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows of trace.csv."""
        for kind, tokens in self.p_restored.items():
            for position, by_layer in tokens.items():
                for layer, p in enumerate(by_layer):
                    yield {
                        "fact": self.fact,
                        "kind": kind,
                        "layer": layer,
                        "position": position,
                        "token": self.tokens[position],
                        "token_class": self.classes[position],
                        "p_clean": self.p_clean,
                        "p_corrupted": self.p_corrupted,
                        "p_restored": p,
                        "indirect_effect": p - self.p_corrupted,
                    }

    def to_dict(self) -> dict[str, Any]:
        """All fields by name, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        """Build it from what `to_dict` returns, also after a file."""
        restored = {
            kind: {int(position): list(map(float, by_layer)) for position, by_layer in tokens.items()}
            for kind, tokens in record["p_restored"].items()
        }
        lists = {name: tuple(record[name]) for name in ("tokens", "classes", "subject")}
        return cls(**{**record, **lists, "p_restored": restored})


@dataclass(frozen=True)
class Trace:
    """Facts, traced in one model.

    Attributes:
        model: the model's name.
        n_layers: its number of layers.
        noise_level: ν.
        settings: the settings.
        facts: the traced facts.
        left_out: texts of the facts that the model does not know, which were not traced.
    """

    model: str
    n_layers: int
    noise_level: float
    settings: TraceSettings
    facts: tuple[FactTrace, ...]
    left_out: tuple[str, ...] = ()

    @property
    def total_effect(self) -> Mean:
        """ATE: the mean of P - P* over facts, with its 95 % interval."""
        return mean_of([fact.total_effect for fact in self.facts])

    @property
    def p_clean(self) -> Mean:
        """The mean of P over facts, with its 95 % interval."""
        return mean_of([fact.p_clean for fact in self.facts])

    @property
    def p_corrupted(self) -> Mean:
        """The mean of P* over facts, with its 95 % interval."""
        return mean_of([fact.p_corrupted for fact in self.facts])

    @property
    def kinds(self) -> list[str]:
        """What was restored: the kinds of the settings, then the severed ones."""
        return list(self.facts[0].p_restored)

    def averages(self, kind: str) -> dict[str, list[Mean]]:
        """AIE: by class of token, the mean indirect effect of each layer over facts, with its 95 % interval.

        A fact counts once in each class of which it has tokens, with the mean over these. "any" is, for each layer, the
        token from the subject on with the largest effect.
        """
        found: dict[str, list[list[float]]] = {}
        for fact in self.facts:
            effects = {position: fact.effects(kind, position) for position in fact.p_restored[kind]}
            for name, own in profiles(fact.classes, range(*fact.subject), effects, self.settings.published).items():
                found.setdefault(name, []).extend(own)
        order = [name for name in (*CLASSES, ANY) if name in found]
        return {name: [mean_of(column) for column in zip(*found[name], strict=True)] for name in order}

    def __str__(self) -> str:
        """The average total effect, and for each kind the largest average indirect effects of two classes of tokens."""
        left = f", {len(self.left_out)} that the model does not know left out" if self.left_out else ""
        lines = [
            f"{counted(len(self.facts))} traced{left}; P {self.p_clean.value:.3f}, P* {self.p_corrupted.value:.3f}, "
            f"average total effect {self.total_effect}"
        ]
        for kind in self.kinds:
            by_class = self.averages(kind)
            shown = []
            for name in (name for name in _SITES if name in by_class):
                largest = max(by_class[name])
                shown.append(f"{name} token {largest} at layer {by_class[name].index(largest)}")
            lines.append(f"{kind}: largest average indirect effect of the {', '.join(shown)}")
        return "\n".join(lines)

    def average_rows(self) -> Iterator[dict[str, Any]]:
        """The rows of averages.csv."""
        for kind in self.kinds:
            for name, by_layer in self.averages(kind).items():
                for layer, mean in enumerate(by_layer):
                    yield {
                        "kind": kind,
                        "token_class": name,
                        "layer": layer,
                        "indirect_effect": mean.value,
                        "half_width": mean.half_width if mean.facts > 1 else None,
                        "facts": mean.facts,
                    }

    def save(self, folder: str | Path) -> Path:
        """Write trace.json, which `load` reads, and two tables.

        trace.csv has one row for each fact, kind, token and layer, averages.csv one for each kind, class of tokens and
        layer.

        Returns:
            The folder.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_table(folder / TABLE, [row for fact in self.facts for row in fact.rows()])
        write_table(folder / AVERAGES, list(self.average_rows()))
        write_record(folder / FILE, _FORMAT, asdict(self) | {"facts": [fact.to_dict() for fact in self.facts]})
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            MissingFileError: the folder holds no trace.json.
            ArgumentError: the file is damaged or of another version.
        """
        with read_record(Path(folder) / FILE, _FORMAT, "trace", "trace again") as record:
            facts = tuple(FactTrace.from_dict(fact) for fact in record["facts"])
            settings = TraceSettings(**record["settings"])
            return cls(**{**record, "settings": settings, "facts": facts, "left_out": tuple(record["left_out"])})
