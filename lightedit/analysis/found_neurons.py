"""What the search for knowledge neurons finds: of each fact, and counted over facts."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple, Self

from lightedit.analysis.neuron_settings import NeuronSettings
from lightedit.analysis.saved import read_record, write_record
from lightedit.data.prompts import ContextSettings
from lightedit.data.words import counted
from lightedit.methods.neurons.search import NeuronSearch
from lightedit.runs.tables import write_table

_FORMAT = 1
NEURONS_FILE, NEURONS_TABLE = "neurons.json", "neurons.csv"
_COLUMNS = ("fact", "answer", "probability", "prompts", "layer", "neuron", "attribution", "share")
_FACTS, _NEURONS = 20, 6  # most facts and most neurons of a fact that are printed


class Neuron(NamedTuple):
    """A neuron of a fact.

    Attributes:
        layer: its layer.
        neuron: its index in the input of the MLP's second matrix.
        attribution: how much of the answer's probability it accounts for, averaged over prompts.
        share: the share of prompts in which it is coarse.
    """

    layer: int
    neuron: int
    attribution: float
    share: float


@dataclass(frozen=True)
class FactNeurons:
    """The neurons of one fact.

    Attributes:
        fact: its prompt with the subject.
        answer: the text whose probability is attributed.
        probability: the joint probability of its tokens after the prompt.
        prompts: number of prompts at which neurons were sought.
        share: p, by which the refined neurons were chosen.
        neurons: the refined neurons, the one with the largest attribution first.
        by_layer: for each layer that was searched, the sum of all attributions.
    """

    fact: str
    answer: str
    probability: float
    prompts: int
    share: float
    neurons: tuple[Neuron, ...]
    by_layer: tuple[float, ...]

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows of neurons.csv: one a neuron, or one without a neuron if there is none."""
        shared = {name: getattr(self, name) for name in ("fact", "answer", "probability", "prompts")}
        yield from ({**shared, **neuron._asdict()} for neuron in self.neurons)
        if not self.neurons:
            yield {**shared, **dict.fromkeys(_COLUMNS[4:])}

    def __str__(self) -> str:
        shown = [f"{each.layer}.{each.neuron} {each.attribution:.3g}" for each in self.neurons[:_NEURONS]]
        more = f" and {len(self.neurons) - _NEURONS} more" if len(self.neurons) > _NEURONS else ""
        return f"{self.fact} ->{self.answer}: {', '.join(shown) or 'no neuron'}{more}"

    def to_dict(self) -> dict[str, Any]:
        """All fields by name, ready for JSON."""
        return asdict(self) | {"neurons": [list(neuron) for neuron in self.neurons]}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        """Build it from what `to_dict` returns, also after a file."""
        neurons = tuple(Neuron(int(i), int(j), float(a), float(s)) for i, j, a, s in record["neurons"])
        return cls(**{**record, "neurons": neurons, "by_layer": tuple(map(float, record["by_layer"]))})


@dataclass(frozen=True)
class Neurons:
    """The knowledge neurons of facts in one model.

    Attributes:
        model: the model's name.
        layers: the layers that were searched.
        settings: the settings.
        facts: the neurons of each fact.
        left_out: texts of the facts that the model does not know, which were not searched.
    """

    model: str
    layers: tuple[int, ...]
    settings: NeuronSettings
    facts: tuple[FactNeurons, ...]
    left_out: tuple[str, ...] = ()

    @property
    def by_layer(self) -> list[int]:
        """How many neurons the facts have in each searched layer; a neuron of two facts counts twice."""
        counts = Counter(neuron.layer for fact in self.facts for neuron in fact.neurons)
        return [counts[layer] for layer in self.layers]

    @property
    def shared(self) -> int:
        """Number of neurons of at least two facts."""
        counts = Counter((neuron.layer, neuron.neuron) for fact in self.facts for neuron in fact.neurons)
        return sum(count > 1 for count in counts.values())

    def __str__(self) -> str:
        """A line of averages, and a line for each of the first 20 facts."""
        without = sum(not fact.neurons for fact in self.facts)
        mean = fmean(len(fact.neurons) for fact in self.facts)
        left = f", {len(self.left_out)} that the model does not know left out" if self.left_out else ""
        title = (
            f"{counted(len(self.facts))} in {self.model}{left}: {mean:.3g} neurons a fact, {self.shared} of several "
            f"facts, {counted(without)} without any"
        )
        lines = [f"  {fact}" for fact in self.facts[:_FACTS]]
        if len(self.facts) > _FACTS:
            lines.append(f"  ... and {len(self.facts) - _FACTS} more; {NEURONS_TABLE} has all")
        return "\n".join([title, *lines])

    def save(self, folder: str | Path) -> Path:
        """Write neurons.json, which `load` reads, and neurons.csv, one row for each neuron of each fact.

        Returns:
            The folder.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_table(folder / NEURONS_TABLE, [row for fact in self.facts for row in fact.rows()])
        write_record(folder / NEURONS_FILE, _FORMAT, asdict(self) | {"facts": [fact.to_dict() for fact in self.facts]})
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            MissingFileError: the folder holds no neurons.json.
            ArgumentError: the file is damaged or of another version.
        """
        with read_record(Path(folder) / NEURONS_FILE, _FORMAT, "neurons", "search again") as record:
            facts = tuple(FactNeurons.from_dict(fact) for fact in record["facts"])
            settings = _settings_of(record["settings"])
            lists = {name: tuple(record[name]) for name in ("layers", "left_out")}
            return cls(**{**record, **lists, "settings": settings, "facts": facts})


def _settings_of(record: Mapping[str, Any]) -> NeuronSettings:
    contexts = dict(record["search"]["contexts"])
    prefixes: Sequence[Sequence[Any]] = contexts.pop("prefixes")
    context_settings = ContextSettings(prefixes=tuple((w, n, t) for w, n, t in prefixes), **contexts)
    search = NeuronSearch(**{**record["search"], "contexts": context_settings})
    return NeuronSettings(**{**record, "search": search})
