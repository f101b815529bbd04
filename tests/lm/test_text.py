"""Text to tokens and back, and the checks before a model reads or writes text."""

import pytest
import torch
from tokenizers import processors
from transformers import GenerationConfig

from lightedit.errors import ArgumentError, UnsupportedModelError
from lightedit.lm import LanguageModel
from tests.chat import chat_tokenizer, turn
from tests.models import BOS, EOS, PAD, VOCABULARY, tiny_model, tiny_tokenizer

KINDS = ["bytelevel", "bytelevel-bos", "sentencepiece", "unigram"]


def language_model(model_type="llama", tokenizer=None) -> LanguageModel:
    return LanguageModel(tiny_model(model_type), tokenizer or chat_tokenizer(), name="tiny")


def appending(kind: str, *, begins: bool):
    """A tokenizer of `kind` that puts an end-of-text token after each text."""
    tokenizer = tiny_tokenizer.__wrapped__(kind)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if begins else "$A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    assert tokenizer("The")["input_ids"][-1] == EOS
    return tokenizer


def greedy(lm: LanguageModel, row: list[int], steps: int) -> list[int]:
    """The most probable tokens after a row, by full passes of the stock model."""
    new: list[int] = []
    for _ in range(steps):
        with torch.no_grad():
            logits = lm.model(input_ids=torch.tensor([[*row, *new]])).logits
        new.append(int(logits[0, -1].argmax()))
    return new


# Tokens


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_that_is_to_be_continued_ends_in_no_special_token(kind: str) -> None:
    plain = language_model(tokenizer=tiny_tokenizer(kind))
    begins = plain.encode(["The"])[0][0] == BOS
    ending = language_model(tokenizer=appending(kind, begins=begins))
    texts = ["The river rises", "Zoë in 東京"]
    assert ending.encode(texts) == plain.encode(texts)
    assert ending.complete(texts) == plain.complete(texts)
    assert ending.generate(texts, 5) == plain.generate(texts, 5)
    assert ending.encode([""]) == [[BOS] if begins else []]


def test_a_special_token_that_is_written_in_the_text_stays() -> None:
    assert language_model().encode(["a</s>"])[0][-1] == EOS
    assert language_model(tokenizer=appending("bytelevel", begins=False)).encode(["a</s>"])[0][-1] == EOS


def test_chat_encodes_the_users_turn_as_transformers_does() -> None:
    lm = language_model()
    assert lm.encode(["Who is it?", "Where?"], chat=True) == [turn(lm.tokenizer, t) for t in ("Who is it?", "Where?")]
    assert lm.encode([], chat=True) == []
    with pytest.raises(UnsupportedModelError, match="no chat template"):
        language_model(tokenizer=tiny_tokenizer("bytelevel")).encode(["Who?"], chat=True)


# Completion


def test_a_completion_is_the_greedy_text_alone() -> None:
    lm = language_model()
    (row,) = lm.encode(["The river rises"])
    new = greedy(lm, row, 6)
    assert lm.complete("The river rises", max_new_tokens=6) == lm.decode([*row, *new])[len(lm.decode(row)) :]
    texts = ["The river rises", "The capital of the city"]
    assert lm.complete(texts, max_new_tokens=6) == [lm.complete(text, max_new_tokens=6) for text in texts]
    assert lm.complete([]) == []


def test_a_completion_in_chat_answers_the_users_turn_and_ends_with_it() -> None:
    lm = language_model()
    row = turn(lm.tokenizer, "Who?")
    new = greedy(lm, row, 8)
    place = next(i for i, token in enumerate(new) if i and token not in new[:i] and token not in (PAD, BOS, EOS))
    assert lm.complete("Who?", chat=True, max_new_tokens=8) == lm.decode([*row, *new])[len(lm.decode(row)) :]
    # a template whose end of turn is the token at `place`, which ends no text
    end = lm.tokenizer.convert_ids_to_tokens(new[place])
    lm.tokenizer.add_special_tokens({"additional_special_tokens": [end]})
    lm.tokenizer.chat_template = lm.tokenizer.chat_template.replace("<pad>", end)
    row = turn(lm.tokenizer, "Who?")
    assert new[place] in row
    said = lm.generate(["Who?"], 40, chat=True)[0]
    assert new[place] not in said
    whole = lm.generate([row], 40, stop_at_end=False)[0]
    assert said == whole[: next((i for i, t in enumerate(whole) if t in (new[place], EOS)), 40)]


def test_sampled_completions_follow_the_seed() -> None:
    lm = language_model()
    drawn = {lm.complete("The river", top_k=20, seed=seed) for seed in range(4)}
    assert len(drawn) > 1
    assert lm.complete("The river", top_k=20, seed=2) == lm.complete("The river", top_k=20, seed=2)


