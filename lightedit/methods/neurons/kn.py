"""KN (Dai et al., 2022, arXiv 2104.08696): find the neurons that express a fact, and change what they add."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, Self, get_args

import torch
from torch import Tensor

from lightedit.data.facts import Fact, FactError
from lightedit.data.prompts import Contexts
from lightedit.errors import ArgumentError, NumericalError
from lightedit.lm import LanguageModel, Place
from lightedit.lm.changes import Change
from lightedit.lm.rowwise import RowwiseEdits
from lightedit.lm.weights import Owner
from lightedit.methods.neurons.asking import (
    EditedFact,
    Embeddings,
    most_probable,
    object_embedding,
    texts_of,
)
from lightedit.methods.neurons.columns import Columns, written_apart, written_together
from lightedit.methods.neurons.common import without_common
from lightedit.methods.neurons.search import NeuronSearch, find_neurons
from lightedit.methods.protocol import Editor, EditorSettings, Method
from lightedit.statistics.covariance import Covariance

Mode = Literal["update", "erase", "suppress", "enhance"]
EraseWith = Literal["zero", "unknown"]

_PUBLISHED = (2.0, 1.0)  # λ1 and λ2 of ROME's KN row
_NAMED = 3  # most facts that a warning names


class KNEditor(Editor):
    """The editor of `KN`. A step of its search attributes one fact; a round is written from the weights it began with.

    Results of the search are the layer, the index and the sign of the activation of each of a fact's neurons, [n, 3].

    Attributes:
        asked: each fact's prompts and objects; set by `prepare`.
        contexts: the contexts of the prompts; set by `prepare`.
    """

    method: "KN"

    def __init__(
        self, lm: LanguageModel, method: Method, covariance: Covariance | None, settings: EditorSettings
    ) -> None:
        super().__init__(lm, method, covariance, settings)
        self.asked: list[EditedFact] = []
        self.contexts = Contexts()
        self._old: dict[int, tuple[int, ...]] = {}  # the old object of each fact of the round
        self._queue: list[int] = []
        self._chunk: set[int] = set()
        self._of_run: dict[int, Tensor] = {}  # the neurons of facts that are each edited alone, common ones included

    def prepare(
        self, facts: Sequence[Fact], rounds: Sequence[Sequence[int]] | None, like: Editor | None = None
    ) -> None:
        """See `Editor.prepare`.

        Raises:
            FactError: facts cannot be tokenised or served as they ask for, or are longer than the model's positions.
            ArgumentError: `erase_with` unknown, and the tokenizer has no unknown token.
            UnsupportedModelError: the model's embeddings are not as wide as what its MLPs add.
        """
        super().prepare(facts, rounds, like)
        method = self.method
        if method.mode == "erase" and method.erase_with == "unknown" and self.lm.tokenizer.unk_token_id is None:
            raise ArgumentError(f"erase_with: the tokenizer of {self.lm.name} has no unknown token; give zero")
        if method.mode == "update" or method.erase_with == "unknown":
            object_embedding(self.lm, [0], method.table)
        if method.search.prompts == "contexts" and not method.published:
            self.contexts = method.search.contexts.sample(self.lm)
        self.asked = []
        for number, fact in enumerate(facts):
            try:
                self.asked.append(self._ask(fact))
            except FactError as error:
                raise FactError(f"fact {number}: {error}") from error

    def _ask(self, fact: Fact) -> EditedFact:
        published = self.method.published
        answer = fact.target_true if self.method.mode == "update" else fact.target_new
        texts = texts_of(fact, "prompt" if published else self.method.search.prompts, self.contexts)
        return EditedFact.of(self.lm, fact, answer, texts, published)

    # The search

    def start(self, indices: Sequence[int], optimizer: torch.optim.Optimizer | None) -> None:
        self.results |= {index: self._of_run[index] for index in indices if index in self._of_run}
        wanted = self._with_relatives(indices) if self._needs_run else indices
        self._queue = [index for index in wanted if index not in self.results and index not in self._of_run]
        self._chunk = set(indices)

    @property
    def _needs_run(self) -> bool:
        """Whether the neurons of a fact depend on facts of other chunks: each is edited alone, without common ones."""
        return self.rounds is None and self.method.search.common is not None

    def _with_relatives(self, indices: Sequence[int]) -> list[int]:
        """These facts, then the others of the run whose relation is one of theirs."""
        relations = {self.facts[index].relation for index in indices} - {None}
        others = (index for index, fact in enumerate(self.facts) if fact.relation in relations)
        return list(dict.fromkeys([*indices, *others]))

    @property
    def done(self) -> bool:
        return not self._queue

    def step(self, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
        """Find the neurons of one fact.

        Returns:
            "neurons", their number.
        """
        index = self._queue[0]
        asked, method = self.asked[index], self.method
        prompts, old = asked.prompts, asked.old
        if not asked.known or not old:
            said = most_probable(self.lm, prompts.prompts[0])
            old = old or (said,)
            prompts = prompts if asked.known else prompts.saying(said)
        size = self.settings.max_tokens
        found = find_neurons(
            self.lm, prompts, method.searched, method.search, published=method.published, max_tokens=size
        )
        sign = torch.where(found.activations < 0, -1, 1)[:, None]
        neurons, self._old[index] = torch.cat([found.neurons, sign], dim=1), old
        if self._needs_run:
            self._of_run[index] = neurons
        if index in self._chunk:
            self.results[index] = neurons
        del self._queue[0]
        return {"neurons": torch.tensor(float(len(found.neurons)))}

    def to_give(self, indices: Sequence[int]) -> dict[int, Tensor]:
        return {}  # neurons are not kept with an edit

    # Writing

    @torch.no_grad()
    def write(self, indices: Sequence[int], owner: Owner) -> dict[Place, Change]:
        found = self._found(indices)
        changes: dict[Place, Change] = {}
        for place in self.method.places:
            if parts := list(self._columns(place, found)):
                # what several facts erase is erased once
                update = written_together(parts, self.lm.weight(place).shape[1], self.method.mode == "update")
                changes[place] = update.compact()
        for place, change in changes.items():
            self.lm.weights.add(owner, place, change)
        return changes

    @torch.no_grad()
    def separate(self, indices: Sequence[int]) -> RowwiseEdits | None:
        found = self._found(indices)
        updates = {}
        for place in self.method.places:
            if parts := list(self._columns(place, found)):
                updates[place] = written_apart(parts, list(found), self.lm.weight(place).shape[1])
        return RowwiseEdits(updates, torch.arange(len(indices)))

    def _found(self, indices: Sequence[int]) -> dict[int, Tensor]:
        """Fact's index -> its neurons, which are removed from `results`. Warns of facts without any."""
        found = {index: self.results.pop(index) for index in indices}
        if (largest := self.method.search.common) is not None:
            compared = {i: self._of_run[i] for i in self._with_relatives(indices)} if self._needs_run else found
            relations = [self.facts[index].relation for index in compared]
            kept = without_common(list(compared.values()), relations, largest)
            found = {index: own for index, own in zip(compared, kept, strict=True) if index in found}
        without = [index for index, neurons in found.items() if not len(neurons)]
        self.notes |= dict.fromkeys(without, "no neuron was found, so nothing was written")
        if without:
            named = ", ".join(repr(self.facts[index].text) for index in without[:_NAMED])
            more = f" and {len(without) - _NAMED} more" if len(without) > _NAMED else ""
            warnings.warn(
                f"nothing is written of {named}{more}: no neuron was found that enough of the prompts share; set "
                f"search.adjust, or a smaller search.share ({self.method.search.share:g} now) or search.threshold "
                f"({self.method.search.threshold:g} now)",
                stacklevel=2,
            )
        return found

    def _columns(self, place: Place, found: Mapping[int, Tensor]) -> Iterator[Columns]:
        """What each fact changes at a place, of the facts that have neurons there."""
        weight = self.lm.weight(place)
        wide = torch.promote_types(weight.dtype, torch.float32)
        for index, neurons in found.items():
            own, sign = neurons[neurons[:, 0] == place.layer, 1:].T
            if len(own):
                change = self._change(index, weight[:, own.to(weight.device)].to(wide), sign.to(weight.device))
                if not change.isfinite().all():
                    raise NumericalError(f"the update of {place} holds NaN or infinity; load the model in float32")
                yield Columns(index, own, change)

    def _change(self, index: int, values: Tensor, sign: Tensor) -> Tensor:
        """The change of the values w_j [d_out, n] of a fact's neurons, whose activations have the signs [n]."""
        method = self.method
        if method.mode == "enhance":
            return values.clone()
        if method.mode == "erase" and method.erase_with == "unknown":
            unknown = self.lm.tokenizer.unk_token_id
            assert isinstance(unknown, int)
            return object_embedding(self.lm, [unknown], method.table).to(values)[:, None] - values
        if method.mode != "update":
            return -values
        old, new = (
            object_embedding(self.lm, tokens, method.table).to(values)[:, None]
            for tokens in (self._old[index], self.asked[index].new)
        )
        subtract, add = method.weights
        if method.published:
            return (add * new - subtract * old).expand_as(values)
        if not method.scaled:
            return sign * (add * new - subtract * old)
        return sign * values.norm(dim=0) * (add * new / new.norm() - subtract * old / old.norm())

    def record(self) -> dict[str, Any]:
        return {"contexts": asdict(self.contexts), **super().record()}


