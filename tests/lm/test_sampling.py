"""Writing on token by token: the loop against transformers' own, and against loops without a cache."""

import pytest
import torch

from lightedit.data.texts import write_texts
from lightedit.lm import LanguageModel
from lightedit.lm.batch import pad
from lightedit.lm.rowwise import RowwiseEdits
from lightedit.lm.sampling import before_end
from tests.models import tiny_model, tiny_tokenizer

ROWS = [[5, 60, 70], [9, 33], [200, 210, 220, 230, 240], [7]]


def language_model(architecture: str) -> LanguageModel:
    return LanguageModel(tiny_model(architecture, layers=2), tiny_tokenizer("bytelevel"))


@pytest.mark.parametrize("architecture", ["gpt2", "mistral", "gemma2", "bloom", "opt"])
def test_one_seed_for_all_draws_what_transformers_draws(architecture: str) -> None:
    lm = language_model(architecture)
    order = sorted(range(len(ROWS)), key=lambda row: -len(ROWS[row]))
    batch = pad([ROWS[row] for row in order], lm.pad_id, left=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        output = lm.model.generate(
            input_ids=batch.ids, attention_mask=batch.mask.long(), max_new_tokens=12, do_sample=True, top_k=5,
            top_p=1.0, temperature=1.0, pad_token_id=lm.pad_id, eos_token_id=None,
        )  # fmt: skip
    found = lm.generate(ROWS, 12, top_k=5, seed=3, stop_at_end=False)
    assert [found[row] for row in order] == output[:, batch.ids.shape[1] :].tolist()


@torch.no_grad()
def test_own_text_equals_a_loop_without_cache() -> None:
    lm, generator = language_model("llama"), torch.Generator().manual_seed(4)
    ids = torch.full((3, 1), lm.text_start)
    while ids.shape[1] < 12:
        best = lm.model(input_ids=ids, use_cache=False).logits[:, -1].topk(7)
        drawn = torch.multinomial(best.values.softmax(-1), 1, generator=generator)
        ids = torch.cat([ids, best.indices.gather(1, drawn)], 1)
    assert write_texts(lm, 36, 12, seed=4, top_k=7, progress_bar=False) == ids.tolist()


def test_rows_end_at_their_first_end_and_no_step_is_asked_for_after_the_last() -> None:
    steps = iter([torch.tensor([5, 2]), torch.tensor([9, 6]), torch.tensor([2, 9])])
    assert before_end(steps, 3, [2, 9]) == [[5], []]
    assert next(steps).tolist() == [2, 9]


def test_no_tokens_cannot_be_asked_for() -> None:
    with pytest.raises(ValueError, match="max_new_tokens: got 0"):
        language_model("gpt2").generate(ROWS, 0)


def test_no_edits_are_rows_without_updates() -> None:
    none = RowwiseEdits.none(3)
    assert none.updates == {} and none.of_row.tolist() == [0, 0, 0]
    assert none.rows([2, 1]).of_row.tolist() == [0, 0]