def test_a_text_without_tokens_cannot_be_completed() -> None:
    with pytest.raises(ArgumentError, match="text: '' has no token to continue"):
        language_model(tokenizer=tiny_tokenizer("bytelevel")).complete("")


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.8},
        {"no_repeat_ngram_size": 1},
        {"num_beams": 3},
        {"forced_eos_token_id": 5},
        {"forced_bos_token_id": 5},
        {"min_new_tokens": 5},
        {"max_new_tokens": 2},
        {"do_sample": True, "temperature": 2.0},
        {"suppress_tokens": list(range(3, 200))},
        {"bad_words_ids": [[token] for token in range(3, 200)]},
        {"exponential_decay_length_penalty": (1, 5.0)},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_a_checkpoints_generation_config_changes_no_greedy_text(settings) -> None:
    lm, texts = language_model(), ["The river rises", "He was"]
    calls = [
        lambda: lm.generate(texts, 12, stop_at_end=False),
        lambda: lm.generate(texts, 12),
        lambda: lm.generate(texts, 12, top_k=1, seed=[0, 1]),  # by the rule that draws for each row
        lambda: lm.complete(texts, max_new_tokens=12),
        lambda: lm.complete(texts, chat=True, max_new_tokens=12),
    ]
    expected = [call() for call in calls]
    lm.model.generation_config = GenerationConfig(**settings)
    assert [call() for call in calls] == expected


# What a model cannot read


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "llama", "gptj", "falcon"])
def test_a_text_beyond_the_positions_is_refused_before_any_pass(model_type: str) -> None:
    lm = language_model(model_type)
    assert lm.positions == 256
    lm.forward = None  # type: ignore[method-assign, assignment]
    with pytest.raises(ArgumentError, match=r"'river river.*\.\.\.' has 257 tokens; tiny has 256 positions"):
        lm.generate([lm.encode(["river " * 300])[0][:257]], 1)
    for call in (lambda: lm.complete("river " * 300), lambda: lm.generate([[5] * 250], 20)):
        with pytest.raises(ArgumentError, match="256 positions"):
            call()


def test_the_last_new_token_needs_no_position() -> None:
    lm = language_model("gpt2")
    assert len(lm.generate([[5] * 250], 7, stop_at_end=False)[0]) == 7
    with pytest.raises(ArgumentError, match=r"250 tokens, with 8 new ones too many; .*ask for fewer new tokens"):
        lm.generate([[5] * 250], 8)


def test_a_model_without_a_limit_of_positions_reads_on() -> None:
    lm = language_model("bloom")
    assert lm.positions is None
    assert len(lm.generate([[5] * 300], 2, stop_at_end=False)[0]) == 2


def test_a_token_without_a_row_in_the_embedding_is_named() -> None:
    tokenizer = tiny_tokenizer.__wrapped__("bytelevel")
    tokenizer.add_tokens(["Zog"])
    lm = language_model(tokenizer=tokenizer)
    with pytest.raises(
        ArgumentError, match=r"the token 'Zog' \(id 384\) in 'The king Zog' has no row .* which has 384"
    ):
        lm.complete("The king Zog")
    lm.model.resize_token_embeddings(385)
    assert isinstance(LanguageModel(lm.model, tokenizer).complete("The king Zog"), str)


@pytest.mark.parametrize("special", [{"pad_token": "[PAD]"}, {"pad_token": "[PAD]", "eos_token": "[END]"}])
@pytest.mark.parametrize("model_type", ["gpt2", "gptj", "bloom"])
def test_padding_needs_no_row_for_the_tokenizers_padding_token(model_type: str, special: dict[str, str]) -> None:
    tokenizer = tiny_tokenizer.__wrapped__("bytelevel")
    tokenizer.add_special_tokens(special)
    assert tokenizer.pad_token_id >= VOCABULARY
    lm, plain = language_model(model_type, tokenizer), language_model(model_type, tiny_tokenizer("bytelevel"))
    texts = ["The", "The river rises in the hills"]
    assert lm.pad_id in (0, EOS)
    assert lm.generate(texts, 5, stop_at_end=False) == plain.generate(texts, 5, stop_at_end=False)


def test_half_a_character_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"'a\\ud83d' holds '\\ud83d', half of a character"):
        language_model().complete("a\ud83d")


def test_padding_leaves_answers_of_a_list_alone() -> None:
    lm = language_model("gpt2", chat_tokenizer("bytelevel"))
    texts = ["Who?", "Where is the city of the king and the museum?"]
    assert lm.complete(texts, chat=True) == [lm.complete(text, chat=True) for text in texts]
    assert torch.get_default_dtype() == torch.float32
