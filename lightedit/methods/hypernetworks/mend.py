"""MEND (Mitchell et al., 2022, arXiv 2110.11309): a trained network maps the gradient of a fact's loss to an edit."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from lightedit.errors import ArgumentError
from lightedit.lm import LanguageModel
from lightedit.methods.hypernetworks.editor import HyperNetworkEditor
from lightedit.methods.hypernetworks.mend_network import MENDNetwork
from lightedit.methods.hypernetworks.method import HyperNetworkMethod
from lightedit.methods.hypernetworks.objectives import MENDObjective, Objective
from lightedit.methods.protocol import Editor


@dataclass(frozen=True)
class MEND(HyperNetworkMethod):
    """Map the factors of each token's gradient by a trained network, and subtract their product from the weights.

    With `published`, the product is added, as the published code does by mistake, so that training must first turn the
    network's sign; and the loss of a round is the mean over all its answer tokens. The default is one loss a fact.

    Attributes:
        rank: rank of the networks' layers, at most d_in + d_out.
        norm: whether factors are normalised by their running mean and standard deviation.
        rate: the learned rate η of each matrix before training.
        edit_weight: c_e, the weight of the answers' loss beside the locality loss.
        lr: learning rate of the networks in training.
        rate_lr: learning rate of the learned rates.
        clip: norm to which longer gradients are scaled in training; None for no limit.
    """

    rank: int = 1920
    norm: bool = True
    rate: float = 1e-4
    edit_weight: float = 0.1
    lr: float = 1e-6
    rate_lr: float = 1e-4
    clip: float | None = 100.0

    editor_type: ClassVar[type[Editor]] = HyperNetworkEditor

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rank", "rate", "edit_weight", "lr", "rate_lr", "clip"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ArgumentError(f"{name} must be positive, got {value}")

    @property
    def averages_round(self) -> bool:
        """Whether the loss of a round is the mean over all its answer tokens."""
        return self.published

    def build(self, lm: LanguageModel, dtype: torch.dtype) -> MENDNetwork:
        return MENDNetwork(self.matrices(lm), self.rank, self.norm, self.rate, self.published, dtype)

    def objective(self, steps: int) -> Objective:
        return MENDObjective(self.edit_weight, self.lr, self.rate_lr, self.clip)
