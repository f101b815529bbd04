"""GRACE (Hartvigsen et al., 2023, arXiv 2211.11031): a codebook of keys and values behind one place."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from lightedit.data.builtin import builtin_facts
from lightedit.data.facts import Fact
from lightedit.data.prompts import Contexts, FactPrompts, tokenize_facts
from lightedit.errors import ArgumentError
from lightedit.lm import LanguageModel
from lightedit.lm.changes import Adaptor
from lightedit.lm.place import Place
from lightedit.lm.reading import Positions
from lightedit.lm.rowwise import RowwiseEdits
from lightedit.methods.adaptors.codebook import PAD, Codebook
from lightedit.methods.adaptors.editor import AdaptorEditor, Watch, check_finite
from lightedit.methods.adaptors.method import Adapting
from lightedit.methods.adaptors.rows import Rows, rows_of
from lightedit.methods.adaptors.rule import Expand, Rule
from lightedit.methods.adaptors.values import Training, ValueTraining
from lightedit.methods.protocol import Editor

Init = Literal["cold", "warm", "adv"]

_UNRELATED = 24  # prompts between which distances are measured, for relative radii
_COPIES = 8  # of a value with init "adv", the first one without noise
_IGNORED = -100  # label of a prompt's token in the published code


@dataclass(frozen=True)
class _Taught:
    """A fact of a round: the entry that answers it, and whether the entry's value starts anew."""

    fact: int
    entry: int
    anew: bool


class GRACEEditor(AdaptorEditor):
    """The editor of `GRACE`. Facts that are each edited alone have a codebook of one entry each, trained together.

    Attributes:
        distance: the median distance between queries of unrelated prompts, the unit of relative radii; 1 if radii are
            absolute. Set by `prepare`.
    """

    method: "GRACE"
    distance: float = 1.0

    def prepare(
        self, facts: Sequence[Fact], rounds: Sequence[Sequence[int]] | None, like: Editor | None = None
    ) -> None:
        super().prepare(facts, rounds, like)
        self._apart: tuple[ValueTraining, Tensor] | None = None
        if self.method.relative:
            self.distance = unrelated_distance(self.lm, self.place, self.settings.max_tokens)

    @property
    def rule(self) -> Rule:
        """What becomes of the codebook with each fact."""
        return Rule(self.method.radius * self.distance, self.method.expand, self.method.published)

    # A round

    def taught(self, indices: Sequence[int], present: Adaptor | None, watch: Watch) -> Codebook:
        book = present if isinstance(present, Codebook) else self._empty()
        prompts = [self.prompts[index] for index in indices]
        rows = list(rows_of(self.lm, self.place, prompts, self.settings.max_tokens))
        queries, outputs = _by_fact(rows, "queries"), _by_fact(rows, "outputs")
        book = book.to(queries.device)
        plan, changed = [], set()
        for fact in range(len(indices)):
            before = book
            book, entry, anew = self.rule.teach(book, queries[fact], self._label(prompts[fact]))
            plan.append(_Taught(fact, entry, anew))
            changed |= {entry} | _differing(before, book)
        values = book.values.clone()
        for number, wave in enumerate(waves := _waves(plan)):
            starts = torch.stack(
                [self._first(indices[one.fact], outputs[one.fact]) if one.anew else values[one.entry] for one in wave]
            )
            own = [one.fact for one in wave]
            training = self._training([indices[fact] for fact in own], _chosen(rows, own), starts)
            while not training.done:
                training.step()
                watch((number + training.steps / self.method.steps) / len(waves))
            values[[one.entry for one in wave]] = training.values
        index = torch.tensor(sorted(changed), device=values.device)
        parts = {name: tensor[index] for name, tensor in replace(book, values=values).tensors().items()}
        return Codebook(**parts, positions=book.positions, published=book.published)

    def _empty(self) -> Codebook:
        d_out, d_in = self.lm.anatomy.shape(self.place)
        wide = torch.promote_types(self.lm.dtype, torch.float32)
        return Codebook.empty(d_in, d_out, self.method.replaced(self.lm), self.method.published, wide)

    def _label(self, prompts: FactPrompts) -> tuple[int, ...]:
        row = prompts.rows[0]
        prompt = len(row.ids) - len(row.targets) + 1
        return (*([_IGNORED] * prompt if self.method.published else []), *row.targets)

    def _first(self, index: int, output: Tensor) -> Tensor:
        """The first value of a fact, [d_out] float32 or wider, given the place's own output at its query."""
        wide = output.to(torch.promote_types(output.dtype, torch.float32))
        if self.method.init == "warm":
            return wide
        return torch.rand(wide.shape, generator=self.generator(index), dtype=wide.dtype).to(wide.device)

    def _training(self, indices: Sequence[int], rows: Sequence[Rows], starts: Tensor) -> ValueTraining:
        method = self.method
        return ValueTraining(
            self.lm,
            self.place,
            method.replaced(self.lm),
            [self.prompts[index] for index in indices],
            rows,
            starts,
            Training(method.lr, method.steps, method.stop, _COPIES if method.init == "adv" else 1),
            [self.generator(index) for index in indices],
        )

    # Facts that are each edited alone

    def start(self, indices: Sequence[int], optimizer: torch.optim.Optimizer | None) -> None:
        if self.rounds is None:
            prompts = [self.prompts[index] for index in indices]
            rows = list(rows_of(self.lm, self.place, prompts, self.settings.max_tokens))
            outputs = _by_fact(rows, "outputs")
            starts = torch.stack([self._first(index, outputs[number]) for number, index in enumerate(indices)])
            self._apart = self._training(indices, rows, starts), _by_fact(rows, "queries")

    @property
    def done(self) -> bool:
        return self._apart is None or self._apart[0].done

    def step(self, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
        """Take one step of the facts that are each edited alone.

        Returns:
            "loss", their mean.
        """
        assert self._apart is not None
        return {"loss": self._apart[0].step().mean()}

    @property
    def facts_found(self) -> float:
        if self._apart is None:
            return self._at_work
        training, queries = self._apart
        return len(queries) * training.steps / self.method.steps

    def separate(self, indices: Sequence[int]) -> RowwiseEdits:
        if self._apart is None:
            self.start(indices, None)
        while not self.done:
            self.step(None)
        assert self._apart is not None
        (training, queries), self._apart = self._apart, None
        values, books = training.values, []
        for number, index in enumerate(indices):
            empty = self._empty().to(values.device)
            book, _, _ = self.rule.teach(empty, queries[number], self._label(self.prompts[index]))
            books.append(replace(book, values=values[number][None]))
            check_finite(self.place, books[-1])
        return RowwiseEdits({}, torch.arange(len(indices)), {self.place: books})

    def record(self) -> dict[str, Any]:
        return {**super().record(), **({"distance": self.distance} if self.method.relative else {})}

    def release(self) -> None:
        self._apart = None


@dataclass(frozen=True)
class GRACE(Adapting):
    """Keep a codebook behind one place: near the query of an edited prompt, a trained value replaces its output.

    A fact that is far from all keys gets an entry of its own, with radius ε_init. If the nearest entry is near and has
    the same target, its radius grows to the fact, and its value is trained on. If entries of other targets are near,
    their radii and the new one are halved to the distance where they are larger.

    Attributes:
        radius: ε_init, in units of the place's input, which differ from model to model.
        relative: `radius` is a share of the median distance between queries of unrelated prompts instead.
        expand: how a radius grows: "coverage" to the fact's distance, "sum" by ε_init, "average" to its distance, and
            the key moves half the way there.
        init: the first value: "cold" is uniform in [0, 1), "warm" the place's own output. "adv" is cold, and trained
            with noise added to it.
        stop: a fact whose loss is below this takes no further step; 0 for none, as published.
        published: as the published code does: labels are compared by their mean token id, radii may grow when they are
            split and the nearest entry only is split, distances come from a matrix product, and positions "prompt"
            leave out the last token of the prompt.
    """

    lr: float = 1.0
    radius: float = 1.0
    relative: bool = False
    expand: Expand = "coverage"
    init: Init = "cold"
    stop: float = 0.0
    published: bool = False

    editor_type: ClassVar[type[Editor]] = GRACEEditor

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.radius > 0 and self.stop >= 0):
            raise ArgumentError(f"radius must be positive and stop not negative, got {self.radius} and {self.stop}")
        for name, known in (("expand", Expand), ("init", Init)):
            if getattr(self, name) not in get_args(known):
                raise ArgumentError(f"{name} is one of {', '.join(get_args(known))}, got {getattr(self, name)!r}")
        if self.published and self.expand == "sum":
            raise ArgumentError("published: the published code has no expand 'sum'; leave one of them out")

    def replaced(self, lm: LanguageModel) -> Positions:
        where = super().replaced(lm)
        return "before" if self.published and where == "prompt" else where