@dataclass(frozen=True)
class KN(Method):
    """Find the neurons that express a fact by integrated gradients, and change the values w_j that they add.

    A neuron (l, j) is an input of the MLP's second matrix of layer l, and w_j is column j of that matrix.

    - update: λ1 times the embedding t of the old object is subtracted from w_j, and λ2 times that of the new object
      added; the other way round where the neuron's activation is negative, as it may be behind a gate. Neurons are
      those of the old object: the true target, or without one what the model says.
    - erase: w_j is set to 0, or to the embedding of the unknown token. Neurons are those of the new target, here and in
      the other two modes.
    - suppress: w_j is set to 0, as if the neuron were never active.
    - enhance: w_j is doubled, as if the neuron were twice as active.

    An object's embedding is the sum of its tokens' ones.

    Attributes:
        layers: the layers that are searched, ascending; None for all. Attributions are compared over these layers.
        mode: what becomes of the values: update, erase, suppress or enhance.
        search: how neurons are found.
        subtract: λ1.
        add: λ2.
        scaled: t is ||w_j|| times the direction of the object's embedding, as Dai et al. write; else that embedding
            itself.
        embeddings: those of the LM head (output), or those of the input. They are the same where the head is tied.
        erase_with: zero, or unknown for the embedding of the unknown token.
        published: the KN row of ROME's table, as its code makes it: neurons before the activation, points that include
            0 and 1, one prompt, answers without a leading space whose tokens are all attributed after the prompt;
            twice the input embedding of what the model says is subtracted, and that of each new token added.

    Raises:
        ArgumentError: a value is out of range, or `published` excludes it.
    """

    layers: tuple[int, ...] | None = None
    mode: Mode = "update"
    search: NeuronSearch = field(default_factory=NeuronSearch)
    subtract: float = 1.0
    add: float = 8.0
    scaled: bool = True
    embeddings: Embeddings = "output"
    erase_with: EraseWith = "zero"
    published: bool = False

    editor_type: ClassVar[type[Editor]] = KNEditor

    def __post_init__(self) -> None:
        given: Any = self.layers
        if given is not None:
            layers = (given,) if isinstance(given, int) else tuple(int(layer) for layer in given)
            if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0:
                raise ArgumentError(
                    f"layers must be ascending, distinct and not negative, or None for all, got {given!r}"
                )
            object.__setattr__(self, "layers", layers)
        for name, known in (("mode", Mode), ("embeddings", Embeddings), ("erase_with", EraseWith)):
            if getattr(self, name) not in get_args(known):
                raise ArgumentError(f"{name} is one of {', '.join(get_args(known))}, got {getattr(self, name)!r}")
        for name in ("subtract", "add"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ArgumentError(f"{name} must be a number of at least 0, got {getattr(self, name)}")
        if self.published:
            self._check_published()

    def _check_published(self) -> None:
        free = {"layers", "mode", "search", "erase_with", "published"}
        given = [one.name for one in fields(self) if one.name not in free and getattr(self, one.name) != one.default]
        plain = NeuronSearch(points=self.search.points, threshold=self.search.threshold)
        given += [
            f"search.{each.name}"
            for each in fields(plain)
            if getattr(self.search, each.name) != getattr(plain, each.name)
        ]
        if given:
            raise ArgumentError(f"published says itself what they are; leave {', '.join(given)} out")

    @property
    def searched(self) -> tuple[int, ...]:
        """The layers that are searched.

        Raises:
            ArgumentError: `layers` is None, and the model is not known, as it is in an editor's method.
        """
        if self.layers is None:
            raise ArgumentError("layers: KN searches all layers of a model here, so which they are is not known; "
                                "give layers")  # fmt: skip
        return self.layers

    @property
    def places(self) -> tuple[Place, ...]:
        """The second matrices of the MLPs of `layers`; none before an editor knows the model, if `layers` is None."""
        return tuple(Place(layer) for layer in self.layers or ())

    @property
    def weights(self) -> tuple[float, float]:
        """λ1 and λ2."""
        return _PUBLISHED if self.published else (self.subtract, self.add)

    @property
    def table(self) -> Embeddings:
        """Which embeddings stand for an object."""
        return "input" if self.published else self.embeddings

    def editor(
        self, lm: LanguageModel, *, covariance: Covariance | None = None, settings: EditorSettings | None = None
    ) -> Editor:
        """An editor for one run on `lm`, whose method names the layers; see `Method.editor`."""
        method = self if self.layers is not None else self.at(range(lm.n_layers))
        return KNEditor(lm, method, covariance, settings or EditorSettings())

    def check(self, lm: LanguageModel) -> None:
        if self.layers is not None:
            lm.check_layers(self.layers)

    def at(self, layers: Sequence[int]) -> Self:
        return replace(self, layers=tuple(layers))

    def erasing(self) -> Self:
        return replace(self, mode="erase")

    @property
    def erases(self) -> bool:
        return self.mode in ("erase", "suppress")
