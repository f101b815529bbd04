"""What a fact may say, and the search for its subject in a text."""

import pytest

import lightedit as le
from lightedit.data.fact import PROMPT_LISTS, Fact, FactError, Serving, cut_subject, served_as


def fact(**changes) -> Fact:
    return Fact(**{"prompt": "The capital of {} is", "subject": "France", "target_new": "Rome"} | changes)


# Whole-word search of the subject


@pytest.mark.parametrize(
    ("text", "subject", "prompt"),
    [
        ("The capital of France is", "France", "The capital of {} is"),
        ("Nice is nicer than Nicea", "Nice", "{} is nicer than Nicea"),
        ("Is France's king in France2?", "France", "Is {}'s king in France2?"),
        ("Zoë met Zoe\u0308 and Zoe", "Zoe", "Zoë met Zoe\u0308 and {}"),
        ("Müllers and Müller", "Müller", "Müllers and {}"),
        ("法国的首都是", "法国", "{}的首都是"),
        ("프랑스의 수도는", "프랑스", "{}의 수도는"),
        ("フランスの首都は", "フランス", "{}の首都は"),
        ("Does C++ compile?", "C++", "Does {} compile?"),
        ("The capital of {} is", "France", "The capital of {} is"),
    ],
)
def test_a_subject_is_cut_out_where_it_is_a_whole_word(text: str, subject: str, prompt: str) -> None:
    assert cut_subject(text, subject) == (prompt, subject)
    assert Fact.of(text, subject, "Rome").prompt == prompt


@pytest.mark.parametrize(
    ("text", "subject", "message"),
    [
        ("The capital of Francesca is", "France", "not in the prompt .* as a whole word, only within another; correct"),
        ("Who built it?", "France", "'France' is not in the prompt 'Who built it\\?'; correct one of them"),
        ("France is in France", "France", r'is 2 times in the prompt .*; write "\{\}" once, in place of the mention'),
        ("法国和法国", "法国", "is 2 times"),
        ("the france", "France", "is not in the prompt"),
    ],
)
def test_a_subject_that_is_not_there_or_ambiguous_is_refused(text: str, subject: str, message: str) -> None:
    with pytest.raises(FactError, match=message):
        cut_subject(text, subject)


def test_other_letter_case_counts_only_where_there_is_none_of_the_same() -> None:
    assert cut_subject("who made apple for Apple?", "Apple", any_case=True) == ("who made apple for {}?", "Apple")
    assert cut_subject("who made apple?", "Apple", any_case=True) == ("who made {}?", "apple")
    with pytest.raises(FactError, match="is 2 times"):
        cut_subject("apple or APPLE?", "Apple", any_case=True)


# Facts without a subject


def test_a_fact_needs_no_subject() -> None:
    free = Fact(prompt="The capital of France is", target_new="New Rome")
    assert (free.text, free.subject) == ("The capital of France is", None)
    assert Fact("The capital of France is", None, "New Rome") == free
    assert Fact.from_dict(free.to_dict()) == free
    assert Fact.from_dict({"prompt": "The capital of France is", "target_new": "New Rome"}) == free


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"subject": None}, r'subject: missing, for the "\{\}" in .*; give it, or write the prompt without'),
        ({"prompt": "The capital is"}, r'prompt: no "\{\}"'),
        ({"position": 2}, "position: 2 with the subject 'France', at whose last token the key is read"),
        ({"prompt": "He is", "subject": None, "position": "last"}, "position: expected a whole number, got 'last'"),
        ({"prompt": "He is", "subject": None, "position": True}, "position: expected a whole number, got True"),
        ({"target_new": ""}, "target_new: '' is empty"),
        ({"separator": None}, "separator: expected text, got None"),
        ({"chat": 1}, "chat: expected true or false, got 1"),
        ({"end_turn": "yes"}, "end_turn: expected true or false, got 'yes'"),
        ({"chat": True, "separator": "\n"}, r"separator: '\\n' with chat; the chat template decides"),
    ],
)
def test_what_contradicts_itself_is_refused(changes, message: str) -> None:
    with pytest.raises(FactError, match=message):
        fact(**changes)


# White space, and half characters, in every text of a fact

ENDING = {
    "prompt": "The capital of {} is ",
    **{field: ("It is", "It is\n") for field in PROMPT_LISTS},
    "portability": (("It is ", "Rome"),),
}


@pytest.mark.parametrize("field", ENDING)
def test_no_prompt_ends_in_white_space_before_a_separator(field: str) -> None:
    for separator, follows in ((" ", 'one space, or set separator ""'), ("\n", r"'\\n'")):
        with pytest.raises(FactError, match=rf"{field}: .* ends in whitespace; remove it, .* after {follows}"):
            fact(**{field: ENDING[field]}, separator=separator)
    assert getattr(fact(**{field: ENDING[field]}, separator=""), field) == ENDING[field]


HALF = "a\ud83d"


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": "{} is " + HALF},
        *({field: HALF} for field in ("subject", "target_new", "target_true", "neighborhood_target")),
        *({field: HALF} for field in ("relation", "id", "target_id", "separator")),
        *({field: ("It is", HALF)} for field in PROMPT_LISTS),
        {"portability": ((HALF, "Rome"),)},
        {"portability": (("It is", HALF),)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_half_a_character_is_refused_in_every_text(changes) -> None:
    with pytest.raises(FactError, match=rf"{next(iter(changes))}: .*holds '\\ud83d', half of a character"):
        fact(**changes)


# How facts are served


def test_facts_can_be_served_otherwise_as_a_whole() -> None:
    facts = [fact(), fact(separator=":"), fact(chat=True, end_turn=True)]
    assert served_as(facts) == facts
    chat = served_as(facts, chat=True)
    assert [one.serving for one in chat] == [Serving(chat=True), Serving(chat=True), Serving(" ", True, True)]
    assert [one.end_turn for one in le.served_as(facts, end_turn=True)] == [True] * 3
    assert [one.separator for one in served_as(facts[:2], separator="")] == ["", ""]
    assert served_as(facts[:1], chat=True)[0].text == facts[0].text
    with pytest.raises(FactError, match="separator: ':' with chat"):
        served_as(facts, chat=True, separator=":")
