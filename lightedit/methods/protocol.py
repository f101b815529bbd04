"""What a run asks of any way to edit: a `Method` holds its settings, an `Editor` carries it out in one run."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightedit.data.facts import Fact
from lightedit.digests import digest
from lightedit.errors import ArgumentError, ArgumentTypeError
from lightedit.lm import LanguageModel, Place
from lightedit.lm.arguments import check_model
from lightedit.lm.changes import Change
from lightedit.lm.rowwise import RowwiseEdits
from lightedit.lm.weights import Owner
from lightedit.progress import Report
from lightedit.runs.provenance import computing, fingerprint_inputs
from lightedit.statistics.covariance import Covariance, CovarianceError

OnCollision = Literal["error", "merge", "keep"]


@dataclass(frozen=True)
class EditorSettings:
    """Settings of a run that its editor reads.

    Attributes:
        on_collision: what to do about facts of one round whose keys nearly coincide, such as two facts about one
            subject: "error" refuses them before work starts, "merge" finds one value that serves the texts of all,
            "keep" writes each by itself all the same.
        collision_similarity: cosine, in the metric of what is preserved, from which two keys collide. Different
            subjects reach about 0.7, two prompts about one subject mostly more than 0.85 (SmolLM2, layer 4).
        max_tokens: tokens of one forward and backward pass at most; bounds memory.

    Raises:
        ArgumentError: a value is out of range.
    """

    on_collision: OnCollision = "error"
    collision_similarity: float = 0.85
    max_tokens: int = 1024

    def __post_init__(self) -> None:
        if self.on_collision not in ("error", "merge", "keep"):
            raise ArgumentError(f"on_collision is 'error', 'merge' or 'keep', got {self.on_collision!r}")
        if self.max_tokens < 1:
            raise ArgumentError(f"max_tokens must be at least 1, got {self.max_tokens}")


@dataclass(frozen=True)
class Method(ABC):
    """The frozen settings of one way to edit.

    Attributes:
        editor_type: the editor that carries it out.
        facts_per_solve: the most facts that one round takes; None for any number.
    """

    editor_type: ClassVar[type["Editor"]]
    facts_per_solve: ClassVar[int | None] = None

    @property
    @abstractmethod
    def places(self) -> tuple[Place, ...]:
        """What it changes, in the order in which it does."""

    @property
    def covariance_places(self) -> tuple[Place, ...]:
        """The places whose inputs' second moments it needs; none by default."""
        return ()

    def editor(
        self, lm: LanguageModel, *, covariance: Covariance | None = None, settings: EditorSettings | None = None
    ) -> "Editor":
        """An editor for one run on `lm`; see `Editor`."""
        return self.editor_type(lm, self, covariance, settings or EditorSettings())

    def check(self, lm: LanguageModel) -> None:
        """Raise ArgumentError unless `lm` has the layers that are changed."""
        lm.check_layers(sorted({place.layer for place in self.places}))

    def search_inputs(self) -> dict[str, Any] | None:
        """What its search results depend on beside model and facts, as JSON holds it; None without a search."""
        return None

    def to_dict(self) -> dict[str, Any]:
        """Name and settings, for the record of a run."""
        return {"name": type(self).__name__, **asdict(self)}


