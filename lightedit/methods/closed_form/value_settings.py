"""Settings of the search for values."""

from dataclasses import dataclass
from typing import Literal, get_args

from lightedit.errors import ArgumentError
from lightedit.methods.closed_form.stopping import KLBelow, MostProbable

Objective = Literal["reach", "erase"]


@dataclass(frozen=True)
class ValueSettings:
    """Settings of the value optimisation.

    Attributes:
        lr: Adam's learning rate: about how far one step moves each coordinate of δ.
        relative_lr: whether `lr` is a share of h0's root mean square, so that it carries over between models and
            layers; False takes it in the model's own scale, as published.
        steps: most evaluations of the loss; no step follows the last one, as in the published code.
        clamp_norm_factor: bound of ||δ|| / ||h0|| after each step, where h0 is the unedited activation.
        kl_factor: weight of KL(edited || unedited) at the subject's last token of "{subject} is a".
        weight_decay: weight of ||δ|| / ||h0||² (the norm of δ is not squared).
        loss_threshold: a fact is done once its loss is below this.
        stopping: a further rule that ends the search for a fact; none by default.
        objective: "reach" makes the target probable. "erase" makes it improbable: exp(-NLL), with the NLL averaged over
            contexts and tokens, takes the place of the NLL in the loss (Hase et al., 2023, arXiv 2301.04213, fact
            erasure).

    Raises:
        ArgumentError: a value is out of range, or `stopping` is given with objective "erase".
    """

    lr: float = 0.5
    steps: int = 25
    clamp_norm_factor: float = 0.75
    kl_factor: float = 0.0625
    weight_decay: float = 0.5
    loss_threshold: float = 0.05
    stopping: MostProbable | KLBelow | None = None
    relative_lr: bool = False
    objective: Objective = "reach"

    def __post_init__(self) -> None:
        if not (self.lr > 0 and self.steps >= 1 and self.clamp_norm_factor > 0):  # which NaN fails, too
            raise ArgumentError(f"lr, steps and clamp_norm_factor must be positive, got {self}")
        if not all(value >= 0 for value in (self.kl_factor, self.weight_decay, self.loss_threshold)):
            raise ArgumentError(f"kl_factor, weight_decay and loss_threshold must not be negative, got {self}")
        if self.objective not in get_args(Objective):
            raise ArgumentError(f"objective is one of {', '.join(get_args(Objective))}, got {self.objective!r}")
        if self.objective == "erase" and self.stopping is not None:
            raise ArgumentError(
                "stopping waits until the target is the most probable continuation, and objective 'erase' makes it "
                "improbable; leave stopping out"
            )
