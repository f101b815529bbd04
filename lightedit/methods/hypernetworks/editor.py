"""The editor of the hyper-network methods: one gradient of each fact's loss, and one pass through the network."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from lightedit.data.facts import Fact
from lightedit.data.prompts import Contexts, FactPrompts, check_rows, tokenize_facts
from lightedit.digests import digest
from lightedit.errors import NumericalError
from lightedit.lm import LanguageModel, Place
from lightedit.lm.batch import rectangles
from lightedit.lm.changes import Change, DenseUpdate, LowRankUpdate, total
from lightedit.lm.rowwise import RowwiseEdits
from lightedit.lm.weights import Owner
from lightedit.methods.hypernetworks.factors import Answered, token_factors
from lightedit.methods.hypernetworks.method import HyperNetworkMethod
from lightedit.methods.hypernetworks.network import joined
from lightedit.methods.protocol import Editor, EditorSettings, Method
from lightedit.statistics.covariance import Covariance


class HyperNetworkEditor(Editor):
    """The editor of a hyper-network method. It has no search.

    The edit of a round is the sum of its facts' edits, each computed in the model as it is before the round.

    Attributes:
        network: the trained network.
        prompts: each fact's token rows; set by `prepare`.
    """

    can_serve = True
    method: HyperNetworkMethod

    def __init__(
        self, lm: LanguageModel, method: Method, covariance: Covariance | None, settings: EditorSettings
    ) -> None:
        super().__init__(lm, method, covariance, settings)
        self.network = self.method.network(lm)
        self.prompts: list[FactPrompts] = []
        self._at_work = 0.0  # facts of the round whose edits are computed

    def prepare(
        self, facts: Sequence[Fact], rounds: Sequence[Sequence[int]] | None, like: Editor | None = None
    ) -> None:
        """See `Editor.prepare`.

        Raises:
            FactError: a fact cannot be tokenised or served as it asks for.
        """
        super().prepare(facts, rounds, like)
        prompts = tokenize_facts(self.lm.tokenizer, facts, Contexts(), read_keys=False)
        check_rows(self.lm, prompts)
        self.prompts = prompts if self.served is None else [self.served(each) for each in prompts]

    def write(self, indices: Sequence[int], owner: Owner) -> dict[Place, Change]:
        sums: dict[Place, Change] = {}
        for _, updates in self._updates(indices, together=True):
            for place, update in updates.items():
                sums[place] = _sum([*([sums[place]] if place in sums else []), joined(update)])
        _check_finite(sums)
        for place, change in sums.items():
            self.lm.weights.add(owner, place, change)
        self._at_work = 0.0
        return sums

    def separate(self, indices: Sequence[int]) -> RowwiseEdits:
        found = list(self._updates(indices, together=False))
        order = torch.tensor([index for group, _ in found for index in group])
        updates = {}
        for place in self.method.places:
            parts = [updates_of[place] for _, updates_of in found]
            rank = max(part.rank for part in parts)
            padded = [[_padded(part.left, rank), _padded(part.right, rank)] for part in parts]
            left, right = (torch.cat(side)[order.argsort()] for side in zip(*padded, strict=True))
            updates[place] = LowRankUpdate(left, right)
        _check_finite(updates)
        self._at_work = 0.0
        return RowwiseEdits(updates, torch.arange(len(indices)))

    @property
    def facts_found(self) -> float:
        return self._at_work

    @torch.no_grad()
    def _updates(
        self, indices: Sequence[int], together: bool
    ) -> Iterator[tuple[list[int], dict[Place, LowRankUpdate]]]:
        """The updates of each fact by itself, in groups of facts of similar length.

        Args:
            indices: the facts.
            together: whether they are the facts of one round.

        Yields:
            Positions in `indices`, and place -> their updates, on the device of the place.
        """
        rows = [Answered(self.prompts[i].rows[0].ids, self.prompts[i].rows[0].targets) for i in indices]
        facts = [self.facts[i] for i in indices]
        conditions = self.method.conditions(self.lm, rows, facts)
        count = sum(len(row.targets) for row in rows) if together and self.method.averages_round else None
        for group in rectangles([len(row.ids) for row in rows], self.settings.max_tokens):
            own = [rows[i] for i in group]
            factors = token_factors(self.lm, own, self.method.places, self.network.dtype, count=count)
            found = self.network(factors, None if conditions is None else [conditions[i] for i in group])
            yield group, {place: update.to(self.lm.weight(place).device) for place, update in found.items()}
            self._at_work += len(group)
            self.watch()

    def record(self) -> dict[str, Any]:
        return {"network": {"folder": self.method.folder, "digest": self._digest()}, **super().record()}

    def checksums(self) -> dict[str, Any]:
        return {"network": self._digest(), **super().checksums()}

    def _digest(self) -> str:
        return digest("", self.network.state_dict())


def _sum(changes: Sequence[Change]) -> LowRankUpdate | DenseUpdate:
    """The sum, in the form with fewer numbers."""
    added = total(changes) if len(changes) > 1 else changes[0]
    assert isinstance(added, LowRankUpdate | DenseUpdate)
    return added.compact() if isinstance(added, LowRankUpdate) else added


def _padded(factor: torch.Tensor, rank: int) -> torch.Tensor:
    """A factor [n, d, r] with columns of 0 up to `rank`."""
    return torch.nn.functional.pad(factor, (0, rank - factor.shape[-1]))


def _check_finite(changes: Mapping[Place, Change]) -> None:
    for place, change in changes.items():
        if not all(torch.isfinite(part).all() for part in change.tensors().values()):
            raise NumericalError(f"the update of {place} holds NaN or infinity; load the model in float32")
