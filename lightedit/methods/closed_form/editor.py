"""The editor of all locate-then-edit methods: values by gradient descent, then a closed-form update."""

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightedit.data.facts import Fact
from lightedit.data.prompts import Contexts, FactPrompts, check_rows, merge_prompts, tokenize_facts
from lightedit.digests import digest
from lightedit.errors import ArgumentError, NumericalError
from lightedit.lm import LanguageModel, Place
from lightedit.lm.changes import Change
from lightedit.lm.rowwise import RowwiseEdits
from lightedit.lm.weights import Owner
from lightedit.methods.closed_form.collisions import linked_groups, refuse
from lightedit.methods.closed_form.joint import Together
from lightedit.methods.closed_form.keys import keys_at
from lightedit.methods.closed_form.method import ClosedForm
from lightedit.methods.closed_form.passes import FurtherPasses
from lightedit.methods.closed_form.preservation import Preservation, key_similarity
from lightedit.methods.closed_form.values import ValueOptimization
from lightedit.methods.closed_form.writing import (
    check_independence,
    read_keys,
    separate_updates,
    shares_written,
    write_facts,
)
from lightedit.methods.protocol import Editor, EditorSettings, Method
from lightedit.statistics.covariance import Covariance


@dataclass
class _Shared:
    """Data that depend only on the unedited model, the facts and the contexts.

    Attributes:
        facts: the facts.
        contexts: the contexts' texts.
        prompts: each fact's token rows.
        first_keys: first edited matrix -> keys at it, [d_in, facts] float64; computed when they are needed.
    """

    facts: list[Fact]
    contexts: Contexts
    prompts: list[FactPrompts]
    first_keys: dict[Place, Tensor] = field(default_factory=dict)


