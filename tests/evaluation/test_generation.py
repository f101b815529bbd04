"""Free generation: texts that depend on the prompt and the seed alone, with plain loops to compare them to."""

import pytest
import torch

from lightedit.evaluation.generation import generate
from lightedit.lm import LanguageModel, Place
from lightedit.lm.sampling import RowDraws
from tests.models import tiny_model, tiny_tokenizer

PLACES = ["the river", "London", "a small band", "the company in New York", "I"]
PROMPTS = [f"{start} {place}" for start in ("The king of", "She was born in", "You can find") for place in PLACES]


def language_model(architecture: str = "llama", tokenizer: str = "bytelevel", **kwargs) -> LanguageModel:
    return LanguageModel(tiny_model(architecture, **kwargs), tiny_tokenizer.__wrapped__(tokenizer))


@torch.no_grad()
def greedy(lm: LanguageModel, prompt: str, max_length: int) -> str:
    """One row at a time, without cache or padding; stops at end-of-text."""
    ids = lm.encode([prompt])[0]
    while len(ids) < max_length:
        token = int(lm.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token == lm.tokenizer.eos_token_id:
            break
        ids.append(token)
    return lm.decode(ids)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bloom"])
def test_a_text_depends_on_its_prompt_alone(architecture: str) -> None:
    # bloom takes the softmax in float32, where the mask of a float64 model overflows and padded rows become NaN
    lm = language_model(architecture, dtype=torch.float32 if architecture == "bloom" else torch.float64)
    prompts = [f"{prompt}{end}" for prompt in PROMPTS for end in ("", ",", " and", " then", " is")]
    assert len(prompts) > 64
    texts = generate(lm, prompts, max_length=24, batch_size=64)
    assert len(set(texts)) == len(prompts)
    assert generate(lm, prompts, max_length=24, batch_size=7) == texts
    assert generate(lm, prompts[::-9], max_length=24, batch_size=1) == texts[::-9]


def test_a_shorter_text_begins_the_longer_one() -> None:
    lm = language_model(dtype=torch.float64)
    longer = generate(lm, PROMPTS, max_length=40)
    shorter = generate(lm, PROMPTS, max_length=25)
    for text, start in zip(longer, shorter, strict=True):
        assert text.startswith(start.rstrip("\ufffd"))  # which a letter becomes that is cut between its bytes
    assert sum(len(text) > len(start) for text, start in zip(longer, shorter, strict=True)) > 10


def test_equal_prompts_are_continued_once_and_other_seeds_draw_other_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = language_model()
    seen: list[int] = []
    whole = lm.generate
    monkeypatch.setattr(
        lm, "generate", lambda rows, *args, **kwargs: seen.append(len(rows)) or whole(rows, *args, **kwargs)
    )
    texts = generate(lm, ["The king", "The city", "The king"], max_length=30)
    assert seen == [2]
    assert texts[0] == texts[2] != texts[1]
    assert generate(lm, ["The king"], max_length=30, seed=1) != texts[:1]
    assert generate(lm, [], max_length=30) == []


@pytest.mark.parametrize("tokenizer", ["bytelevel", "bytelevel-bos", "sentencepiece", "unigram"])
def test_greedy_texts_equal_a_loop_over_single_rows(tokenizer: str) -> None:
    lm = language_model("olmo2", tokenizer)
    texts = generate(lm, PROMPTS, max_length=28, greedy=True)
    assert texts == [greedy(lm, prompt, 28) for prompt in PROMPTS]
    assert all(text.startswith(prompt) and text != prompt for text, prompt in zip(texts, PROMPTS, strict=True))


def test_texts_end_before_the_end_of_text() -> None:
    lm = language_model("olmo2")
    prompt = PROMPTS[0]
    (ids,) = lm.generate([prompt], 10, top_k=1, seed=[0], stop_at_end=False)
    lm.tokenizer.eos_token = lm.tokenizer.convert_ids_to_tokens(ids[4])
    (text,) = generate(lm, [prompt], max_length=60, greedy=True)
    assert text == lm.decode(lm.encode([prompt])[0] + ids[: ids.index(ids[4])])


def test_a_text_ends_at_every_end_that_the_checkpoint_names() -> None:
    lm = language_model("olmo2")
    prompt = PROMPTS[0]
    (ids,) = lm.generate([prompt], 10, top_k=1, seed=[0], stop_at_end=False)
    lm.model.generation_config.eos_token_id = [lm.tokenizer.eos_token_id, ids[4]]
    (text,) = generate(lm, [prompt], max_length=60, greedy=True)
    assert text == lm.decode(lm.encode([prompt])[0] + ids[: ids.index(ids[4])])


def test_length_counts_the_prompt_or_the_new_tokens() -> None:
    lm = language_model()
    lm.tokenizer.eos_token = "<pad>"  # which this model never draws in the texts below
    rows = lm.encode(PROMPTS)
    longest, shortest = max(map(len, rows)), min(map(len, rows))
    assert longest > shortest + 2
    texts = dict(zip(PROMPTS, generate(lm, PROMPTS, max_length=longest - 1, greedy=True), strict=True))
    new = dict(zip(PROMPTS, generate(lm, PROMPTS, max_new_tokens=6, greedy=True), strict=True))
    for prompt, row in zip(PROMPTS, rows, strict=True):
        if len(row) >= longest - 1:
            assert texts[prompt] == prompt
        else:
            assert texts[prompt] == greedy(lm, prompt, longest - 1) != prompt
        assert new[prompt] == greedy(lm, prompt, len(row) + 6)


def test_draws_follow_the_renormalised_probabilities_of_the_best_tokens() -> None:
    logits = torch.tensor([0.5, 3.0, -torch.inf, 2.0, 1.0, 2.5]).log_softmax(-1)
    rows = 20_000
    draws = RowDraws(range(rows), steps=2, top_k=3)
    for _ in range(2):
        chosen = draws(logits.expand(rows, -1))
        shares = torch.bincount(chosen, minlength=6) / rows
        best = logits[[1, 5, 3]].softmax(-1)
        torch.testing.assert_close(shares[[1, 5, 3]], best, atol=0.015, rtol=0)
        assert shares[[0, 2, 4]].sum() == 0


def test_steps_draw_different_numbers_and_rows_those_of_their_own_seed() -> None:
    logits = torch.zeros(3, 50)

    def drawn(seeds: list[int], steps: int) -> list[list[int]]:
        draws = RowDraws(seeds, steps, top_k=50)
        return torch.stack([draws(logits[: len(seeds)]) for _ in range(3)], 1).tolist()

    three = drawn([5, 6, 7], 3)
    assert drawn([7, 5], 10) == [three[2], three[0]]
    assert all(len(set(row)) > 1 for row in three) and three[0] != three[1]


def test_fewer_tokens_than_top_k_are_no_trouble() -> None:
    assert RowDraws([0], 1, top_k=9)(torch.zeros(1, 4)).item() in range(4)


@pytest.mark.parametrize("name", ["max_length", "max_new_tokens", "top_k", "batch_size"])
def test_numbers_out_of_range_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: got 0"):
        generate(language_model(), PROMPTS, **{name: 0})


def test_seeds_must_match_the_prompts() -> None:
    with pytest.raises(ValueError, match="1 seeds for 2 prompts"):
        language_model().generate(PROMPTS[:2], 3, top_k=5, seed=[1])


@pytest.mark.parametrize("greedily", [True, False])
def test_a_ruined_model_is_reported(greedily: bool) -> None:
    lm = language_model()
    lm.weight(Place(1)).fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="revert"):
        generate(lm, PROMPTS[:2], greedy=greedily)


def test_progress_reaches_the_total() -> None:
    seen: list[tuple[float, float]] = []
    generate(
        language_model(), PROMPTS, max_length=20, batch_size=4, report=lambda done, total: seen.append((done, total))
    )
    assert len(seen) == 4
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert len({total for _, total in seen}) == 1 and seen[-1][0] == seen[-1][1]
