"""KE, KnowledgeEditor (De Cao et al., 2021, arXiv 2104.08164): a text about the fact scales its gradient to an edit."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, get_args

import torch

from lightedit.data.facts import Fact
from lightedit.errors import ArgumentError
from lightedit.lm import LanguageModel, Place
from lightedit.methods.hypernetworks.editor import HyperNetworkEditor
from lightedit.methods.hypernetworks.factors import Answered
from lightedit.methods.hypernetworks.ke_network import KENetwork
from lightedit.methods.hypernetworks.method import HyperNetworkMethod
from lightedit.methods.hypernetworks.objectives import Constraint, KEObjective, Objective
from lightedit.methods.protocol import Editor

_FIELD = re.compile(r"\{(?:prediction|target|prompt)\}")
_MARGINS: dict[str, tuple[float, float]] = {"kl": (1e-3, 1e-5), "lp": (1e-3, 1e-7)}  # KE's for a model that writes text


@dataclass(frozen=True)
class KE(HyperNetworkMethod):
    """Scale the rows and columns of the gradient of a fact's loss, as a network that reads the fact decides.

    With `published`, the softmax of GPT-2's matrices runs over d_in, because they are stored transposed.

    Attributes:
        condition: the text that the network reads: {prompt} is the fact's prompt, {target} its new answer, and
            {prediction} what the model says, as many tokens as the new answer has.
        hidden: width of each direction of the LSTM.
        width: width of the condition.
        middle: width between the two layers of a matrix.
        constraint: what is held small in training: "kl" the locality loss, "lp" the root mean square of ΔW's entries.
        margin: how large that may be at the start; None for 1e-3.
        margin_end: how far the margin falls in training; None for 1e-5 (kl) or 1e-7 (lp).
        lr: learning rate of the network in training.
        multiplier_lr: learning rate of the constraint's multiplier.
        warmup: steps over which the network's rate rises; it falls to 0 at the last step.
        clip: norm to which longer gradients are scaled in training; None for no limit.
    """

    condition: str = "{prediction} >> {target} || {prompt}"
    hidden: int = 128
    width: int = 1024
    middle: int = 128
    constraint: Constraint = "kl"
    margin: float | None = None
    margin_end: float | None = None
    lr: float = 3e-4
    multiplier_lr: float = 0.1
    warmup: int = 1000
    clip: float | None = None

    editor_type: ClassVar[type[Editor]] = HyperNetworkEditor

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("hidden", "width", "middle", "margin", "margin_end", "lr", "multiplier_lr", "clip"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ArgumentError(f"{name} must be positive, got {value}")
        if self.warmup < 0:
            raise ArgumentError(f"warmup must not be negative, got {self.warmup}")
        if self.constraint not in get_args(Constraint):
            raise ArgumentError(f"constraint is one of {', '.join(get_args(Constraint))}, got {self.constraint!r}")
        if not _FIELD.search(self.condition):
            raise ArgumentError(f"condition: {self.condition!r} holds none of {{prediction}}, {{target}}, {{prompt}}")

    @property
    def margins(self) -> tuple[float, float]:
        """The margin at the start, and its least value."""
        start, end = _MARGINS[self.constraint]
        return self.margin or start, self.margin_end or min(end, self.margin or start)

    def build(self, lm: LanguageModel, dtype: torch.dtype) -> KENetwork:
        embeddings = lm.weight(Place(0, "embedding")).T
        return KENetwork(self.matrices(lm), embeddings, self.hidden, self.width, self.middle, dtype, self.published)

    def objective(self, steps: int) -> Objective:
        return KEObjective(self.constraint, *self.margins, self.lr, self.multiplier_lr, self.warmup, steps, self.clip)

    def conditions(self, lm: LanguageModel, rows: Sequence[Answered], facts: Sequence[Fact]) -> list[list[int]]:
        """Token ids of each fact's condition text, with what the model says at present."""
        said = [""] * len(rows)
        if "{prediction}" in self.condition:
            most = max(len(row.targets) for row in rows)
            written = lm.generate([row.prompt for row in rows], most)
            said = [lm.decode(ids[: len(row.targets)]).strip() for ids, row in zip(written, rows, strict=True)]
        texts = [
            _filled(self.condition, {"{prediction}": words, "{target}": fact.target_new, "{prompt}": fact.text})
            for words, fact in zip(said, facts, strict=True)
        ]
        return lm.encode(texts)


def _filled(template: str, values: Mapping[str, str]) -> str:
    """The template with its fields filled in, which may hold braces themselves."""
    return _FIELD.sub(lambda found: values[found[0]], template)
