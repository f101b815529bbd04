"""The data module that gives a trainer facts in rounds and chunks."""

from collections.abc import Iterator, Sequence
from typing import Any

from lightning import LightningDataModule
from torch.utils.data import DataLoader, IterableDataset

from lightedit.data.facts import Fact, check_facts, distinct_facts
from lightedit.errors import ArgumentError


class Chunk:
    """Facts whose values are optimised together.

    Attributes:
        indices: positions of the facts in the run's list of facts.
        facts: the facts.
        round_: the round in which they are written, counted from 0.
        finished: set by the training module once their values are found.
    """

    def __init__(self, indices: Sequence[int], facts: Sequence[Fact], round_: int) -> None:
        self.indices = tuple(indices)
        self.facts = tuple(facts)
        self.round_ = round_
        self.finished = False

    def __len__(self) -> int:
        return len(self.facts)


class _Rounds(IterableDataset[Chunk]):
    """The chunks of the current round; one epoch is one round. Each chunk is yielded again until it is finished."""

    def __init__(self, data: "FactsDataModule") -> None:
        self.data = data

    def __iter__(self) -> Iterator[Chunk]:
        assert self.data.trainer is not None
        rounds, round_ = self.data.rounds, self.data.trainer.current_epoch
        if round_ >= len(rounds):
            return
        for indices in chunks_by_suffix(self.data.facts, rounds[round_], self.data.facts_per_chunk):
            chunk = Chunk(indices, [self.data.facts[index] for index in indices], round_)
            while not chunk.finished:
                yield chunk


class _SoFar(IterableDataset[Chunk]):
    """The facts of this round and all earlier ones. Outside of a fit, all facts."""

    def __init__(self, data: "FactsDataModule") -> None:
        self.data = data

    def __iter__(self) -> Iterator[Chunk]:
        trainer = self.data.trainer
        assert trainer is not None
        fitting = trainer.state.fn == "fit"
        for round_, indices in enumerate(self.data.rounds[: trainer.current_epoch + 1 if fitting else None]):
            yield Chunk(indices, [self.data.facts[index] for index in indices], round_)


class FactsDataModule(LightningDataModule):
    """Gives facts to a trainer in rounds. The facts of a round are written into the model together.

    Args:
        facts: the facts to edit, in this order. Those that repeat an earlier one are dropped with a warning.
        facts_per_round: facts written together; None puts all into one round.
        facts_per_chunk: facts whose values are optimised together. Larger chunks are faster and take more memory.

    Raises:
        FactError: there are no facts, or one round holds two answers to one text.
        ArgumentError: a size is below 1.
    """

    def __init__(self, facts: Sequence[Fact], facts_per_round: int | None = None, facts_per_chunk: int = 32) -> None:
        super().__init__()
        for name, size in (("facts_per_round", facts_per_round), ("facts_per_chunk", facts_per_chunk)):
            if size is not None and size < 1:
                raise ArgumentError(f"{name} must be at least 1, got {size}")
        self.facts = distinct_facts(facts)
        check_facts(self.facts, facts_per_round)
        self.facts_per_round = facts_per_round or len(self.facts)
        self.facts_per_chunk = facts_per_chunk

    @property
    def rounds(self) -> list[list[int]]:
        """The indices of each round's facts."""
        indices = range(len(self.facts))
        return [list(indices[i : i + self.facts_per_round]) for i in indices[:: self.facts_per_round]]

    def train_dataloader(self) -> DataLoader[Chunk]:
        return DataLoader(_Rounds(self), batch_size=None)

    def val_dataloader(self) -> DataLoader[Chunk]:
        return DataLoader(_SoFar(self), batch_size=None)

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        """Return the chunk itself. It holds text, and the module sets `finished` on this very object."""
        return batch


def chunks_by_suffix(facts: Sequence[Fact], indices: Sequence[int], size: int) -> Iterator[list[int]]:
    """Split `indices` into chunks of facts with similar numbers of characters after the subject, to reduce padding."""

    def suffix(index: int) -> int:
        fact = facts[index]
        return len(fact.prompt.partition("{}")[2]) + len(fact.target_new)

    ordered = sorted(indices, key=lambda index: (suffix(index), index))
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]
