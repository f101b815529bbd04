"""Settings of the search for knowledge neurons, shared by Python and the command line."""

from dataclasses import dataclass, field

from lightedit.errors import ArgumentError
from lightedit.lm import LanguageModel
from lightedit.methods.neurons.search import NeuronSearch


@dataclass(frozen=True)
class NeuronSettings:
    """Settings of the search for knowledge neurons.

    Attributes:
        layers: the layers that are searched, ascending; all by default.
        search: how the neurons of a fact are found.
        only_known: leave out facts whose answer's first token is not what the model says.
        published: neurons are what enters the MLP's activation, and points include 0 and 1, as in the code of ROME's KN
            row; the prompt is the only one, and all tokens of an answer are attributed after it.
        tokens_per_pass: most tokens of one forward pass; by default 1024 on a CPU, and on a GPU what its free memory
            allows.
        progress_bar: show progress and the time left on standard error.

    Raises:
        ArgumentError: a value is out of range.
    """

    layers: tuple[int, ...] | None = None
    search: NeuronSearch = field(default_factory=NeuronSearch)
    only_known: bool = True
    published: bool = False
    tokens_per_pass: int | None = None
    progress_bar: bool = True

    def __post_init__(self) -> None:
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))
        if self.tokens_per_pass is not None and self.tokens_per_pass < 1:
            raise ArgumentError(f"tokens_per_pass must be at least 1, got {self.tokens_per_pass}")

    def searched(self, lm: LanguageModel) -> tuple[int, ...]:
        """The layers that are searched in a model.

        Raises:
            ArgumentError: it does not have them, or they are not distinct and ascending.
        """
        layers = tuple(range(lm.n_layers)) if self.layers is None else self.layers
        lm.check_layers(layers)
        return layers
