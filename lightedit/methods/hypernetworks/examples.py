"""What a hyper-network is trained on: facts with rephrasings, and texts whose predictions must stay."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Any, NamedTuple

from lightning import LightningDataModule
from torch.utils.data import DataLoader, IterableDataset

from lightedit.data.facts import Fact, FactError
from lightedit.data.served import encode_targets
from lightedit.errors import ArgumentError
from lightedit.lm import LanguageModel
from lightedit.methods.hypernetworks.factors import Answered

_MOST_HELD_OUT = 500  # facts of a validation, unless more are asked for


@dataclass(frozen=True)
class EditorTrainingSettings:
    """Settings of the training of a hyper-network; those of its loss and optimizer are the method's.

    Attributes:
        steps: most steps of the optimizer.
        batch_size: separate edits of one step.
        locality_texts: texts of each edit, drawn anew in every step, whose predictions must stay.
        validate_every: steps between validations. Each is followed by a checkpoint.
        validation: number of last facts that are held out for validation; None for a tenth, at most 500.
        patience: steps without a better validation after which training ends; None for no limit.
        minutes: time of training after which it ends, at a validation; None for no limit.
        seed: seed of the order of the facts, and of the rephrasings and locality texts drawn.
        progress_bar: show progress and the time left.

    Raises:
        ArgumentError: a value is out of range.
    """

    steps: int = 100_000
    batch_size: int = 10
    locality_texts: int = 1
    validate_every: int = 500
    validation: int | None = None
    patience: int | None = 2000
    minutes: float | None = None
    seed: int = 0
    progress_bar: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "locality_texts", "validate_every", "validation", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ArgumentError(f"{name} must be at least 1, got {value}")
        if self.minutes is not None and not self.minutes > 0:
            raise ArgumentError(f"minutes must be positive, or None for no limit, got {self.minutes}")


@dataclass(frozen=True)
class Example:
    """One fact as a hyper-network is trained on it.

    Attributes:
        fact: the fact.
        own: its prompt with the new answer, from whose gradient the edit is computed.
        rephrasings: its other prompts with the new answer; its own one if there is no other.
        locality: token ids of texts whose predictions the edit must leave; empty if the fact names none.
    """

    fact: Fact
    own: Answered
    rephrasings: tuple[Answered, ...]
    locality: tuple[list[int], ...]


class Drawn(NamedTuple):
    """What one edit of a step is trained on.

    Attributes:
        example: the fact.
        rephrasing: the rephrasing.
        locality: token ids of its locality texts.
    """

    example: Example
    rephrasing: Answered
    locality: tuple[list[int], ...]


def examples_of(lm: LanguageModel, facts: Sequence[Fact]) -> list[Example]:
    """Facts as token rows of `lm`. Locality texts are neighbourhood prompts with their right answers.

    Raises:
        FactError: there are fewer than two facts; or a text cannot be tokenised or served as its fact asks for, or is
            longer than the model's positions.
    """
    if len(facts) < 2:
        raise FactError(f"facts: {len(facts)} given; an editor is trained on at least 2, better on thousands")
    pairs = []
    for fact in facts:
        told = fact.serving
        pairs += [(prompt, fact.target_new, told) for prompt in (fact.text, *fact.paraphrase_prompts)]
        pairs += [(prompt, answer, told._replace(end_turn=False)) for prompt, answer in fact.neighborhood]
    encoded = iter(encode_targets(lm.tokenizer, *(list(column) for column in zip(*pairs, strict=True))))
    found = []
    for number, fact in enumerate(facts):
        rows = [Answered(ids[:-1], ids[-count:]) for ids, count in _take(encoded, 1 + len(fact.paraphrase_prompts))]
        locality = [ids[:-1] for ids, _ in _take(encoded, len(fact.neighborhood))]
        try:
            lm.check_rows([*(row.ids for row in rows), *locality])
        except ArgumentError as error:
            raise FactError(f"fact {number}: {error}") from error
        found.append(Example(fact, rows[0], tuple(rows[1:] or rows), tuple(locality)))
    return found


def _take(encoded: Iterator[tuple[list[int], int]], count: int) -> list[tuple[list[int], int]]:
    return [next(encoded) for _ in range(count)]


def draw(examples: Sequence[Example], index: int, texts: int, random: Random) -> Drawn:
    """What the edit of one example is trained on. Prompts of other facts stand in for locality texts it lacks."""
    example = examples[index]
    rephrasing = random.choice(example.rephrasings)
    if example.locality:
        return Drawn(example, rephrasing, tuple(random.choices(example.locality, k=texts)))
    others = [(index + random.randrange(1, len(examples))) % len(examples) for _ in range(texts)]
    return Drawn(example, rephrasing, tuple(examples[other].own.prompt for other in others))


class Draws:
    """The edits of each step of a training, each a function of the seed and the step's number alone.

    All facts are taken in an order of their own before any comes again.

    Args:
        examples: at least two.
        settings: `batch_size`, `locality_texts` and `seed` are read.
    """

    def __init__(self, examples: Sequence[Example], settings: EditorTrainingSettings) -> None:
        self._examples, self._settings = examples, settings
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def _shuffled(self, turn: int) -> list[int]:
        order = list(range(len(self._examples)))
        Random(f"order {self._settings.seed} {turn}").shuffle(order)
        return order

    def step(self, number: int) -> list[Drawn]:
        """The edits of a step, counted from 0."""
        size, drawn = self._settings.batch_size, []
        for position in range(number * size, (number + 1) * size):
            turn, place = divmod(position, len(self._examples))
            random = Random(f"draw {self._settings.seed} {position}")
            drawn.append(draw(self._examples, self._order(turn)[place], self._settings.locality_texts, random))
        return drawn


class EditorDataModule(LightningDataModule):
    """Gives a trainer the batches of separate edits on which a hyper-network is trained. An epoch ends at a validation.

    Args:
        examples: the facts; the last ones are held out for validation.
        settings: settings of the training.

    Attributes:
        training: the facts that are trained on.
        validation: those held out.

    Raises:
        FactError: fewer than two facts are left to train on.
    """

    def __init__(self, examples: Sequence[Example], settings: EditorTrainingSettings) -> None:
        super().__init__()
        held_out = settings.validation or min(_MOST_HELD_OUT, max(1, len(examples) // 10))
        if len(examples) - held_out < min(2, len(examples) - 1):
            raise FactError(
                f"facts: {len(examples)}, of which validation holds out {held_out}; give more facts, or hold out fewer"
            )
        self.settings = settings
        self.training, self.validation = list(examples[:-held_out]), list(examples[-held_out:])
        self.draws = Draws(self.training, settings)

    @property
    def epochs(self) -> int:
        """Validations after which training ends."""
        return -(-self.settings.steps // self.settings.validate_every)

    def train_dataloader(self) -> DataLoader[list[Drawn]]:
        return DataLoader(_Steps(self), batch_size=None)

    def val_dataloader(self) -> DataLoader[list[Drawn]]:
        return DataLoader(_HeldOut(self), batch_size=None)

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        """Return the batch itself, which holds lists."""
        return batch


class _Steps(IterableDataset[list[Drawn]]):
    """The steps of the present epoch."""

    def __init__(self, data: EditorDataModule) -> None:
        self.data = data

    def __iter__(self) -> Iterator[list[Drawn]]:
        assert self.data.trainer is not None
        settings = self.data.settings
        first = self.data.trainer.global_step
        for number in range(first, min(first + settings.validate_every, settings.steps)):
            yield self.data.draws.step(number)


class _HeldOut(IterableDataset[list[Drawn]]):
    """The held-out facts, in batches; each with the same rephrasing and locality texts every time."""

    def __init__(self, data: EditorDataModule) -> None:
        self.data = data

    def __iter__(self) -> Iterator[list[Drawn]]:
        settings, examples = self.data.settings, self.data.validation
        known = [*examples, *self.data.training[:1]]  # so that a single held-out fact finds another one's prompt
        for start in range(0, len(examples), settings.batch_size):
            yield [
                draw(known, index, settings.locality_texts, Random(f"validation {index}"))
                for index in range(start, min(start + settings.batch_size, len(examples)))
            ]
