"""Scores as files hold them: they come back to the bit."""

import json
from typing import Any

import pytest
import torch

from lightedit.metrics import Generations, PromptScores, RecordScores

THIRD = torch.tensor([1 / 3, 2.0], dtype=torch.float64)
FULL = PromptScores(THIRD, THIRD / 7, THIRD / 11, ((5, 7), (9,)), torch.tensor([1.0, 0.0], dtype=torch.float64))
BARE = PromptScores(THIRD, None, THIRD)


def values(scores: Any) -> Any:
    """All fields, tensors as their bits, so that records can be compared."""
    if isinstance(scores, torch.Tensor):
        return scores.dtype, scores.view(torch.int64).tolist()
    return {name: values(value) for name, value in vars(scores).items()} if hasattr(scores, "__dict__") else scores


@pytest.mark.parametrize(
    "record",
    [
        RecordScores(FULL, BARE, FULL, Generations((" a", "b"), " Rome", "Rome", 0.1, True), BARE),
        RecordScores(BARE, generations=Generations(("a",), "", "Rome")),
        RecordScores(held_out=BARE),
    ],
)
def test_a_record_comes_back_from_json_as_it_was(record: RecordScores) -> None:
    fields = json.loads(json.dumps(record.to_dict() | {"subject": "passed over"}))
    assert values(RecordScores.from_dict(fields)) == values(record)


@pytest.mark.parametrize("fields", [{}, [], {"efficacy": {}}, {"efficacy": {"nll_wanted": [1.0]}}, {"efficacy": 1}])
def test_fields_that_hold_no_scores_are_refused(fields: Any) -> None:
    with pytest.raises((LookupError, TypeError, ValueError)):
        RecordScores.from_dict(fields)