class Editor(ABC):
    """A method at work on one model, for one run.

    A run calls `prepare` once, and then for each round `start` and `step` for each of its chunks of facts until the
    editor is `done`, and `write`. An editor without a search has nothing to start.

    Args:
        lm: the model to edit.
        method: the method's settings.
        covariance: second moments at the method's `covariance_places`.
        settings: of the run.

    Raises:
        CovarianceError: the method needs a covariance and there is none.

    Attributes:
        facts: the facts of the run, once prepared.
        rounds: the indices of each round's facts, once prepared; None if each is edited alone and none stays.
        results: fact's index -> what its search found; until its round is written.
    """

    def __init__(
        self, lm: LanguageModel, method: Method, covariance: Covariance | None, settings: EditorSettings
    ) -> None:
        if method.covariance_places and covariance is None:
            raise CovarianceError(
                f"{type(method).__name__} preserves what the model does on text, so it needs a covariance; pass "
                "covariance=estimate_covariance(lm, method)"
            )
        self.lm, self.method, self.covariance, self.settings = lm, method, covariance, settings
        self.facts: list[Fact] = []
        self.rounds: list[list[int]] | None = None
        self.results: dict[int, Tensor] = {}
        self.prepared = False

    def prepare(
        self, facts: Sequence[Fact], rounds: Sequence[Sequence[int]] | None, like: "Editor | None" = None
    ) -> None:
        """Refuse whatever can be refused, and make once what the whole run needs.

        Args:
            facts: the facts of the run.
            rounds: the indices of the facts that each round writes together; None if each is edited alone.
            like: an editor that was prepared for these facts, or for more of them, on the same unedited model. What
                both need alike is taken from it.

        Raises:
            ArgumentError: the model lacks a layer, or a round holds more facts than the method takes.
        """
        self.method.check(self.lm)
        limit = self.method.facts_per_solve
        largest = max(map(len, rounds or ()), default=0)
        if limit is not None and largest > limit:
            raise ArgumentError(
                f"{type(self.method).__name__} writes {limit} fact per round, but facts_per_round is {largest}; give "
                f"facts_per_round={limit}"
            )
        self.facts = list(facts)
        self.rounds = None if rounds is None else [list(round_) for round_ in rounds]
        self.prepared = True

    def make_optimizer(self) -> torch.optim.Optimizer | None:
        """The optimizer of the run, which `start` and `step` are given; None for editors without a search."""
        return None

    def give(self, results: Mapping[int, Tensor]) -> None:
        """Take results found before, for the facts of the first round: fact's index -> result.

        They must be of the same settings, and of the model as it is when the run starts.
        """
        if results:
            raise ArgumentError(f"{type(self.method).__name__} has no search whose results could be given")

    def start(self, indices: Sequence[int], optimizer: torch.optim.Optimizer | None) -> None:
        """Begin the search for the facts of these indices."""
        return None

    @property
    def done(self) -> bool:
        """Whether no search is at work."""
        return True

    def step(self, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
        """One step of the search; returns figures for loggers."""
        raise NotImplementedError(f"{type(self).__name__} has no search")

    @property
    def facts_found(self) -> float:
        """Facts of the present round that are found, those at work counted by the share of their steps."""
        return float(len(self.results))

    @abstractmethod
    def write(self, indices: Sequence[int], owner: Owner) -> dict[Place, Change]:
        """Write the facts of one round into the model on behalf of `owner`, and return what was written.

        If it raises, the run takes back what was written so far.
        """

    def separate(self, indices: Sequence[int]) -> RowwiseEdits | None:
        """What each of the facts gets if it is edited alone, one edit a fact; nothing is written.

        None if the editor cannot tell without writing: each fact is then written, scored and taken back in turn.
        """
        return None

    def state(self) -> dict[str, Tensor]:
        """What the round written last adds to what later rounds depend on, beside the weights."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take the `state` of an earlier process's round; called once a round, in their order."""
        return None

    def record(self) -> dict[str, Any]:
        """What went into the run beside method and facts, by name, as JSON holds it."""
        return {} if self.covariance is None else {"covariance": asdict(self.covariance.provenance)}

    def run_inputs(self) -> dict[str, Any]:
        """All that determines what the run writes, but for how facts are dealt into rounds and chunks."""
        return {
            "method": self.method.to_dict(),
            **self.record(),
            **computing(self.lm),
            **fingerprint_inputs(self.lm, self.facts, self.method.places),
            **self.checksums(),
        }

    def checksums(self) -> dict[str, Any]:
        """What else determines the run to the bit, such as checksums of tensors."""
        if self.covariance is None:
            return {}
        moments = {place.key: self.covariance[place] for place in self.method.covariance_places}
        return {"covariance tensors": digest("", moments)}

    def release(self) -> None:
        """Free what only the run needed; a trainer keeps itself and its module in memory longer than one thinks."""
        return None


def search(
    editor: Editor, indices: Sequence[int], optimizer: torch.optim.Optimizer | None, report: Report | None = None
) -> None:
    """Run the search for the facts of these indices to its end, reporting facts found of all of them."""
    before = editor.facts_found
    editor.start(indices, optimizer)
    while not editor.done:
        editor.step(optimizer)
        if report is not None:
            report(editor.facts_found - before, len(indices))


def check_model_and_method(lm: object, method: object) -> None:
    """Raise ArgumentTypeError if the first arguments are of another kind, such as swapped ones."""
    check_model(lm)
    if not isinstance(method, Method):
        raise ArgumentTypeError(f"method: expected a Method, got a {type(method).__name__}")
