"""Tokens with shifted embeddings."""

import pytest
import torch

import lightedit as le
from lightedit.lm import Place
from lightedit.lm.batch import pad
from lightedit.lm.prefix import prefix_cache
from lightedit.lm.shifted import ShiftedTokens
from tests.models import ARCHITECTURES, tiny_model, tiny_tokenizer

ROW = [5, 9, 200, 17, 33]


def language_model(architecture: str) -> le.LanguageModel:
    return le.LanguageModel(tiny_model(architecture, layers=2), tiny_tokenizer("bytelevel"))


def noise(lm: le.LanguageModel, tokens: int) -> torch.Tensor:
    return torch.randn(tokens, lm.d_model, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_row_of_shifted_tokens_equals_one_with_shifts_added(architecture: str) -> None:
    lm = language_model(architecture)
    shifts, at = noise(lm, 2), (torch.tensor([0, 0]), torch.tensor([1, 2]))
    with lm.add_at(Place(0, "embedding"), shifts, at):
        expected = lm.forward(pad([ROW, ROW], lm.pad_id))
    tokens = ShiftedTokens(lm)
    new = tokens.add(ROW[1:3], shifts)
    with tokens.known():
        found = lm.forward(pad([[ROW[0], *new, *ROW[3:]], ROW], lm.pad_id))
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found[0], found[1])
    torch.testing.assert_close(lm.forward(pad([ROW], lm.pad_id)), expected[1:])  # behind the context nothing is left


@torch.no_grad()
def test_a_prefix_cache_keeps_rows_with_other_shifts_apart() -> None:
    lm = language_model("llama")
    tokens = ShiftedTokens(lm)
    rows = [[ROW[0], *tokens.add(ROW[1:3], scale * noise(lm, 2)), *ROW[3:]] for scale in (1.0, 2.0)] + [ROW]
    with tokens.known():
        expected = lm.forward(pad(rows, lm.pad_id))[:, -1]
        cache, _ = prefix_cache(lm, [row[:4] for row in rows])
        batch = pad([row[4:] for row in rows], lm.pad_id)
        batch = type(batch)(batch.ids, torch.ones(3, 5, dtype=torch.bool), batch.positions + 4)
        found = lm.forward(batch, cache)[:, -1]
    torch.testing.assert_close(found, expected)


def test_forgotten_tokens_are_unknown() -> None:
    lm = language_model("llama")
    tokens = ShiftedTokens(lm)
    (first,) = tokens.add([5], noise(lm, 1))
    tokens.clear()
    assert tokens.add([7], noise(lm, 1)) == [first]
    with pytest.raises(IndexError):  # outside of the context
        lm.forward(pad([[first]], lm.pad_id))
