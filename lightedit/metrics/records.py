"""The scores and generated texts of one record, which the metrics read, and their form in files."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from lightedit.errors import ArgumentError

_KINDS = ("efficacy", "paraphrase", "neighborhood", "portability", "held_out")


@dataclass(frozen=True)
class PromptScores:
    """Scores of the n >= 1 prompts of one kind, each tensor [n].

    Attributes:
        nll: mean NLL per token of the wanted answer, in nats.
        nll_other: mean NLL per token of the competing answer, in nats; None if there is none.
        accuracy: share of the wanted answer's tokens that are the most probable ones, in [0, 1].
        predicted: for each prompt, the most probable token at the position of each of the wanted answer's tokens.
        unchanged: 1 where `predicted` is the same as before the edit, else 0; None if that is not known.
    """

    nll: Tensor
    nll_other: Tensor | None
    accuracy: Tensor
    predicted: tuple[tuple[int, ...], ...] = ()
    unchanged: Tensor | None = None

    def to_dict(self) -> dict[str, Any]:
        """All fields that are not None, ready for JSON. The key of `nll` is "nll_wanted"."""
        fields: dict[str, Any] = {
            "nll_wanted": self.nll.tolist(),
            "accuracy": self.accuracy.tolist(),
            "predicted": [list(tokens) for tokens in self.predicted],
        }
        optional = {"nll_other": self.nll_other, "unchanged": self.unchanged}
        return fields | {name: values.tolist() for name, values in optional.items() if values is not None}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`, to the bit: tensors are float64. Other fields are ignored.

        Raises:
            LookupError, TypeError, ValueError: a field is missing or invalid.
        """

        def tensor(name: str) -> Tensor:
            return torch.tensor(fields[name], dtype=torch.float64)

        return cls(
            nll=tensor("nll_wanted"),
            nll_other=tensor("nll_other") if "nll_other" in fields else None,
            accuracy=tensor("accuracy"),
            predicted=tuple(map(tuple, fields["predicted"])),
            unchanged=tensor("unchanged") if "unchanged" in fields else None,
        )


@dataclass(frozen=True)
class Generations:
    """The generated texts of one fact.

    Attributes:
        texts: n >= 1 texts sampled from the fact's generation prompts, prompts included.
        continuation: greedy continuation of the fact's own prompt, without that prompt.
        target: the new target, with which the continuation should begin.
        reference_score: TF-IDF cosine between the joined texts and the reference texts; None without references.
        own_references: whether the references are self-generated text of the unedited model.
    """

    texts: tuple[str, ...]
    continuation: str
    target: str
    reference_score: float | None = None
    own_references: bool = False

    def to_dict(self) -> dict[str, Any]:
        """All known fields, ready for JSON. The keys of texts and target are "generations" and "target_new"."""
        fields: dict[str, Any] = {
            "target_new": self.target,
            "generations": list(self.texts),
            "continuation": self.continuation,
        }
        if self.reference_score is not None:
            fields |= {"reference_score": self.reference_score, "own_references": self.own_references}
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`. Other fields are ignored.

        Raises:
            LookupError, TypeError: a field is missing or invalid.
        """
        return cls(
            texts=tuple(fields["generations"]),
            continuation=fields["continuation"],
            target=fields["target_new"],
            reference_score=fields.get("reference_score"),
            own_references=fields.get("own_references", False),
        )


@dataclass(frozen=True)
class RecordScores:
    """The scores of one fact by kind of prompt, and its generations.

    The wanted answer is the new target for `efficacy` and `paraphrase`, and the true target for `neighborhood`. For
    `portability` it is the answer that follows from the new target. A held-out fact is never edited. It has only
    `held_out`, the scores of its right answer.

    >>> one = PromptScores(torch.tensor([0.5]).double(), None, torch.tensor([1.0]).double(), ((7,),))
    >>> RecordScores(efficacy=one).to_dict()
    {'efficacy': {'nll_wanted': [0.5], 'accuracy': [1.0], 'predicted': [[7]]}}
    """

    efficacy: PromptScores | None = None
    paraphrase: PromptScores | None = None
    neighborhood: PromptScores | None = None
    generations: Generations | None = None
    portability: PromptScores | None = None
    held_out: PromptScores | None = None

    def to_dict(self) -> dict[str, Any]:
        """All fields that are not None, ready for JSON: scores by kind of prompt, and the fields of the generations.

        A record of a saved evaluation holds these fields among others.
        """
        scores: dict[str, PromptScores | None] = {kind: getattr(self, kind) for kind in _KINDS}
        found = {kind: of_kind.to_dict() for kind, of_kind in scores.items() if of_kind is not None}
        return found if self.generations is None else found | self.generations.to_dict()

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`, to the bit: numbers are float64. Other fields are ignored.

        Raises:
            LookupError, TypeError, ValueError: there are no scores, or a field is missing or invalid.
        """
        scores = {kind: PromptScores.from_dict(fields[kind]) for kind in _KINDS if kind in fields}
        if not scores:
            raise ArgumentError(f"no scores: expected one of {', '.join(_KINDS)}")
        return cls(**scores, generations=Generations.from_dict(fields) if "generations" in fields else None)
