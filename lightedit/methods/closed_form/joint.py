"""Values of facts whose keys nearly coincide, searched knowing what one solve makes of all of them.

With R the residuals of a round, a solve changes the output at its keys K by R H, H = rightᵀ K (see `shares_written`).
Where two keys are alike, each fact receives a part of the other's residual. The search adds to the activations what
each fact will receive, instead of what it asks for, so that the values fit each other. Facts with equal keys receive
the same, whatever they ask for: they find one value together.
"""

from collections.abc import Sequence
from dataclasses import dataclass

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


def written(delta: Tensor, joint: Sequence[Joint]) -> Tensor:
    """What each fact receives of δ, [facts, d]; for facts in no group δ itself."""
    for group in joint:
        delta = delta.index_copy(0, group.members, group.shares.T @ delta[group.members])
    return delta
