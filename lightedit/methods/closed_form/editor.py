"""The editor of all locate-then-edit methods: values by gradient descent, then a closed-form update."""

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightedit.data.facts import Fact, FactError
from lightedit.data.prompts import Contexts, FactPrompts, check_rows, merge_prompts, tokenize_facts
from lightedit.digests import digest
from lightedit.errors import ArgumentError, NumericalError
from lightedit.lm import LanguageModel, Place
from lightedit.lm.changes import Change
from lightedit.lm.rowwise import RowwiseEdits
from lightedit.lm.weights import Owner
from lightedit.methods.closed_form.collisions import linked_groups, refuse
from lightedit.methods.closed_form.joint import Joint
from lightedit.methods.closed_form.keys import KeyWalk
from lightedit.methods.closed_form.method import ClosedForm
from lightedit.methods.closed_form.preservation import Preservation, key_similarity, low_rank_update
from lightedit.methods.closed_form.values import ValueOptimization
from lightedit.methods.closed_form.writing import read_keys, separate_updates, shares_written, write_facts
from lightedit.methods.protocol import Editor, EditorSettings, Method
from lightedit.statistics.covariance import Covariance

_KEYS_AT_ONCE = 256  # facts whose hidden states are in memory while keys are compared


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
        self._merged: dict[int, list[int]] = {}  # fact -> all facts that share its value
        self._joint: dict[int, tuple[list[int], Tensor]] = {}  # fact -> the facts searched with it, and their shares
        self._rounds_written = 0
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
            self._shared = _Shared(list(facts), contexts, prompts)
        self.contexts = self._shared.contexts
        self.prompts = list(self._shared.prompts[: len(facts)])
        if rounds is not None:
            groups = self._resolve_collisions(rounds)
            self._check_independence(rounds)
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
        if self._shared is None or self.method.contexts != other.method.contexts:
            return None
        return self._shared if self._shared.facts[: len(other.facts)] == other.facts else None

    def give(self, results: Mapping[int, Tensor], with_others: bool = False) -> None:
        """Take values that were found before, [d], or [2 d] for two sites. Merged facts have one, that of the first."""
        self._given, self._given_with_others = dict(results), with_others
        if self.prepared:
            self._check_given()

    def searched_with(self, index: int) -> list[int]:
        together = self._merged.get(index) or self._joint.get(index, ([],))[0]
        return [other for other in together if other != index]

    def _check_given(self) -> None:
        site, norm = self.method.site, self.lm.mlp_norm(self.method.value_layer)
        size = self.lm.d_model * (2 if site == "attention+mlp" or (site == "block" and norm is not None) else 1)
        for index, value in self._given.items():
            if value.shape != (size,):
                raise ArgumentError(
                    f"targets: the value of fact {index} is {tuple(value.shape)}, but {self.method.site!r} takes "
                    f"{(size,)}; find it at that site"
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
            self._merged.update(dict.fromkeys(members, members))

    def _join(self, groups: Sequence[tuple[Sequence[int], list[list[int]]]]) -> None:
        """Let the colliding facts of each round be searched knowing of each other."""
        for round_, of_round in groups:
            assert self._shared is not None
            prompts = [self._shared.prompts[index] for index in round_]
            shares = shares_written(self.lm, self.method, self.preservation, prompts)
            for group in of_round:
                together = ([round_[i] for i in group], shares[group][:, group])
                self._joint.update(dict.fromkeys(together[0], together))

    def _check_independence(self, rounds: Sequence[Sequence[int]]) -> None:
        """Refuse rounds that no update can write exactly, if the method writes exactly (γ = 0)."""
        first = Place(self.method.layers[0])
        for number, round_ in enumerate(rounds):
            prompts = [prompt for index in round_ if (prompt := self.prompts[index]) is not None]
            if len(prompts) < 2 or self.method.gamma(len(prompts)) > 0:
                continue
            keys = self._keys_of(prompts, first)
            if self.method.contexts.separate:
                keys, _ = KeyWalk(self.lm, prompts, first).separate_keys()
            try:
                low_rank_update(self.preservation[first], keys, keys[:1], 0.0)
            except ArgumentError as error:
                raise FactError(
                    f"round {number + 1} of {len(rounds)}: {error}, fewer at a time (facts_per_round), or give "
                    "up exactness (EMMET: mu above 0)"
                ) from error

    def _first_keys(self, first: Place) -> Tensor:
        """The keys of the run's facts at matrix `first`, [d_in, facts] float64, before facts are merged."""
        assert self._shared is not None
        if first not in self._shared.first_keys:
            self._shared.first_keys[first] = self._keys_of(self._shared.prompts, first)
        return self._shared.first_keys[first][:, : len(self.facts)]

    def _keys_of(self, prompts: Sequence[FactPrompts], place: Place) -> Tensor:
        """Keys at `place`, [d_in, B] float64, read for 256 facts at a time to bound memory."""
        groups = [prompts[start : start + _KEYS_AT_ONCE] for start in range(0, len(prompts), _KEYS_AT_ONCE)]
        return torch.cat([KeyWalk(self.lm, group, place).keys() for group in groups], dim=1)

    # Step 1

    def make_optimizer(self) -> torch.optim.Adam:
        return torch.optim.Adam([self._placeholder], lr=self.method.values.lr)

    def start(self, indices: Sequence[int], optimizer: torch.optim.Optimizer | None) -> None:
        """Begin the search for the values of these facts, except facts with a given value and merged ones."""
        assert optimizer is not None
        # a group of facts is searched with the first chunk that holds one of them
        wanted = [other for index in indices for other in self._joint.get(index, ([index],))[0]]
        prompts = {index: prompt for index in wanted if (prompt := self.prompts[index]) is not None}
        if not self._rounds_written:  # given values hold for the first round's weights only
            device = self.lm.weight(self.method.value_place).device
            for index in prompts.keys() & self._given.keys():
                complete = self._given.keys() >= set(self._joint.get(index, ([],))[0])
                if not self.searched_with(index) or (self._given_with_others and complete):
                    self.results[index] = self._given[index].to(device, torch.float64)
        for index in prompts.keys() & self.results.keys():
            del prompts[index]
        self._searched = list(prompts)
        self._search = None
        if prompts:
            self._search = ValueOptimization(
                self.lm,
                list(prompts.values()),
                self.method.value_layer,
                self.method.site,
                self.method.values,
                self.settings.max_tokens,
                self._groups_of(self._searched),
            )
            optimizer.param_groups[0]["params"] = [self._search.delta]
            optimizer.state.clear()
            self._collect()

    def _groups_of(self, searched: Sequence[int]) -> list[Joint]:
        """The groups that are searched together, as indices of `searched`."""
        place = {index: i for i, index in enumerate(searched)}
        groups = {self._joint[index][0][0]: self._joint[index] for index in searched if index in self._joint}
        return [Joint(torch.tensor([place[i] for i in members]), shares) for members, shares in groups.values()]

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
        return len(self.results) + at_work

    # Step 2

    def write(self, indices: Sequence[int], owner: Owner) -> dict[Place, Change]:
        prompts, targets = self._found(indices)
        changes: dict[Place, Change] = {}
        self.round_keys = {}
        for place, change, keys in write_facts(self.lm, self.method, self.preservation, prompts, targets, owner):
            changes[place], self.round_keys[place] = change, keys
        if self.method.reads_keys_after_writing:
            self.round_keys = read_keys(self.lm, self.method, prompts)
        self._remember()
        self._rounds_written += 1
        return changes

    def separate(self, indices: Sequence[int]) -> RowwiseEdits:
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
