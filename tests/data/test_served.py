"""Prompts and targets as they reach the model: separators, chat templates, ends of turns, facts without a subject."""

import warnings

import pytest

from lightedit.data.fact import Fact, FactError, Serving
from lightedit.data.prompts import Contexts, check_facts_fit, tokenize_facts
from lightedit.data.served import encode_targets
from lightedit.errors import UnsupportedModelError
from lightedit.lm import LanguageModel
from tests.chat import TEMPLATE, chat_tokenizer, turn
from tests.models import BOS, EOS, PAD, tiny_model, tiny_tokenizer

KINDS = ["bytelevel", "bytelevel-bos", "sentencepiece", "unigram"]
CONTEXTS = Contexts(("{}", "The river is long. {}"), (0.5, 0.5))
CHAT = Serving(chat=True)


def encoded(tokenizer, prompt, target, *serving, **named):
    """Token ids of the prompt, and of the target."""
    ((ids, count),) = encode_targets(tokenizer, [prompt], [target], [Serving(*serving, **named)])
    return ids[:-count], ids[-count:]


# Separators


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("prompt", "target"),
    [('The city is called "', "Rome"), ("The city costs $", "42"), ("首都是", "東京"), ("The answer: ", "Rome")],
)
def test_without_a_separator_the_target_follows_the_tokens_that_the_prompt_has_alone(kind, prompt, target) -> None:
    tokenizer = tiny_tokenizer(kind)
    before, spelled = encoded(tokenizer, prompt, target, "")
    assert before == tokenizer(prompt)["input_ids"]
    alone = tokenizer.decode(before, skip_special_tokens=True)
    assert tokenizer.decode([*before, *spelled], skip_special_tokens=True) == alone + target


def test_no_token_holds_the_end_of_a_prompt_and_the_start_of_its_target() -> None:
    tokenizer = tiny_tokenizer("bytelevel")
    assert tokenizer.tokenize("The capital") == ["The", "Ġcapital"]
    before, spelled = encoded(tokenizer, "The cap", "ital", "")
    assert before == tokenizer("The cap")["input_ids"]
    assert tokenizer.decode(spelled) == "ital"


@pytest.mark.parametrize("kind", KINDS)
def test_a_separator_belongs_to_what_the_model_is_to_say(kind: str) -> None:
    tokenizer = tiny_tokenizer(kind)
    before, spelled = encoded(tokenizer, "The answer is", "Rome", ":\n")
    assert before == tokenizer("The answer is")["input_ids"]
    alone = tokenizer.decode(before, skip_special_tokens=True)
    assert tokenizer.decode([*before, *spelled], skip_special_tokens=True) == f"{alone}:\nRome"


def test_pairs_served_in_several_ways_keep_their_order() -> None:
    tokenizer = chat_tokenizer()
    servings = [Serving(), CHAT, Serving(""), CHAT, Serving()]
    prompts = ["The river", "Who?", "Is ", "Where?", "He was"]
    found = encode_targets(tokenizer, prompts, ["Rome"] * 5, servings)
    for prompt, serving, pair in zip(prompts, servings, found, strict=True):
        assert [pair] == encode_targets(tokenizer, [prompt], ["Rome"], [serving])


# Chat templates and ends of turns


@pytest.mark.parametrize("kind", KINDS)
def test_in_chat_a_prompt_is_the_users_turn_as_transformers_renders_it(kind: str) -> None:
    tokenizer = chat_tokenizer(kind)
    before, spelled = encoded(tokenizer, "Where is Rome?", "Spain and Italy", chat=True)
    assert before == turn(tokenizer, "Where is Rome?")
    assert before.count(BOS) == 3  # those of the template, and none of the tokenizer
    assert tokenizer.decode(spelled) == "Spain and Italy"


@pytest.mark.parametrize("kind", KINDS)
def test_in_chat_the_token_that_ends_the_turn_belongs_to_the_target_if_asked_for(kind: str) -> None:
    tokenizer = chat_tokenizer(kind)
    before, spelled = encoded(tokenizer, "Where is Rome?", "Italy", chat=True, end_turn=True)
    whole = turn(tokenizer, "Where is Rome?", "Italy")
    assert [*before, *spelled] == whole[: len(before) + len(spelled)]
    assert spelled[-1] == PAD and tokenizer.decode(spelled[:-1]) == "Italy"