class ClosedFormEditor(Editor):
    """The editor of a locate-then-edit method. Step 1 finds a value for each fact, step 2 writes a round of facts.

    Attributes:
        preservation: the factored preservation term of each written matrix; set by `prepare`.
        contexts: the contexts of keys and values; set by `prepare`.
        prompts: each fact's token rows, None for a fact that was merged into an earlier one; set by `prepare`.
        round_keys: place -> the keys of the round written last, [d_in, n]; see `written_keys`.
    """

    can_serve = True
    method: ClosedForm
    covariance: Covariance

    def __init__(
        self, lm: LanguageModel, method: Method, covariance: Covariance | None, settings: EditorSettings
    ) -> None:
        super().__init__(lm, method, covariance, settings)
        self.preservation: dict[Place, Preservation] = {}
        self.prompts: list[FactPrompts | None] = []
        self.round_keys: dict[Place, Tensor] = {}
        self._shared: _Shared | None = None
        self._given: dict[int, Tensor] = {}
        self._given_with_others = False
        self._together = Together()
        self._rounds_written = 0
        self._in_first_pass, self._rewritten = 0, 0.0  # facts of the round that is written, and those searched again
        # The optimizer needs a parameter before the first δ exists; `start` puts each chunk's δ in its place
        self._placeholder = nn.Parameter(torch.zeros(1))
        self._search: ValueOptimization | None = None
        self._searched: list[int] = []

    # Before work starts

    def prepare(
        self, facts: Sequence[Fact], rounds: Sequence[Sequence[int]] | None, like: Editor | None = None
    ) -> None:
        """See `Editor.prepare`.

        Raises:
            CovarianceError: the covariance is of another model, lacks a place, or is not positive definite.
            FactError: facts cannot be tokenised, collide, or cannot be written exactly by any update.
            NumericalError: keys hold NaN or infinity.
        """
        super().prepare(facts, rounds, like)
        self._check_given()
        other = like if isinstance(like, ClosedFormEditor) else None
        self.preservation = (other and other.lend_factors(self)) or self.method.factors(self.lm, self.covariance)
        self._shared = None if other is None else other.lend_prompts(self)
        if self._shared is None:
            contexts = self.method.contexts.sample(self.lm)
            prompts = tokenize_facts(self.lm.tokenizer, facts, contexts)
            check_rows(self.lm, prompts)
            if self.served is not None:
                prompts = [self.served(each) for each in prompts]
            self._shared = _Shared(list(facts), contexts, prompts)
        self.contexts = self._shared.contexts
        self.prompts = list(self._shared.prompts[: len(facts)])
        if rounds is not None:
            groups = self._resolve_collisions(rounds)
            of_rounds = [[prompt for i in round_ if (prompt := self.prompts[i]) is not None] for round_ in rounds]
            check_independence(self.lm, self.method, self.preservation, of_rounds)
            self._join(groups)

    def lend_factors(self, other: "ClosedFormEditor") -> dict[Place, Preservation] | None:
        """The factors for an editor that needs the same ones; None if it needs others, or if past keys were added.

        Each is a copy, so that either editor may add past keys of its own.
        """
        same = self.covariance is other.covariance and self.method.same_preservation(other.method)
        if not same or (self.method.keeps_past_keys and self._rounds_written):
            return None
        return {place: copy(term) for place, term in self.preservation.items()} or None

    def lend_prompts(self, other: "ClosedFormEditor") -> _Shared | None:
        """Contexts and prompts for an editor with equal contexts, whose facts are the first ones of this editor."""
        same = self.method.contexts == other.method.contexts and self.served == other.served
        if self._shared is None or not same:
            return None
        return self._shared if self._shared.facts[: len(other.facts)] == other.facts else None

    def give(self, results: Mapping[int, Tensor], with_others: bool = False) -> None:
        """Take values that were found before, [d], or [2 d] for two sites. Merged facts have one, that of the first."""
        self._given, self._given_with_others = dict(results), with_others
        if self.prepared:
            self._check_given()

    def searched_with(self, index: int) -> list[int]:
        return [other for other in self._together.facts(index) if other != index]

    def _check_given(self) -> None:
        shape = (self.method.value_size(self.lm),)
        for index, value in self._given.items():
            if value.shape != shape:
                raise ArgumentError(
                    f"targets: the value of fact {index} is {tuple(value.shape)}, but {self.method.site!r} takes "
                    f"{shape}; find it at that site"
                )

    def _resolve_collisions(self, rounds: Sequence[Sequence[int]]) -> list[tuple[Sequence[int], list[list[int]]]]:
        """Refuse or merge facts whose keys nearly coincide; return those to search jointly, (round, groups) each."""
        # Edits do not change the input of the first edited layer, so its MLP's keys are read for all rounds at once;
        # if its attention is written too, they change slightly
        first = Place(self.method.layers[0])
        keys = self._first_keys(first)
        if not torch.isfinite(keys).all():
            raise NumericalError(f"keys at {first} hold NaN or infinity; load the model in float32")
        if self.settings.on_collision == "keep":
            return []
        pairs: list[tuple[int, int]] = []
        groups: list[tuple[Sequence[int], list[list[int]]]] = []
        for round_ in rounds:
            similarity = key_similarity(self.preservation[first], keys[:, round_])
            linked = (similarity >= self.settings.collision_similarity).triu(1)
            if self.settings.on_collision == "merge":
                self._merge(round_, linked)
            if found := linked_groups(linked):
                groups.append((round_, found))
            pairs += [(round_[one], round_[other]) for one, other in linked.nonzero().tolist()]
        if self.settings.on_collision == "error":
            refuse(self.facts, pairs)
        return groups if self.settings.on_collision == "joint" else []

    def _merge(self, round_: Sequence[int], linked: Tensor) -> None:
        """Let the colliding facts of a round share one key and one value."""
        for group in linked_groups(linked):
            members = [round_[i] for i in group]
            assert self._shared is not None
            merged = merge_prompts([self._shared.prompts[member] for member in members])
            for member in members:
                self.prompts[member] = merged if member == members[0] else None
            self._together.merge(members)

    def _join(self, groups: Sequence[tuple[Sequence[int], list[list[int]]]]) -> None:
        """Let the colliding facts of each round be searched knowing of each other."""
        for round_, of_round in groups:
            assert self._shared is not None
            prompts = [self._shared.prompts[index] for index in round_]
            shares = shares_written(self.lm, self.method, self.preservation, prompts)
            for group in of_round:
                self._together.join([round_[i] for i in group], shares[group][:, group])

    def _first_keys(self, first: Place) -> Tensor:
        """The keys of the run's facts at matrix `first`, [d_in, facts] float64, before facts are merged."""
        assert self._shared is not None
        if first not in self._shared.first_keys:
            self._shared.first_keys[first] = keys_at(self.lm, self._shared.prompts, first)
        return self._shared.first_keys[first][:, : len(self.facts)]

    # Step 1

    def make_optimizer(self) -> torch.optim.Adam:
        return torch.optim.Adam([self._placeholder], lr=self.method.values.lr)

    def start(self, indices: Sequence[int], optimizer: torch.optim.Optimizer | None) -> None:
        """Begin the search for the values of these facts, except facts with a given value and merged ones."""
        assert optimizer is not None
        # a group of facts is searched with the first chunk that holds one of them
        wanted = [other for index in indices for other in self._together.searched(index)]
        prompts = {index: prompt for index in wanted if (prompt := self.prompts[index]) is not None}
        if not self._rounds_written:  # given values hold for the first round's weights only
            device = self.lm.weight(self.method.value_place).device
            for index in prompts.keys() & self._given.keys():
                complete = self._given.keys() >= set(self._together.searched(index))
                if not self.searched_with(index) or (self._given_with_others and complete):
                    self.results[index] = self._given[index].to(device, torch.float64)
        for index in prompts.keys() & self.results.keys():
            del prompts[index]
        self._searched = list(prompts)
        self._search = None
        if prompts:
            self._search = self._optimization(list(prompts.values()), self._searched)
            optimizer.param_groups[0]["params"] = [self._search.delta]
            optimizer.state.clear()
            self._collect()

    def _optimization(self, prompts: Sequence[FactPrompts], indices: Sequence[int]) -> ValueOptimization:
        """The search for these facts in the present model."""
        layer, site, values = self.method.value_layer, self.method.site, self.method.values
        joint = self._together.groups(indices)
        return ValueOptimization(self.lm, prompts, layer, site, values, self.settings.max_tokens, joint)

    @property
    def done(self) -> bool:
        return self._search is None

    def step(self, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
        """Take one step of Adam on the δ of the present chunk.

        Returns:
            "loss", the mean over the chunk's facts, and "active_facts", the number of unfinished ones.
        """
        search = self._search
        assert search is not None and optimizer is not None
        losses = search.backward()
        optimizer.step()
        search.after_step()
        self._collect()
        return {"loss": losses.mean(), "active_facts": search.active.sum().float()}

    def _collect(self) -> None:
        """Store the values of the present chunk if its search is over."""
        if self._search is not None and self._search.done:
            found = self._search.values()
            self.results.update(zip(self._searched, found.targets.double(), strict=True))
            self.losses.update(zip(self._searched, found.losses.tolist(), strict=True))
            self._search = None

    @property
    def facts_found(self) -> float:
        at_work = 0.0 if self._search is None else float(self._search.progress.sum())
        found = len(self.results) + self._in_first_pass + at_work
        return found if self.method.passes == 1 else (found + self._rewritten) / 2

    # Step 2

    def write(self, indices: Sequence[int], owner: Owner) -> dict[Place, Change]:
        prompts, targets = self._found(indices)
        changes = self._written(prompts, targets, owner)
        if self.method.passes > 1:
            changes = self._further(indices, prompts, owner, changes)
        if self.method.reads_keys_after_writing:
            self.round_keys = read_keys(self.lm, self.method, prompts)
        self._remember()
        self._rounds_written += 1
        return changes

    def _written(self, prompts: Sequence[FactPrompts], targets: Tensor, owner: Owner) -> dict[Place, Change]:
        """Solve and write; the keys are kept in `round_keys`."""
        changes: dict[Place, Change] = {}
        self.round_keys = {}
        for place, change, keys in write_facts(self.lm, self.method, self.preservation, prompts, targets, owner):
            changes[place], self.round_keys[place] = change, keys
        return changes

    def _further(
        self, indices: Sequence[int], prompts: Sequence[FactPrompts], owner: Owner, changes: dict[Place, Change]
    ) -> dict[Place, Change]:
        """Take the further passes of a round that was written; returns all that is written then."""
        searched = [index for index in indices if self.prompts[index] is not None]

        def watch(search: ValueOptimization) -> None:
            self._rewritten = float(search.progress.sum())
            self.watch()

        passes = FurtherPasses(
            self.lm,
            owner,
            lambda: self._optimization(prompts, searched),
            lambda targets: self._written(prompts, targets, owner),
            watch,
        )
        self._in_first_pass = len(searched)
        changes = passes.run(changes, self.method.passes - 1)
        self._in_first_pass, self._rewritten = 0, 0.0
        self.losses |= {searched[i]: loss for i, loss in passes.losses.items()}
        return changes

    def separate(self, indices: Sequence[int]) -> RowwiseEdits | None:
        if self.method.passes > 1:  # they need the edited model
            return None
        prompts, targets = self._found(indices)
        return separate_updates(self.lm, self.method, self.preservation, prompts, targets)

    def _found(self, indices: Sequence[int]) -> tuple[list[FactPrompts], Tensor]:
        """Prompts of the facts, merged ones once, and their values [d, B], which are removed from `results`."""
        prompts = {index: prompt for index in indices if (prompt := self.prompts[index]) is not None}
        return list(prompts.values()), torch.stack([self.results.pop(index) for index in prompts]).T

    def _remember(self) -> None:
        if self.method.keeps_past_keys:
            for place, keys in self.round_keys.items():
                self.preservation[place].remember(keys)

    # Resuming and records

    def state(self) -> dict[str, Tensor]:
        """The keys of the last round, [B, d_in] by place, if the method keeps past keys; else nothing.

        They are stored as rows, the memory layout in which they are read; another layout may change the order of sums.
        """
        return {place.key: keys.T for place, keys in self.round_keys.items()} if self.method.keeps_past_keys else {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.round_keys = {Place.from_key(name): keys.T for name, keys in state.items()}
        self._remember()
        self._rounds_written += 1

    def record(self) -> dict[str, Any]:
        return {"contexts": asdict(self.contexts), **super().record()}

    def checksums(self) -> dict[str, Any]:
        given = {str(index): value for index, value in self._given.items()}
        return {**super().checksums(), "targets": digest("", given)}

    def release(self) -> None:
        self.preservation = {}
