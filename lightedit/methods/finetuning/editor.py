"""The editor of the fine-tuning methods: a round trains one ΔW; facts that are edited alone train one each."""

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightedit.data.facts import Fact
from lightedit.data.prompts import FactPrompts, check_rows, tokenize_answers
from lightedit.errors import NumericalError
from lightedit.lm import LanguageModel, Place
from lightedit.lm.changes import Change, DenseUpdate
from lightedit.lm.rowwise import RowwiseEdits
from lightedit.lm.weights import Owner
from lightedit.methods.finetuning.method import FineTuning
from lightedit.methods.finetuning.training import TrainingApart, TrainingTogether, rounded, share_kept
from lightedit.methods.protocol import Editor, EditorSettings, Method
from lightedit.statistics.covariance import Covariance

_COPIES = 6  # of ΔW in a step: itself, its gradient, Adam's two moments, and two while Adam computes
_BYTES = 2**32  # of them on the CPU


class FineTuningEditor(Editor):
    """The editor of a fine-tuning method. It has no search: `write` trains on the facts of a round together.

    Facts that are each edited alone are trained in steps, many at once, each with a ΔW of its own.

    Attributes:
        prompts: each fact's token rows; set by `prepare`.
        written: indices of the facts of the rounds written so far.
    """

    can_serve = True
    method: FineTuning

    def __init__(
        self, lm: LanguageModel, method: Method, covariance: Covariance | None, settings: EditorSettings
    ) -> None:
        super().__init__(lm, method, covariance, settings)
        self.prompts: list[FactPrompts] = []
        self.written: list[int] = []
        self._rounds_written = 0
        self._apart: TrainingApart | None = None
        self._at_work = 0.0  # facts of the round in training, times the share that is done

    def prepare(
        self, facts: Sequence[Fact], rounds: Sequence[Sequence[int]] | None, like: Editor | None = None
    ) -> None:
        """See `Editor.prepare`.

        Raises:
            FactError: a fact cannot be tokenised or served as it asks for.
            UnsupportedModelError: the model lacks a trained matrix.
        """
        super().prepare(facts, rounds, like)
        prompts = tokenize_answers(self.lm, self.method.taught(facts))
        check_rows(self.lm, prompts)
        self.prompts = prompts if self.served is None else [self.served(each) for each in prompts]

    # A round

    def write(self, indices: Sequence[int], owner: Owner) -> dict[Place, Change]:
        changes = dict(self.train(indices, owner))
        _check_finite(changes)
        kept = {place: self._add(owner, place, change) for place, change in changes.items()}
        _warn_of_rounding(self.lm, kept)
        self._at_work = 0.0
        if self.rounds is not None:
            self.written += indices
            self._rounds_written += 1
        return {**changes}

    def train(self, indices: Sequence[int], owner: Owner) -> Mapping[Place, DenseUpdate]:
        """The changes that write these facts into the present model on behalf of `owner`; none is written."""
        return self.trained(indices)

    def trained(
        self, indices: Sequence[int], epochs: int | None = None, penalty: Mapping[Place, Tensor] | None = None
    ) -> Mapping[Place, DenseUpdate]:
        """The changes that training on these facts together gives; see `TrainingTogether`."""

        def watch(share: float) -> None:
            self._at_work = share * len(indices)
            self.watch()

        prompts = [self.prompts[index] for index in indices]
        return TrainingTogether(self.lm, self.method, prompts, self.settings.max_tokens, epochs, penalty).run(watch)

    def _add(self, owner: Owner, place: Place, change: DenseUpdate) -> float:
        """Write `change`; returns the share of it that is in the weights."""
        narrow = self.lm.weight(place).dtype.itemsize < 4
        if not narrow:
            self.lm.weights.add(owner, place, change)
            return 1.0
        before = self._live(place)
        self.lm.weights.add(owner, place, change)
        written = {name: after - before[name] for name, after in self._live(place).items() if name in change.tensors()}
        return share_kept(DenseUpdate(**written), change)

    def _live(self, place: Place) -> dict[str, Tensor]:
        """Copies of the present weight and bias of `place`, float64."""
        parts = {"weight": self.lm.weight(place), "bias": self.lm.bias(place)}
        return {name: part.double() for name, part in parts.items() if part is not None}

    # Facts that are each edited alone

    @property
    def most_separate(self) -> int:
        """Facts whose ΔW, gradients and moments fit into 4 GiB, or into half of the free memory of a GPU."""
        live = [self.lm.weight(place) for place in self.method.trained(self.lm)]
        bytes_of_fact = _COPIES * sum(weight.numel() * max(4, weight.element_size()) for weight in live)
        device = live[0].device
        free = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else _BYTES
        return max(1, free // bytes_of_fact)

    def start(self, indices: Sequence[int], optimizer: torch.optim.Optimizer | None) -> None:
        if self.rounds is None:
            prompts = [self.prompts[index] for index in indices]
            self._apart = TrainingApart(self.lm, self.method, prompts, self.settings.max_tokens)

    @property
    def done(self) -> bool:
        return self._apart is None or self._apart.done

    def step(self, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
        """Take one step of the facts that are each edited alone.

        Returns:
            "loss", the mean over unfinished facts, and "active_facts", their number.
        """
        assert self._apart is not None
        losses = self._apart.step()
        return {"loss": losses.mean(), "active_facts": torch.tensor(float(len(losses)))}

    @property
    def facts_found(self) -> float:
        return self._at_work + (0.0 if self._apart is None else float(self._apart.progress.sum()))

    def separate(self, indices: Sequence[int]) -> RowwiseEdits:
        if self._apart is None:
            self.start(indices, None)
        while not self.done:
            self.step(None)
        assert self._apart is not None
        of_facts, self._apart = self._apart.changes(), None
        for changes in of_facts:
            _check_finite(changes)
        places = list(of_facts[0])
        if self.lm.dtype.itemsize < 4:  # rows see what would be in the weights
            exact = of_facts
            of_facts = [{place: rounded(self.lm, place, each[place]) for place in places} for each in exact]
            both = list(zip(of_facts, exact, strict=True))
            kept = {place: min(share_kept(new[place], old[place]) for new, old in both) for place in places}
            _warn_of_rounding(self.lm, kept)
        return RowwiseEdits(
            {place: tuple(changes[place] for changes in of_facts) for place in places}, torch.arange(len(of_facts))
        )

    # Resuming

    def restore(self, state: Mapping[str, Tensor]) -> None:
        assert self.rounds is not None
        self.written += self.rounds[self._rounds_written]
        self._rounds_written += 1

    def release(self) -> None:
        self._apart = None


def _check_finite(changes: Mapping[Place, Change]) -> None:
    for place, change in changes.items():
        if not all(torch.isfinite(part).all() for part in change.tensors().values()):
            raise NumericalError(f"the update of {place} holds NaN or infinity; load the model in float32")


def _warn_of_rounding(lm: LanguageModel, kept: Mapping[Place, float]) -> None:
    """Warn if the weights, in the model's dtype, hold less than half of a change."""
    lost = [f"{place}: {share:.0%}" for place, share in kept.items() if share < 0.5]
    if lost:
        warnings.warn(
            f"rounding to {str(lm.dtype).removeprefix('torch.')} loses most of the edit; the weights hold of ΔW "
            f"{', '.join(lost)}. Load the model in float32, or raise norm or lr",
            stacklevel=3,
        )
