import csv
from collections import Counter
from importlib.resources import files

import pytest

from lightedit.data.builtin import builtin_facts
from lightedit.data.facts import check_facts, read_facts, write_facts

COLUMNS = ["country", "capital", "currency", "language", "continent", "landmarks"]
LANDMARK_PROMPT = " is located in the city of"


@pytest.fixture(scope="module")
def facts():
    return builtin_facts()


@pytest.fixture(scope="module")
def table():
    """Cells of the shipped table by subject (the country without its article)."""
    with files("lightedit.data").joinpath("countries.tsv").open(encoding="utf-8") as file:
        header, *rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
    assert header == COLUMNS
    return {row[0].removeprefix("the "): dict(zip(COLUMNS, row, strict=True)) for row in rows}


def test_the_table_is_complete_sorted_and_clean(table):
    assert len(table) == 195
    assert len({row["country"] for row in table.values()}) == 195
    for row in table.values():
        for cell in row.values():
            parts = cell.split(";") if cell else []
            assert all(part and part == part.strip() for part in parts), row
            assert len(set(parts)) == len(parts), row
        assert set(row["continent"].split(";")) <= {
            "",
            "Africa",
            "Asia",
            "Europe",
            "North America",
            "South America",
            "Oceania",
        }
        assert not row["landmarks"] or (row["capital"] and 2 <= len(row["landmarks"].split(";")) <= 4), row


def test_there_are_facts_of_every_relation_and_no_text_twice(facts):
    assert len(facts) >= 600
    assert set(Counter(fact.relation for fact in facts)) == {"capital", "currency", "language", "continent"}
    check_facts(facts)


def test_every_answer_in_the_table_is_a_fact(facts, table):
    expected = {
        f"builtin/{column}/{subject}": row[column].split(";")[0]
        for subject, row in table.items()
        for column in ("capital", "currency", "language", "continent")
        if row[column]
    }
    assert {fact.id: fact.target_true for fact in facts} == expected


def test_facts_are_the_same_on_every_call(facts):
    assert builtin_facts() == facts


def test_new_targets_do_not_change_between_processes(facts):
    """Pinned, so that results obtained with the built-in facts stay comparable."""
    by_id = {fact.id: fact for fact in facts}
    assert by_id["builtin/capital/France"].target_new == "Jakarta"
    assert by_id["builtin/language/Brazil"].target_new == "Greek"
    assert by_id["builtin/currency/Japan"].target_new == "won"
    assert by_id["builtin/continent/Netherlands"].target_new == "South America"


def test_no_new_target_is_right_for_its_country(facts, table):
    for fact in facts:
        right = {answer for cell in table[fact.subject].values() for answer in cell.split(";")}
        assert fact.target_new not in right, fact


def test_new_targets_spread_over_the_values_of_their_relation(facts):
    for relation, values, most in [
        ("capital", 50, 0.1),
        ("currency", 40, 0.1),
        ("language", 40, 0.1),
        ("continent", 6, 0.3),
    ]:
        counts = Counter(fact.target_new for fact in facts if fact.relation == relation)
        assert len(counts) >= values
        assert max(counts.values()) <= most * counts.total()


def test_new_capitals_are_well_known_ones(facts, table):
    known = {row["capital"].split(";")[0] for row in table.values() if row["landmarks"]}
    assert {fact.target_new for fact in facts if fact.relation == "capital"} <= known


def test_neighborhood_prompts_are_about_others_and_have_the_same_true_answer(facts, table):
    true_answers = {fact.text: fact.target_true for fact in facts}
    capital_of = {
        landmark: row["capital"].split(";")[0] for row in table.values() for landmark in row["landmarks"].split(";")
    }
    checked = 0
    for fact in facts:
        assert len(set(fact.neighborhood_prompts)) == len(fact.neighborhood_prompts) <= 5
        for prompt in fact.neighborhood_prompts:
            assert fact.subject.casefold() not in prompt.casefold()
            if fact.relation == "capital":
                answer = capital_of[prompt.removesuffix(LANDMARK_PROMPT)]
                assert answer.casefold() not in prompt.casefold()
            else:
                answer = true_answers[prompt]
            assert answer == fact.target_true, (fact, prompt)
            checked += 1
    assert checked > 1500


def test_no_landmark_stands_in_two_capitals(table):
    landmarks = [part for row in table.values() if row["landmarks"] for part in row["landmarks"].split(";")]
    assert len(set(landmarks)) == len(landmarks)


def test_neighbors_are_not_always_the_same_ones(facts):
    for relation, answer in [("continent", "Africa"), ("language", "English"), ("currency", "euro")]:
        group = [fact for fact in facts if fact.relation == relation and fact.target_true == answer]
        counts = Counter(prompt for fact in group for prompt in fact.neighborhood_prompts)
        assert len(counts) >= 0.8 * len(group)
        assert max(counts.values()) <= len(group) / 2


def test_every_fact_has_two_paraphrases_that_name_its_country(facts, table):
    for fact in facts:
        assert len(set(fact.paraphrase_prompts) - {fact.text}) >= 2
        assert all(fact.subject in prompt for prompt in fact.paraphrase_prompts)


def test_countries_with_an_article_read_as_english(facts):
    by_id = {fact.id: fact for fact in facts}
    capital = by_id["builtin/capital/Netherlands"]
    assert capital.prompt == "The capital of the {} is"
    assert capital.paraphrase_prompts[1] == "The government of the Netherlands sits in its capital city,"
    assert by_id["builtin/continent/Netherlands"].text == "The Netherlands is a country in the continent of"
    assert by_id["builtin/continent/France"].text == "France is a country in the continent of"


def test_facts_survive_a_round_trip_through_a_file(facts, tmp_path):
    write_facts(tmp_path / "builtin.jsonl", facts)
    assert read_facts(tmp_path / "builtin.jsonl") == facts
