"""Further passes over a round: facts that do not hold once it is written are searched again, in the edited model.

A solve writes a part of what the values ask for, and behind the first written layer the model is no longer the one in
which they were found. Both errors show only in the edited model; a second search and solve start from there.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from lightedit.lm import LanguageModel, Place
from lightedit.lm.changes import Change, LowRankUpdate, total
from lightedit.lm.weights import Owner
from lightedit.methods.closed_form.values import ValueOptimization


@dataclass
class FurtherPasses:
    """The further passes of one round.

    A pass is kept if fewer facts lack after it, or as many with a smaller sum of all losses; else it is taken back, and
    is the last one. A fact lacks if a token of its target is not the most probable one in some context. Facts that do
    not lack ask for no change, so that the solve holds them in place.

    Attributes:
        lm: the model, which carries the round.
        owner: name of the round's updates in the model's weights.
        search: gives a search for the facts of the round in the present model.
        write: solves for targets [d, B] and writes on behalf of `owner`; returns what it wrote.
        watch: called after each step with the search.
        losses: the last losses of facts that were searched again, by their index in the round.
    """

    lm: LanguageModel
    owner: Owner
    search: Callable[[], ValueOptimization]
    write: Callable[[Tensor], Mapping[Place, Change]]
    watch: Callable[[ValueOptimization], None]
    losses: dict[int, float] = field(default_factory=dict)

    def run(self, changes: Mapping[Place, Change], most: int) -> dict[Place, Change]:
        """Take at most `most` further passes after `changes` were written, and return what the model then carries."""
        search, lacking, lack = self._present()
        for _ in range(most):
            if not lacking.any():
                break
            found = self._targets(search)
            further = self.write(found)
            present, still_lacking, left = self._present()
            if better := left < lack:
                changes = {place: _sum(change, further[place]) for place, change in changes.items()}
                losses = search.values().losses
                self.losses |= {index: float(losses[index]) for index in lacking.nonzero().squeeze(1).tolist()}
            self.lm.weights.remove([self.owner])
            for place, change in changes.items():
                self.lm.weights.add(self.owner, place, change)
            if not better:
                break
            search, lacking, lack = present, still_lacking, left
        return dict(changes)

    def _present(self) -> tuple[ValueOptimization, Tensor, tuple[int, float]]:
        """A search in the present model, the facts that lack, [facts] bool, and (their number, sum of all losses).

        The search's first losses are evaluated.
        """
        search = self.search()
        losses = search.backward()
        search.finish(search.most_probable)
        lacking = ~search.most_probable
        return search, lacking, (int(lacking.sum()), float(losses.sum()))

    def _targets(self, search: ValueOptimization) -> Tensor:
        """The values that a search finds, from its first losses on."""
        optimizer = search.make_optimizer()
        while not search.done:
            optimizer.step()
            search.after_step()
            self.watch(search)
            if not search.done:
                search.backward()
        return search.values().targets.double().T


def _sum(one: Change, other: Change) -> Change:
    both = total([one, other])
    return both.compact() if isinstance(both, LowRankUpdate) else both