def test_outside_of_chat_the_end_of_text_ends_a_turn() -> None:
    tokenizer = tiny_tokenizer("bytelevel")
    before, spelled = encoded(tokenizer, "Rome is in", "Italy", end_turn=True)
    plain = encoded(tokenizer, "Rome is in", "Italy")
    assert (before, spelled) == (plain[0], [*plain[1], EOS])


def test_what_a_model_cannot_serve_is_refused_in_words() -> None:
    with pytest.raises(UnsupportedModelError, match="no chat template, so it serves no chat; leave chat out"):
        encode_targets(tiny_tokenizer("bytelevel"), ["Who?"], ["Ada"], [CHAT])
    trims = chat_tokenizer(template=TEMPLATE.replace("message['content']", "message['content'] | upper"))
    with pytest.raises(UnsupportedModelError, match="0 times"):
        encode_targets(trims, ["Who?"], ["Ada"], [CHAT])
    trims = chat_tokenizer(template=TEMPLATE.replace("message['content']", "message['content'] | trim"))
    assert encoded(trims, "Who?", "Ada", chat=True)[0] == turn(trims, "Who?")
    with pytest.raises(FactError, match="the chat template changes the text ' Who\\?'; remove white space"):
        encode_targets(trims, [" Who?"], ["Ada"], [CHAT])
    endless = chat_tokenizer(template=TEMPLATE.replace("<pad>", ""))
    endless.chat_template = endless.chat_template.replace("<s>{{", "{{")
    with pytest.raises(FactError, match="end_turn: the model's chat template ends an answer with no end token"):
        encode_targets(endless, ["Who?"], ["Ada"], [Serving(chat=True, end_turn=True)])
    broken = chat_tokenizer(template="{{ raise_exception('only pairs') }}")
    with pytest.raises(UnsupportedModelError, match=r"cannot render a turn of the user .*only pairs"):
        encode_targets(broken, ["Who?"], ["Ada"], [CHAT])
    endless = tiny_tokenizer.__wrapped__("bytelevel")
    endless.eos_token = None
    with pytest.raises(FactError, match="end_turn: the model's tokenizer has no end token; leave end_turn out"):
        encode_targets(endless, ["He is"], ["Ada"], [Serving(end_turn=True)])


# Whole facts


@pytest.mark.parametrize("kind", KINDS)
def test_in_chat_contexts_and_the_kl_prompt_stand_in_the_users_turn(kind: str) -> None:
    tokenizer = chat_tokenizer(kind)
    fact = Fact("Where does {} live?", "Zoë Müller", "Rome", chat=True, end_turn=True)
    (prompts,) = tokenize_facts(tokenizer, [fact], CONTEXTS)
    for template, row in zip(CONTEXTS.templates, prompts.rows, strict=True):
        text = template.replace("{}", fact.text)
        whole = [*row.ids, row.targets[-1]]
        assert whole[: -len(row.targets)] == turn(tokenizer, text)
        assert whole[-len(row.targets) :] == row.targets and row.targets[-1] == PAD
        said = tokenizer.decode(row.ids[: row.lookup + 1])
        assert said.endswith(template.replace("{}", "Where does Zoë Müller"))
        assert not tokenizer.decode(row.ids[: row.lookup]).endswith("Müller")
    kl = turn(tokenizer, "Zoë Müller is a")
    assert prompts.subject.ids == kl[: len(prompts.subject.ids)]
    assert prompts.subject.lookup == len(prompts.subject.ids) - 1
    assert tokenizer.decode(prompts.subject.ids).endswith("user\nZoë Müller")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chat", [False, True])
