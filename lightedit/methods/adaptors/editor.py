"""The editor of the methods that add an adaptor."""

from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightedit.data.facts import Fact
from lightedit.data.prompts import Contexts, FactPrompts, check_rows, tokenize_facts
from lightedit.digests import digest
from lightedit.errors import NumericalError
from lightedit.lm import LanguageModel
from lightedit.lm.changes import Adaptor, Change
from lightedit.lm.place import Place
from lightedit.lm.weights import Owner
from lightedit.methods.adaptors.method import Adapting
from lightedit.methods.protocol import Editor, EditorSettings, Method
from lightedit.statistics.covariance import Covariance

Watch = Callable[[float], None]
"""Receives the share of the work that is done."""


class AdaptorEditor(Editor):
    """The editor of a method that adds an adaptor. It has no search: `write` teaches the facts of a round.

    Attributes:
        prompts: each fact's token rows; set by `prepare`.
    """

    can_serve = True
    on_adaptors = True
    method: Adapting

    def __init__(
        self, lm: LanguageModel, method: Method, covariance: Covariance | None, settings: EditorSettings
    ) -> None:
        super().__init__(lm, method, covariance, settings)
        self.prompts: list[FactPrompts] = []
        self._at_work = 0.0  # facts in training, times the share that is done

    def prepare(
        self, facts: Sequence[Fact], rounds: Sequence[Sequence[int]] | None, like: Editor | None = None
    ) -> None:
        """See `Editor.prepare`.

        Raises:
            FactError: a fact cannot be tokenised or served as it asks for, or is longer than the model's positions.
            UnsupportedModelError: the model lacks the place.
        """
        super().prepare(facts, rounds, like)
        prompts = tokenize_facts(self.lm.tokenizer, facts, Contexts(), read_keys=False)
        check_rows(self.lm, prompts)
        self.prompts = prompts if self.served is None else [self.served(each) for each in prompts]

    @property
    def place(self) -> Place:
        """The adaptor's place."""
        return self.method.place

    def write(self, indices: Sequence[int], owner: Owner) -> dict[Place, Change]:
        with self.lm.weights.without_adaptors(owner[0]):
            taught = self.taught(indices, self.lm.weights.adaptor(self.place, owner[0]), self._watch(len(indices)))
        check_finite(self.place, taught)
        self.lm.weights.add(owner, self.place, taught)
        self._at_work = 0.0
        return {self.place: taught}

    @abstractmethod
    def taught(self, indices: Sequence[int], present: Adaptor | None, watch: Watch) -> Adaptor:
        """The adaptor that teaches these facts on top of what the edit's earlier rounds run.

        Args:
            indices: the facts.
            present: what the edit's earlier rounds run; it does not act meanwhile. None in the first round.
            watch: called while facts are taught.
        """

    @property
    def facts_found(self) -> float:
        return self._at_work

    def _watch(self, facts: int) -> Watch:
        def watch(share: float) -> None:
            self._at_work = share * facts
            self.watch()

        return watch

    def generator(self, index: int) -> torch.Generator:
        """A generator of random numbers of one fact, whatever the other facts are."""
        fact = self.facts[index]
        name = digest(f"{self.method.seed} {fact.text} {fact.target_new}")
        return torch.Generator().manual_seed(int(name[:15], 16))


def check_finite(place: Place, adaptor: Adaptor) -> None:
    """Raise NumericalError if a tensor of `adaptor` holds NaN or infinity."""
    floating: list[Tensor] = [tensor for tensor in adaptor.tensors().values() if tensor.is_floating_point()]
    if not all(torch.isfinite(tensor).all() for tensor in floating):
        raise NumericalError(f"the adaptor at {place} holds NaN or infinity; lower lr, or load the model in float32")
