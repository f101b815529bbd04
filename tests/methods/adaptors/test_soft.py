"""Defer and Memory: what they mix in training, and what they decide afterwards."""

from dataclasses import replace

import pytest
import torch

import lightedit as le
from lightedit.lm.place import Place
from lightedit.methods.adaptors.defer import GatedPrediction
from lightedit.methods.adaptors.memory import SoftMemory
from tests.models import tiny_model, tiny_tokenizer
from tests.runs import FACTS as LONG
from tests.runs import run

PLACE = Place(1, "mlp")
FACTS = [replace(fact, target_new=new) for fact, new in zip(LONG, ("the", "of", "and", "in", "to"), strict=True)]
QUERIES = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
OUTPUTS = torch.tensor([[5.0, 5.0, 5.0], [6.0, 6.0, 6.0]])


@pytest.fixture
def lm() -> le.LanguageModel:
    return le.LanguageModel(tiny_model("gpt2"), tiny_tokenizer("bytelevel"))


def test_the_gate_is_soft_in_training_and_hard_afterwards() -> None:
    gate = GatedPrediction(torch.tensor([2.0, -2.0]), torch.zeros(1), torch.ones(3, 2), torch.zeros(3))
    share = torch.sigmoid(torch.tensor(2.0))
    mixed = gate.mixed(QUERIES, OUTPUTS[:, None])
    torch.testing.assert_close(mixed[0, 0], (share + (1 - share) * 5).expand(3))
    torch.testing.assert_close(mixed[1, 0], ((1 - share) + share * 6).expand(3))
    acts, values = gate.decide(QUERIES, OUTPUTS)
    assert acts.tolist() == [True, False] and values[0].tolist() == [1.0, 1.0, 1.0]


def test_a_memory_keeps_the_output_where_its_share_is_above_one_half() -> None:
    memory = SoftMemory(torch.tensor([[3.0, -3.0]]), torch.zeros(1), torch.ones(1, 3), torch.zeros(1))
    share = torch.sigmoid(torch.tensor(3.0))  # of the value, for the first query
    acts, values = memory.decide(QUERIES, OUTPUTS)
    assert acts.tolist() == [True, False]
    torch.testing.assert_close(values[0], (share + (1 - share) * 5).expand(3))
    torch.testing.assert_close(memory.mixed(QUERIES, OUTPUTS[:, None])[:, 0], values)


def test_a_fresh_memory_gives_the_output_one_half_and_the_published_one_nothing() -> None:
    for published, own in ((False, 0.5), (True, 0.0)):
        fresh = le.Memory(layer=1, published=published).fresh(2, 3, "last")
        still = replace(fresh, keys=torch.zeros(100, 2), bias=torch.zeros(100), values=torch.zeros(100, 3))
        torch.testing.assert_close(still.mixed(QUERIES, OUTPUTS[:, None])[:, 0], own * OUTPUTS)


@pytest.mark.parametrize("method", [le.Defer(layer=1, steps=60), le.Memory(layer=1, steps=60, entries=20)])
def test_it_learns_its_facts_and_a_later_round_goes_on_from_the_earlier_one(lm, method: le.Method) -> None:
    edit = run(lm, FACTS[:2], method, outcomes=True)
    assert edit.held, edit
    edit.revert(lm)
    edit = run(lm, FACTS[:2], method, facts_per_round=1)
    first, second = (changes[PLACE] for changes in edit.rounds)
    norms = {name: float((part - first.tensors()[name]).norm()) for name, part in second.parameters().items()}
    assert max(norms.values()) > 1e-3
    ran = lm.weights.adaptor(PLACE, edit.id)
    assert all(torch.equal(part, ran.tensors()[name]) for name, part in second.tensors().items())


def test_entries_are_at_least_one() -> None:
    with pytest.raises(le.LightEditError, match="entries must be at least 1"):
        le.Memory(layer=1, entries=0)
