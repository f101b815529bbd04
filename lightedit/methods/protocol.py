"""The protocol of editing methods: a `Method` holds the settings, an `Editor` carries the method out in one run."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from lightedit.data.facts import Fact
from lightedit.data.prompts import FactPrompts
from lightedit.digests import digest
from lightedit.errors import ArgumentError, ArgumentTypeError
from lightedit.lm import LanguageModel, Place
from lightedit.lm.arguments import check_model
from lightedit.lm.changes import Change
from lightedit.lm.kinds import KINDS, KindName
from lightedit.lm.rowwise import RowwiseEdits
from lightedit.lm.weights import Owner
from lightedit.progress import Report
from lightedit.runs.provenance import computing, fingerprint_inputs
from lightedit.statistics.covariance import Covariance, CovarianceError

OnCollision = Literal["joint", "keep", "merge", "error"]


@dataclass(frozen=True)
class EditorSettings:
    """The settings of a run that the editor reads.

    Attributes:
        on_collision: what to do about facts of one round whose keys nearly coincide, such as two facts about one
            subject: "joint" searches their values knowing what one solve makes of all of them, "keep" searches each
            value by itself, as published, "merge" finds one value for the texts of all, "error" refuses them before
            work starts.
        collision_similarity: smallest cosine, in the metric A⁻¹, at which two keys collide. Different subjects reach
            about 0.7, two prompts about one subject mostly more than 0.85 (SmolLM2, layer 4).
        max_tokens: most tokens of one forward and backward pass; bounds memory.

    Raises:
        ArgumentError: a value is out of range.
    """

    on_collision: OnCollision = "joint"
    collision_similarity: float = 0.85
    max_tokens: int = 1024

    def __post_init__(self) -> None:
        if self.on_collision not in ("joint", "keep", "merge", "error"):
            raise ArgumentError(f"on_collision is 'joint', 'keep', 'merge' or 'error', got {self.on_collision!r}")
        if self.max_tokens < 1:
            raise ArgumentError(f"max_tokens must be at least 1, got {self.max_tokens}")


@dataclass(frozen=True)
class Method(ABC):
    """The frozen settings of one way to edit.

    Attributes:
        editor_type: the class of its editors.
        facts_per_solve: most facts of one round; None for any number.
        kinds: the kinds of models that it can edit; see `LanguageModel.kind`.
    """

    kinds: ClassVar[tuple[KindName, ...]] = ("causal",)
    editor_type: ClassVar[type["Editor"]]
    facts_per_solve: ClassVar[int | None] = None

    @property
    @abstractmethod
    def places(self) -> tuple[Place, ...]:
        """The places that the method changes, in the order in which it writes them."""

    @property
    def covariance_places(self) -> tuple[Place, ...]:
        """The places at whose inputs the method needs second moments; none by default."""
        return ()

    def editor(
        self, lm: LanguageModel, *, covariance: Covariance | None = None, settings: EditorSettings | None = None
    ) -> "Editor":
        """An editor for one run on `lm`; see `Editor`."""
        return self.editor_type(lm, self, covariance, settings or EditorSettings())

    def check(self, lm: LanguageModel) -> None:
        """Raise UnsupportedModelError for a kind of model that it cannot edit, ArgumentError for missing layers."""
        check_model(lm, self.kinds, type(self).__name__)
        lm.check_layers(sorted({place.layer for place in self.places}))

    def check_facts(
        self, lm: LanguageModel, facts: Sequence[Fact], rounds: Sequence[Sequence[int]], settings: EditorSettings
    ) -> None:
        """Raise FactError for facts that a run cannot write, as far as that shows before statistics are estimated.

        Args:
            lm: the model.
            facts: the facts of the run.
            rounds: the indices of the facts that each round writes together.
            settings: settings of the run.
        """
        return None

    def at(self, layers: Sequence[int]) -> Self:
        """The same method, at other layers.

        Raises:
            ArgumentError: it is bound to its places.
        """
        raise ArgumentError(f"{type(self).__name__} cannot be moved to other layers")

    def erasing(self) -> Self:
        """The same method, made to lower the probability of its facts' targets.

        Raises:
            ArgumentError: it can only raise it.
        """
        raise ArgumentError(f"{type(self).__name__} cannot erase facts")

    @property
    def erases(self) -> bool:
        """Whether edits lower the probability of targets; see `erasing`."""
        return False

    def search_inputs(self) -> dict[str, Any] | None:
        """What determines the search results besides model and facts, as JSON values; None without a search."""
        return None

    def to_dict(self) -> dict[str, Any]:
        """Name and settings, for the record of a run."""
        return {"name": type(self).__name__, **asdict(self)}


class Editor(ABC):
    """A method at work on one model, for one run.

    A run calls `prepare` once. For each chunk of a round it calls `start`, then `step` until the editor is `done`.
    After the last chunk of the round it calls `write`. An editor without a search is always `done`.

    Args:
        lm: the model to edit.
        method: the method's settings.
        covariance: second moments at the method's `covariance_places`.
        settings: settings of the run.

    Raises:
        CovarianceError: the method needs a covariance and none was given.

    Attributes:
        facts: the facts of the run; set by `prepare`.
        rounds: the indices of each round's facts; set by `prepare`. None if each fact is edited alone and taken back.
        results: fact's index -> the result of its search; removed when the fact's round is written.
        losses: fact's index -> the last loss of its search. Facts without a search of their own have none.
        notes: fact's index -> what its outcome is to say of the search or the write, such as that nothing was written.
        watch: called while a round is written, whenever `facts_found` grows.
        served: changes the token rows of a fact before the editor reads them, such as to put other tokens in place of
            the subject's; set before `prepare`. None leaves them as they are.
        can_serve: whether editors of this class heed `served`.
        on_adaptors: whether editors of this class work on a model with an adaptor that decides by prompts.
    """

    can_serve: ClassVar[bool] = False
    on_adaptors: ClassVar[bool] = False

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
        self.losses: dict[int, float] = {}
        self.notes: dict[int, str] = {}
        self.watch: Callable[[], None] = lambda: None
        self.served: Callable[[FactPrompts], FactPrompts] | None = None
        self.prepared = False

    def prepare(
        self, facts: Sequence[Fact], rounds: Sequence[Sequence[int]] | None, like: "Editor | None" = None
    ) -> None:
        """Check the run's inputs, and compute once what all rounds share.

        Args:
            facts: the facts of the run.
            rounds: the indices of the facts that each round writes together; None if each is edited alone.
            like: an editor that was prepared on the same unedited model, for these facts or for a list that starts
                with them. Work that both editors need is taken from it.

        Raises:
            ArgumentError: the model lacks a layer, or a round holds more facts than the method takes; or it carries an
                adaptor on top of which the editor cannot work.
        """
        self.method.check(self.lm)
        if not self.on_adaptors and (carried := self.lm.weights.reads_prompts) is not None:
            raise ArgumentError(
                f"{self.lm.name} carries an adaptor at {carried}, on top of which {type(self.method).__name__} cannot "
                "edit; revert that edit first"
            )
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
        """The run's optimizer, which is passed to `start` and `step`; None for editors without a search."""
        return None

    def give(self, results: Mapping[int, Tensor], with_others: bool = False) -> None:
        """Take search results that were found before, for facts of the first round.

        They must come from the same settings, and from the weights with which the run starts.

        Args:
            results: fact's index -> result. A result of facts that are searched together is used if all are given.
            with_others: whether these were found together with the same other facts; else they are not used.
        """
        if results:
            raise ArgumentError(f"{type(self.method).__name__} has no search whose results could be given")

    def to_give(self, indices: Sequence[int]) -> dict[int, Tensor]:
        """The present results for these facts, as `give` takes them; without those that depend on other facts."""
        alone = (index for index in indices if index in self.results and not self.searched_with(index))
        return {index: self.results[index] for index in alone}

    def searched_with(self, index: int) -> list[int]:
        """Indices of the other facts on which the search result of a fact depends; none by default."""
        return []

    def start(self, indices: Sequence[int], optimizer: torch.optim.Optimizer | None) -> None:
        """Begin the search for the facts with these indices."""
        return None

    @property
    def done(self) -> bool:
        """Whether no search is in progress."""
        return True

    def step(self, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
        """Take one step of the search; return figures for loggers.

        An editor without a search is always done, so that nobody calls it; it would do nothing.
        """
        return {}

    @property
    def facts_found(self) -> float:
        """Facts of the present round whose search is over; a fact in progress counts as the share of its steps."""
        return float(len(self.results))

    @abstractmethod
    def write(self, indices: Sequence[int], owner: Owner) -> dict[Place, Change]:
        """Write the facts of one round into the model on behalf of `owner`, and return what was written.

        If it raises, the run takes back what it had written of the round.
        """

    def separate(self, indices: Sequence[int]) -> RowwiseEdits | None:
        """The edits of facts that are each edited alone, one edit a fact, without writing any.

        None if the editor cannot compute them without writing. Each fact is then written, scored and taken back in
        turn.
        """
        return None

    @property
    def most_separate(self) -> int | None:
        """Most facts that `separate` may be asked for at once, so that they fit into memory; None for any number."""
        return None

    def state(self) -> dict[str, Tensor]:
        """Tensors of the last written round on which later rounds depend, other than the weights."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take the `state` of a round that an earlier process wrote; called once a round, in order."""
        return None

    def record(self) -> dict[str, Any]:
        """Inputs of the run besides method and facts, by name, as JSON values."""
        return {} if self.covariance is None else {"covariance": asdict(self.covariance.provenance)}

    def run_inputs(self) -> dict[str, Any]:
        """Everything that determines what the run writes, except the division of facts into rounds and chunks."""
        return {
            "method": self.method.to_dict(),
            **self.record(),
            **computing(self.lm),
            **fingerprint_inputs(self.lm, self.facts, self.method.places),
            **self.checksums(),
        }

    def checksums(self) -> dict[str, Any]:
        """Checksums of tensors that determine what the run writes, by name."""
        if self.covariance is None:
            return {}
        moments = {place.key: self.covariance[place] for place in self.method.covariance_places}
        return {"covariance tensors": digest("", moments)}

    def release(self) -> None:
        """Free the memory that only the run needed. A trainer and its module outlive the fit, in a reference cycle."""
        return None


def search(
    editor: Editor, indices: Sequence[int], optimizer: torch.optim.Optimizer | None, report: Report | None = None
) -> None:
    """Run the search for the facts with these indices to its end; `report` receives (facts found, facts in all)."""
    before = editor.facts_found
    editor.start(indices, optimizer)
    while not editor.done:
        editor.step(optimizer)
        if report is not None:
            report(editor.facts_found - before, len(indices))


def check_model_and_method(lm: object, method: object) -> None:
    """Check that `lm` is a language model, and `method` a method that can edit models of its kind.

    Raises:
        ArgumentTypeError: one is neither, such as if they are swapped.
        UnsupportedModelError: the method needs a model of another kind.
    """
    check_model(lm, KINDS)
    if not isinstance(method, Method):
        raise ArgumentTypeError(f"method: expected a Method, got a {type(method).__name__}")
    check_model(lm, method.kinds, type(method).__name__)
