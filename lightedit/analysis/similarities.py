"""What the study of hidden states finds: of each prompt, and averaged over prompts."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, Self, get_args

from lightedit.analysis.averages import Mean, mean_of
from lightedit.analysis.hidden_settings import HiddenStateSettings
from lightedit.analysis.saved import read_record, write_record
from lightedit.data.words import counted
from lightedit.runs.tables import write_table

_FORMAT = 1
STATES_FILE, STATES_TABLE = "hidden_states.json", "hidden_states.csv"

Sublayer = Literal["attention", "mlp"]
Measure = Literal["cosine", "jaccard"]
SUBLAYERS: tuple[Sublayer, ...] = get_args(Sublayer)
MEASURES: tuple[Measure, ...] = get_args(Measure)
NAMES: dict[Sublayer, str] = {"attention": "attention", "mlp": "MLP"}


@dataclass(frozen=True)
class Similarities:
    """One prompt: how far what enters attention and MLP agrees with what leaves them, at its last token.

    Attributes:
        prompt: the text.
        cosine: attention or mlp -> by layer, the cosine of both states.
        jaccard: attention or mlp -> by layer, the Jaccard similarity of the sets of their most probable tokens.
    """

    prompt: str
    cosine: Mapping[Sublayer, Sequence[float]]
    jaccard: Mapping[Sublayer, Sequence[float]]

    def to_dict(self) -> dict[str, Any]:
        """All fields by name, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        """Build it from what `to_dict` returns, also after a file."""
        values = {name: {part: list(map(float, record[name][part])) for part in SUBLAYERS} for name in MEASURES}
        return cls(str(record["prompt"]), values["cosine"], values["jaccard"])


@dataclass(frozen=True)
class HiddenStates:
    """What enters against what leaves attention and MLP in one model, layer by layer.

    Attributes:
        model: the model's name.
        n_layers: its number of layers.
        parallel: whether attention and MLP read the same state; in sequential blocks the MLP reads what the attention
            has added to.
        settings: the settings.
        prompts: the similarities of each prompt.
    """

    model: str
    n_layers: int
    parallel: bool
    settings: HiddenStateSettings
    prompts: tuple[Similarities, ...]

    def means(self, measure: Measure, part: Sublayer) -> list[Mean]:
        """By layer, the mean of a measure ("cosine", "jaccard") over prompts, with its 95 % interval."""
        columns = zip(*(getattr(prompt, measure)[part] for prompt in self.prompts), strict=True)
        return [mean_of(column) for column in columns]

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows of hidden_states.csv."""
        for part in SUBLAYERS:
            means = {name: self.means(name, part) for name in MEASURES}
            for layer in range(self.n_layers):
                row: dict[str, Any] = {"layer": layer, "part": part}
                row |= {name: means[name][layer].value for name in MEASURES}
                row |= {f"{name}_half_width": _known(means[name][layer].half_width) for name in MEASURES}
                yield row | {"facts": len(self.prompts)}

    def __str__(self) -> str:
        kind = "parallel" if self.parallel else "sequential"
        shown = []
        for part in SUBLAYERS:
            cosine, common = (fmean(mean.value for mean in self.means(name, part)) for name in MEASURES)
            shown.append(f"{NAMES[part]} cosine {cosine:.3f}, Jaccard {common:.3f}")
        return (
            f"{counted(len(self.prompts), 'prompt')} in {self.model}, {counted(self.n_layers, f'{kind} block')}; what "
            f"enters against what leaves, mean over layers: {'; '.join(shown)}"
        )

    def save(self, folder: str | Path) -> Path:
        """Write hidden_states.json, which `load` reads, and hidden_states.csv, one row for each layer and part.

        Returns:
            The folder.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_table(folder / STATES_TABLE, list(self.rows()))
        write_record(folder / STATES_FILE, _FORMAT, asdict(self))
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            MissingFileError: the folder holds no hidden_states.json.
            ArgumentError: the file is damaged or of another version.
        """
        with read_record(Path(folder) / STATES_FILE, _FORMAT, "hidden-states", "compute it again") as record:
            settings = HiddenStateSettings(**record["settings"])
            prompts = tuple(Similarities.from_dict(prompt) for prompt in record["prompts"])
            return cls(**{**record, "settings": settings, "prompts": prompts})


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
