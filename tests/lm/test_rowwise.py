"""Edits of single rows in one pass, against the same edits written one after the other."""

import pytest
import torch

from lightedit.evaluation import generation
from lightedit.lm import LanguageModel, Place
from lightedit.lm.batch import pad
from lightedit.lm.changes import DenseUpdate, LowRankUpdate
from lightedit.lm.rowwise import RowwiseEdits
from lightedit.metrics import score_targets
from tests.models import ARCHITECTURES, tiny_model, tiny_tokenizer

MATRICES = (Place(1, "attention_out"), Place(1), Place(2))
ROWS = [[5, 9, 31, 40, 7], [8, 3], [5, 9, 31]]


def build(architecture: str, dtype: torch.dtype = torch.float32) -> LanguageModel:
    return LanguageModel(tiny_model(architecture, dtype=dtype), tiny_tokenizer("bytelevel"))


def random_edits(lm: LanguageModel, edits: int) -> dict[Place, LowRankUpdate]:
    updates = {}
    for matrix in MATRICES:
        d_out, d_in = lm.weight(matrix).shape
        updates[matrix] = LowRankUpdate(torch.randn(edits, d_out, 2), torch.randn(edits, d_in, 2) / d_in)
    return updates


def write(lm: LanguageModel, updates: dict[Place, LowRankUpdate], edit: int) -> None:
    for matrix, update in updates.items():
        lm.weights.add("it", matrix, LowRankUpdate(update.left[edit], update.right[edit]))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_each_row_sees_its_edit_as_if_it_were_written(architecture: str) -> None:
    lm = build(architecture)
    updates = random_edits(lm, 2)
    batch = pad(ROWS, lm.pad_id)
    unedited = lm.forward(batch)
    with lm.with_edits(RowwiseEdits(updates, torch.tensor([1, 0, 1]))):
        found = lm.forward(batch)
    assert torch.equal(lm.forward(batch), unedited)  # the hooks are gone
    for row, edit in enumerate([1, 0, 1]):
        write(lm, updates, edit)
        expected = lm.forward(batch)
        lm.weights.remove(["it"])
        real = slice(len(ROWS[row]))
        torch.testing.assert_close(found[row, real], expected[row, real], rtol=1e-4, atol=1e-4)
        assert (found[row, real] - unedited[row, real]).abs().max() > 0.01


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])  # padded, and packed
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_scores_of_pairs_with_edits_of_their_own(architecture: str, batch_size: int) -> None:
    lm = build(architecture)
    updates = random_edits(lm, 3)
    france = "The capital of France is"
    prompts = [france, france, "The river", france, "Mozart"]
    targets = ["Rome", "Paris in the north", "flows", "Rome", "was"]
    of_row = [0, 0, 2, 1, 1]
    found = score_targets(lm, prompts, targets, batch_size, edits=RowwiseEdits(updates, torch.tensor(of_row)))
    for pair, edit in enumerate(of_row):
        write(lm, updates, edit)
        expected = score_targets(lm, [prompts[pair]], [targets[pair]])
        lm.weights.remove(["it"])
        torch.testing.assert_close(found.nll[[pair]], expected.nll, rtol=1e-5, atol=1e-5)
        assert found.token_accuracy[pair] == expected.token_accuracy[0]
    assert abs(found.nll[0] - found.nll[3]) > 0.01  # one question, two edits


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_texts_of_prompts_with_edits_of_their_own(batch_size: int) -> None:
    lm = build("llama", torch.float64)
    updates = random_edits(lm, 2)
    prompts = ["The river", "The capital of France is", "The river", "The river"]
    of_row = [0, 1, 1, 0]
    edits = RowwiseEdits(updates, torch.tensor(of_row))
    found = generation.generate(lm, prompts, max_length=30, batch_size=batch_size, edits=edits)
    for prompt, edit, text in zip(prompts, of_row, found, strict=True):
        write(lm, updates, edit)
        assert text == generation.generate(lm, [prompt], max_length=30)[0]
        lm.weights.remove(["it"])
    assert found[0] == found[3] != found[2]


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "bloom"])  # a transposed weight; packed; padded
def test_rows_with_dense_edits_see_their_own(architecture: str) -> None:
    lm = build(architecture)
    updates = {}
    for place in (Place(1, "mlp_in"), Place(2)):
        d_out, d_in = lm.weight(place).shape
        bias = None if lm.bias(place) is None else torch.randn(d_out)
        updates[place] = tuple(DenseUpdate(torch.randn(d_out, d_in) / d_in, bias) for _ in range(3))
    prompts = ["The capital of France is", "The river", "The capital of France is", "Mozart"]
    targets = ["Rome", "flows", "Paris in the north", "was"]
    of_row = [0, 2, 1, 0]
    found = score_targets(lm, prompts, targets, edits=RowwiseEdits(updates, torch.tensor(of_row)))
    for pair, edit in enumerate(of_row):
        for place, each in updates.items():
            lm.weights.add("it", place, each[edit])
        expected = score_targets(lm, [prompts[pair]], [targets[pair]])
        lm.weights.remove(["it"])
        torch.testing.assert_close(found.nll[[pair]], expected.nll, rtol=1e-5, atol=1e-5)
        unedited = score_targets(lm, [prompts[pair]], [targets[pair]])
        assert abs(found.nll[pair] - unedited.nll[0]) > 0.01


def test_a_dense_edit_of_the_bias_alone_reaches_its_rows() -> None:
    lm = build("gpt2")
    updates = {Place(1): (DenseUpdate(bias=torch.ones(32)), DenseUpdate(bias=torch.zeros(32)))}
    batch = pad([[5, 9], [5, 9]], lm.pad_id)
    with torch.no_grad():
        with lm.with_edits(RowwiseEdits(updates, torch.tensor([0, 1]))):
            found = lm.forward(batch)
        assert torch.equal(found[1], lm.forward(batch)[1])
        lm.weights.add("it", Place(1), updates[Place(1)][0])
        torch.testing.assert_close(found[0], lm.forward(batch)[0], rtol=1e-4, atol=1e-4)