def test_the_key_of_a_fact_without_subject_is_at_the_last_token_before_the_target(kind: str, chat: bool) -> None:
    tokenizer = chat_tokenizer(kind)
    fact = Fact("The king of the city is", target_new="New Rome", chat=chat)
    (prompts,) = tokenize_facts(tokenizer, [fact], CONTEXTS)
    for row in prompts.rows:
        assert row.lookup == len(row.ids) - len(row.targets)
    bare = turn(tokenizer, fact.text) if chat else tokenizer(fact.text)["input_ids"]
    assert prompts.rows[0].ids[: prompts.rows[0].lookup + 1] == bare
    # the KL term is read behind the target: at the key's token, which predicts the target, it would oppose it
    whole = [*prompts.rows[0].ids, prompts.rows[0].targets[-1]]
    assert (prompts.subject.ids, prompts.subject.lookup, prompts.subject.targets) == (whole, len(bare) - 1, [])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("position", "words"), [(1, "The of"), (-2, "The of the"), (0, "The")])
def test_or_at_a_given_position_among_the_prompts_tokens(kind: str, position: int, words: str) -> None:
    tokenizer = tiny_tokenizer(kind)
    fact = Fact("The of the is", target_new="New Rome", position=position)
    assert len(tokenizer.tokenize(fact.text)) == 4
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (prompts,) = tokenize_facts(tokenizer, [fact], CONTEXTS)
    for template, row in zip(CONTEXTS.templates, prompts.rows, strict=True):
        said = tokenizer.decode(row.ids[: row.lookup + 1], skip_special_tokens=True)
        assert said == template.replace("{}", words)
    assert tokenizer.decode(prompts.subject.ids, skip_special_tokens=True) == words


def test_a_position_beyond_the_prompt_names_those_that_there_are() -> None:
    tokenizer = tiny_tokenizer("bytelevel-bos")
    for position in (2, -3):
        fact = Fact("The of", target_new="Ann", position=position)
        with pytest.raises(FactError, match=rf"position: {position} in 'The of', which has 2 tokens.* from -2 to 1"):
            tokenize_facts(tokenizer, [fact], CONTEXTS)


def test_a_subject_that_is_the_first_token_of_all_is_warned_of_once() -> None:
    facts = [Fact("{} is in", name, "Italy") for name in ("The", "Spain", "I")]
    with pytest.warns(
        UserWarning, match=r"'The is in', 'I is in' is read .* first token .* put words before the subject"
    ) as w:
        tokenize_facts(tiny_tokenizer("bytelevel"), facts, CONTEXTS)
    assert len(w) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenize_facts(tiny_tokenizer("bytelevel-bos"), facts, CONTEXTS)  # a text-start token is the first one
        tokenize_facts(chat_tokenizer("bytelevel"), [Fact("{} is", "I", "Ada", chat=True)], CONTEXTS)
        tokenize_facts(tiny_tokenizer("bytelevel"), [Fact("The {} is in", "I", "Italy")], CONTEXTS)


# Texts that a model cannot run

LONG = "The river rises in the hills to the north of the city. " * 40


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "llama"])
def test_a_fact_beyond_the_models_positions_is_named_with_its_length_and_the_limit(model_type: str) -> None:
    lm = LanguageModel(tiny_model(model_type), tiny_tokenizer("bytelevel"), name="tiny")
    short = Fact("The capital of {}", "France", "Rome")
    check_facts_fit(lm, [short])
    for long in (Fact(LONG + "The capital of {}", "France", "Rome"), Fact("The capital of {}", "France", LONG.strip())):
        with pytest.raises(FactError, match=r"fact 1: 'The .*\.\.\.' has \d+ tokens; tiny has 256 positions"):
            check_facts_fit(lm, [short, long])


def test_a_token_without_a_row_in_the_embedding_is_named() -> None:
    tokenizer = tiny_tokenizer.__wrapped__("bytelevel")
    tokenizer.add_tokens(["Zog"])
    lm = LanguageModel(tiny_model("llama"), tokenizer, name="tiny")
    with pytest.raises(FactError, match=r"fact 0: the token 'Zog' \(id 384\) .* embedding of tiny, which has 384"):
        check_facts_fit(lm, [Fact("The king of {} is", "Zog", "old")])