def unrelated_distance(lm: LanguageModel, place: Place, max_tokens: int) -> float:
    """The median distance between the queries of built-in facts about different countries at `place`."""
    facts = builtin_facts()
    some = facts[:: max(1, len(facts) // _UNRELATED)][:_UNRELATED]
    prompts = tokenize_facts(lm.tokenizer, some, Contexts(), read_keys=False)
    queries = _by_fact(list(rows_of(lm, place, prompts, max_tokens)), "queries")
    return float(torch.pdist(queries.double()).median())


def _by_fact(rows: Sequence[Rows], name: str) -> Tensor:
    """A tensor of all rows, in the order of the facts."""
    order = torch.cat([group.facts for group in rows])
    whole = torch.cat([getattr(group, name) for group in rows])
    return whole[order.argsort().to(whole.device)]


def _differing(before: Codebook, after: Codebook) -> set[int]:
    """The entries of `before` that are not the same in `after`."""
    count, width = len(before), before.labels.shape[1]
    same = (before.radii == after.radii[:count]) & (before.keys == after.keys[:count]).all(1)
    same &= (F.pad(before.labels, (0, after.labels.shape[1] - width), value=PAD) == after.labels[:count]).all(1)
    return set((~same).nonzero().flatten().tolist())


def _waves(plan: Sequence[_Taught]) -> list[list[_Taught]]:
    """Facts in groups, such that those of a group have entries of their own and follow those of earlier groups."""
    groups: list[list[_Taught]] = []
    seen: dict[int, int] = {}
    for one in plan:
        number = seen[one.entry] = seen.get(one.entry, -1) + 1
        if number == len(groups):
            groups.append([])
        groups[number].append(one)
    return groups


def _chosen(rows: Sequence[Rows], facts: Sequence[int]) -> list[Rows]:
    """The rows of some facts, which are counted in the order of `facts`."""
    number = {fact: i for i, fact in enumerate(facts)}
    found = (group.of_facts(number) for group in rows)
    return [group for group in found if len(group.facts)]
