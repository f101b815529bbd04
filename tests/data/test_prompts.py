"""From facts to token ids: the subject's last token, the target's tokens, and contexts."""

from dataclasses import replace

import pytest
import torch
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from benchmarks.published import subject_last
from lightedit.data.facts import Fact, FactError
from lightedit.data.prompts import (
    Contexts,
    ContextSettings,
    subject_positions,
    tokenize_facts,
)
from lightedit.data.served import encode_targets
from lightedit.lm import LanguageModel, Place
from lightedit.lm.changes import LowRankUpdate
from tests.models import BOS, EOS, tiny_model, tiny_tokenizer

KINDS = ["bytelevel", "bytelevel-bos", "sentencepiece", "unigram"]
SUBJECTS = ["France", "Danielle Darrieux", "Zoë Müller", "Zoe\u0308", "東京", "Saint-Denis (93)", "🗼"]
PROMPTS = ["{} is owned by", "The mother tongue of {} is", "The capital of {}", "It is said that {}'s city is", "{}"]
CONTEXTS = Contexts(("{}", "The river is long. {}", "東京 {}"), (0.5, 0.25, 0.25))


def ending_with_eos(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer of `kind` that also appends an end-of-text token, as some do."""
    tokenizer = tiny_tokenizer.__wrapped__(kind)
    begins = tokenizer("The")["input_ids"][0] == BOS
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if begins else "$A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    assert tokenizer("The")["input_ids"][-1] == EOS
    return tokenizer


def language_model() -> LanguageModel:
    return LanguageModel(tiny_model("gpt2"), tiny_tokenizer("bytelevel"))


# The subject's last token


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_tokens_up_to_the_subjects_last_spell_all_of_it_and_no_fewer_do(kind: str, prompt: str) -> None:
    tokenizer = tiny_tokenizer(kind)
    for subject in SUBJECTS:
        if kind == "unigram" and "{}'" in prompt and subject[-1] not in "er":
            continue  # the unigram model gives neighbouring characters without a piece of their own one common offset
        before, text = prompt.partition("{}")[0] + subject, prompt.replace("{}", subject)
        start = len(before) - len(subject)
        ((ids, position, first),) = subject_positions(tokenizer, [text], [(start, len(before))])
        assert ids == tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids[: position + 1], skip_special_tokens=True).startswith(before)
        assert not tokenizer.decode(ids[:position], skip_special_tokens=True).startswith(before)
        assert not tokenizer.decode(ids[:first], skip_special_tokens=True).startswith(text[: start + 1])
        assert tokenizer.decode(ids[: first + 1], skip_special_tokens=True).startswith(text[:start])
        assert position == subject_last(tokenizer, prompt.partition("{}")[0], subject, text)


@pytest.mark.parametrize("kind", KINDS)
def test_a_possessive_after_the_subject_is_not_part_of_it(kind: str) -> None:
    tokenizer = tiny_tokenizer(kind)
    ((ids, position, _),) = subject_positions(tokenizer, ["France's capital"], [(0, len("France"))])
    assert tokenizer.decode(ids[: position + 1], skip_special_tokens=True) == "France"


def test_a_token_that_reaches_beyond_the_subject_holds_its_last_character() -> None:
    tokenizer = tiny_tokenizer("bytelevel")
    assert tokenizer.tokenize("The capital of") == ["The", "Ġcapital", "Ġof"]
    assert subject_positions(tokenizer, ["The capital of"], [(0, len("The cap"))])[0][1] == 1


def test_a_subject_that_no_token_holds_is_an_error() -> None:
    def first_two_tokens(texts, **arguments):
        return tiny_tokenizer.__wrapped__("bytelevel")(texts, truncation=True, max_length=2, **arguments)

    with pytest.raises(FactError, match=r"no token of .* holds the subject's last character 'e'"):
        subject_positions(first_two_tokens, ["The capital of France"], [(15, len("The capital of France"))])


# Targets


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", ["Rome", "Spain and Italy", "Zoë", "東京", "1985.", "(the) sea", "O'Brien"])
def test_a_targets_tokens_spell_it_and_the_others_the_prompt(kind: str, target: str) -> None:
    tokenizer = tiny_tokenizer(kind)
    prompts = ["The capital of France is", "Zoë lives in 東京", "X"]
    for prompt, (ids, count) in zip(prompts, encode_targets(tokenizer, prompts, [target] * len(prompts)), strict=True):
        assert ids == tokenizer(f"{prompt} {target}")["input_ids"]
        assert tokenizer.decode(ids[-count:], skip_special_tokens=True).strip() == target
        assert tokenizer.decode(ids[:-count], skip_special_tokens=True) == prompt


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_at_the_end_do_not_count_to_the_target(kind: str) -> None:
    plain, ending = tiny_tokenizer(kind), ending_with_eos(kind)
    prompts, targets = ["The capital of France is", "Zoë lives in"], ["Rome", "東京"]
    assert encode_targets(ending, prompts, targets) == encode_targets(plain, prompts, targets)
    facts = [Fact("The capital of {}", "France", "Rome"), Fact("{}", "Zoë", "東京")]
    assert tokenize_facts(ending, facts, CONTEXTS) == tokenize_facts(plain, facts, CONTEXTS)


def test_a_target_with_unknown_tokens_is_an_error() -> None:
    tokenizer = tiny_tokenizer.__wrapped__("bytelevel")
    tokenizer.unk_token = "Ġcapital"
    assert len(encode_targets(tokenizer, ["The"], ["river"])) == 1
    with pytest.raises(FactError, match="target 'capital' after 'The': the tokenizer cannot spell it; use other words"):
        encode_targets(tokenizer, ["The"], ["capital"])


def test_no_prompts_give_no_targets() -> None:
    assert encode_targets(tiny_tokenizer("bytelevel"), [], []) == []


# Whole facts


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_of_a_fact_predicts_the_target_and_ends_its_subject(kind: str) -> None:
    tokenizer = tiny_tokenizer(kind)
    facts = [Fact(prompt, subject, "Spain and Italy") for prompt in PROMPTS for subject in SUBJECTS]
    for fact, prompts in zip(facts, tokenize_facts(tokenizer, facts, CONTEXTS), strict=True):
        assert prompts.fact is fact
        for template, row in zip(CONTEXTS.templates, prompts.rows, strict=True):
            prompt = template.replace("{}", fact.text)
            before = template.partition("{}")[0] + fact.prompt.partition("{}")[0]
            whole = [*row.ids, row.targets[-1]]
            assert whole == tokenizer(f"{prompt} {fact.target_new}")["input_ids"]
            assert whole[-len(row.targets) :] == row.targets
            assert tokenizer.decode(row.targets).strip() == fact.target_new
            assert row.lookup == subject_last(tokenizer, before, fact.subject, prompt)
        text = f"{fact.subject} is a"
        assert prompts.subject.lookup == subject_last(tokenizer, "", fact.subject, text)
        assert prompts.subject.ids == tokenizer(text)["input_ids"][: prompts.subject.lookup + 1]
        assert prompts.subject.targets == []


def test_the_subject_stands_where_the_prompt_says_even_if_the_context_names_it_too() -> None:
    tokenizer = tiny_tokenizer("bytelevel")
    contexts = Contexts(("{}", "France and Paris. {}"), (0.5, 0.5))
    (prompts,) = tokenize_facts(tokenizer, [Fact("Paris or Rome: {} is", "Paris", "a city")], contexts)
    for row, template in zip(prompts.rows, contexts.templates, strict=True):
        end = template.replace("{}", "Paris or Rome: Paris")
        assert tokenizer.decode(row.ids[: row.lookup + 1]) == end


# Contexts


@pytest.mark.parametrize(
    ("templates", "weights"),
    [
        ((), ()),
        (("I see. {}",), (1.0,)),
        (("{}", "no slot"), (0.5, 0.5)),
        (("{}", "{} and {}"), (0.5, 0.5)),
        (("{}", "I see. {}"), (1.0,)),
        (("{}", "I see. {}"), (0.5, 0.6)),
    ],
)
def test_contexts_start_bare_hold_one_slot_each_and_are_weighed(templates, weights) -> None:
    with pytest.raises(ValueError, match="contexts"):
        Contexts(templates, weights)


def test_sampling_contexts_follows_the_seed() -> None:
    lm, settings = language_model(), ContextSettings()
    first = settings.sample(lm)
    assert settings.sample(language_model()) == first
    assert replace(settings, seed=100).sample(lm).templates != first.templates


def test_contexts_of_an_unedited_model_are_sampled_once_and_those_of_an_edited_one_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lm, settings = language_model(), ContextSettings(prefixes=(("The", 2, 10), ("", 1, 10)))
    first = settings.sample(lm)
    torch.manual_seed(0)
    size = lm.weight(Place(1)).shape
    lm.weights.add(("x", 0), Place(1), LowRankUpdate(torch.randn(size[0], 4), torch.randn(size[1], 4)))
    edited = settings.sample(lm)
    assert edited.templates != first.templates
    lm.weights.remove([("x", 0)])
    monkeypatch.setattr(lm, "generate", lambda *_, **__: pytest.fail("sampled again"))
    assert settings.sample(lm) == first
    with pytest.raises(pytest.fail.Exception, match="sampled again"):
        replace(settings, seed=1).sample(lm)


@pytest.mark.parametrize("bare_weight", [0.5, 0.2, None])
@pytest.mark.parametrize("prefixes", [(), (("The", 1, 6),), (("", 3, 5), ("", 2, 8)), (("I", 0, 5),)])
def test_weights_of_sampled_contexts_sum_to_one_with_the_bare_one_first(prefixes, bare_weight: float | None) -> None:
    contexts = ContextSettings(prefixes=prefixes, bare_weight=bare_weight).sample(language_model())
    count = 1 + sum(count for _, count, _ in prefixes)
    assert len(contexts.templates) == len(contexts.key_weights) == count
    assert sum(contexts.key_weights) == pytest.approx(1, abs=1e-12)
    assert contexts.key_weights[0] == pytest.approx(1.0 if count == 1 else bare_weight or 1 / count)
    assert len(set(contexts.key_weights[1:])) <= 1


def test_sampled_prefixes_begin_as_told_and_keep_to_their_length() -> None:
    """A weak bound in tokens, since a text's tokens need not be those that were sampled."""
    lm = language_model()
    contexts = ContextSettings(prefixes=(("The river", 3, 10), ("", 3, 4))).sample(lm)
    assert all(template.startswith("The river") for template in contexts.templates[1:4])
    assert all(template.endswith(". {}") for template in contexts.templates[1:])
    assert all(len(lm.encode([template.removesuffix(". {}")])[0]) <= 4 * 4 for template in contexts.templates[4:])


def test_lines_with_the_same_start_give_different_contexts() -> None:
    contexts = ContextSettings(prefixes=(("The", 1, 10), ("The", 1, 10))).sample(language_model())
    assert len(set(contexts.templates)) == 3


def test_braces_that_the_model_writes_do_not_become_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = language_model()
    monkeypatch.setattr(lm, "generate", lambda prompts, *_, **__: lm.encode([" {x} {}"] * len(prompts)))
    contexts = ContextSettings(prefixes=(("The", 1, 5),)).sample(lm)
    assert contexts.templates[1].startswith("The")
    assert contexts.templates[1].replace("{}", "", 1).count("{") == 0


def test_an_empty_start_means_the_text_start_token(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = language_model()
    begun = []

    def generate(prompts, new, **_):
        begun.append((prompts, new))
        return [[60] for _ in prompts]

    monkeypatch.setattr(lm, "generate", generate)
    ContextSettings(prefixes=(("", 2, 5),)).sample(lm)
    assert begun == [([[BOS], [BOS]], 4)]
