"""Values of facts whose keys nearly coincide, searched knowing what one solve makes of all of them.

With R the residuals of a round, a solve changes the output at its keys K by R H, H = rightᵀ K (see `shares_written`).
Where two keys are alike, each fact receives a part of the other's residual. The search adds to the activations what
each fact will receive, instead of what it asks for, so that the values fit each other. Facts with equal keys receive
the same, whatever they ask for: they find one value together.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Joint:
    """Facts whose δ are searched together.

    Attributes:
        members: indices of the facts, [m].
        shares: fact j receives the sum over i of shares[i, j] times the δ of fact i, [m, m].
    """

    members: Tensor
    shares: Tensor

    def to(self, like: Tensor) -> "Joint":
        """On the device of `like`, with its dtype."""
        return Joint(self.members.to(like.device), self.shares.to(like))


@dataclass
class Together:
    """Which facts of a run are searched with others, by their indices in the run."""

    _merged: dict[int, list[int]] = field(default_factory=dict)
    _joint: dict[int, tuple[list[int], Tensor]] = field(default_factory=dict)

    def merge(self, facts: list[int]) -> None:
        """Let facts share one value."""
        self._merged |= dict.fromkeys(facts, facts)

    def join(self, facts: list[int], shares: Tensor) -> None:
        """Let facts be searched knowing of each other; `shares` as in `Joint`."""
        self._joint |= dict.fromkeys(facts, (facts, shares))

    def facts(self, index: int) -> list[int]:
        """The facts on whose texts the value of a fact depends, itself included."""
        return self._merged.get(index) or self.searched(index)

    def searched(self, index: int) -> list[int]:
        """The facts whose values are searched with that of a fact, itself included."""
        return self._joint[index][0] if index in self._joint else [index]

    def groups(self, searched: Sequence[int]) -> list[Joint]:
        """The groups among facts that are searched, as indices of `searched`."""
        place = {index: i for i, index in enumerate(searched)}
        groups = {self._joint[index][0][0]: self._joint[index] for index in searched if index in self._joint}
        return [Joint(torch.tensor([place[i] for i in members]), shares) for members, shares in groups.values()]


def written(delta: Tensor, joint: Sequence[Joint]) -> Tensor:
    """What each fact receives of δ, [facts, d]; for facts in no group δ itself."""
    for group in joint:
        delta = delta.index_copy(0, group.members, group.shares.T @ delta[group.members])
    return delta
