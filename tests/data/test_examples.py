"""Readers of examples: claims, texts with labels and dates, zsRE questions, and KnowledgeEditor's form."""

import json
import os
from datetime import date
from pathlib import Path
from typing import Any

import pytest

import lightedit as le
from lightedit.data.examples import relabelled, shortened, with_unrelated
from tests.kinds import other_model

CLAIM = {"id": 7, "claim": "Rome is in Italy.", "label": "supports"}
QUESTION = {
    "subject": "Clutch Hitter", "src": "What is the publisher of Clutch Hitter?", "pred": "Viking Press",
    "rephrase": "What's the publisher of Clutch Hitter?", "alt": "Cinematronics", "answers": ["Sega"],
    "loc": "nq question: where is the brain", "loc_ans": "in the head",
    "cond": "Viking Press >> Cinematronics || What is the publisher of Clutch Hitter?",
}  # fmt: skip


def written(path: Path, records: list[Any]) -> Path:
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def test_claims_are_read_with_their_label(tmp_path: Path) -> None:
    (example,) = le.read_examples(written(tmp_path / "claims.json", [CLAIM]))
    assert example == le.Example("Rome is in Italy.", "supports", id="7")
    fact = example.fact("refutes")
    assert (fact.text, fact.target_new, fact.target_true, fact.id) == (
        "Rome is in Italy.",
        "refutes",
        "supports",
        "7",
    )


def test_texts_are_read_from_json_lines_and_csv_alike(tmp_path: Path) -> None:
    lines = tmp_path / "texts.jsonl"
    rows = [("The court, below, erred.", 3, "1991-05-20"), ("It is so ordered.", 8, "2009")]
    lines.write_text("".join(json.dumps(dict(zip(("text", "label", "date"), r, strict=True))) + "\n" for r in rows))
    table = tmp_path / "texts.csv"
    table.write_text('text,label,date\n"The court, below, erred.",3,1991-05-20\nIt is so ordered.,8,2009\n')
    expected = [
        le.Example("The court, below, erred.", "3", date=date(1991, 5, 20)),
        le.Example("It is so ordered.", "8", date=date(2009, 1, 1)),
    ]
    assert le.read_examples(lines) == le.read_examples(table) == expected
    assert le.read_examples(lines, limit=1) == expected[:1]


def test_questions_are_read_with_rephrasing_locality_and_condition(tmp_path: Path) -> None:
    (example,) = le.read_examples(written(tmp_path / "zsre.json", [QUESTION]))
    assert (example.answer, example.alternative, example.subject) == ("Sega", "Cinematronics", "Clutch Hitter")
    assert example.condition == QUESTION["cond"] and example.rephrasings == (QUESTION["rephrase"],)
    assert example.unrelated == ((QUESTION["loc"], "in the head"),)
    fact = example.fact(example.alternative)
    assert fact.target_new == "Cinematronics" and fact.target_true == "Sega" and fact.subject is None
    assert fact.neighborhood == example.unrelated and fact.paraphrase_prompts == example.rephrasings


def test_knowledge_editors_own_form_is_read(tmp_path: Path) -> None:
    record = {
        "id": 5, "input": "Rome is old.", "output": [{"answer": "SUPPORTS"}], "prediction": "SUPPORTS",
        "alternatives": ["REFUTES"], "filtered_rephrases": ["Rome is ancient.", "Old is Rome."],
    }  # fmt: skip
    (example,) = le.read_examples(written(tmp_path / "fever.json", [record]))
    assert (example.text, example.answer, example.alternative) == ("Rome is old.", "SUPPORTS", "REFUTES")
    assert example.rephrasings == ("Rome is ancient.", "Old is Rome.")


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([CLAIM, {"claim": "Rome", "id": 1}], r"record 2: label: missing"),
        ([CLAIM, {"claim": 4, "label": "refutes"}], r"record 2: claim: expected text, got 4"),
        ([CLAIM, ["Rome"]], r"record 2: expected an object with fields, got a list"),
        ([{"text": "a", "label": "b", "date": "May"}], r"record 1: date: 'May' is no date; write it as 2009-05-31"),
        ([{"text": "a {} b", "label": "b"}], r'record 1: subject: missing, for the "{}"'),
        (
            [{"sentence": "Rome"}],
            r"record 1: no form of examples has the fields sentence; known are claims: claim, label",
        ),
        ([], "holds no examples"),
    ],
)
def test_a_record_that_cannot_be_read_is_named_with_its_field(tmp_path: Path, records: list[Any], message: str) -> None:
    path = written(tmp_path / "examples.json", records)
    with pytest.raises(le.FactError, match=message) as error:
        le.read_examples(path)
    assert str(path) in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file at"):
        le.read_examples(tmp_path / "none.json")


def test_every_other_example_is_unrelated() -> None:
    examples = [le.Example("a", "x"), le.Example("b", "y"), le.Example("c", "x")]
    assert with_unrelated(examples[:2], examples)[0].unrelated == (("b", "y"), ("c", "x"))


def test_labels_shift_from_a_day_on() -> None:
    years = (2003, 2001, 2002, 2004)
    stream = [le.Example(f"text {year}", "ab"[year % 2], date=date(year, 1, 1)) for year in years]
    shifted = relabelled(stream, {"a": "b"}, date(2002, 6, 1))
    assert [(one.text, one.answer) for one in shifted] == [
        ("text 2001", "b"), ("text 2002", "a"), ("text 2003", "b"), ("text 2004", "b"),
    ]  # fmt: skip
    halfway = relabelled(stream, {"a": "b", "b": "a"})
    assert [one.answer for one in halfway] == ["b", "a", "a", "b"]
    undated = [le.Example(letter, letter) for letter in "abab"]
    assert [one.answer for one in relabelled(undated, {"a": "b"})] == ["a", "b", "b", "b"]
    for wrong, labels, since, message in (
        (stream, {"a": "c"}, None, "'c' is no class of the examples; they have a, b"),
        (stream, {"a": "b"}, date(2000, 1, 1), "leaves 0 examples before and 4 after"),
        ([*stream, undated[0]], {"a": "b"}, None, "1 examples have no date, first 'a'"),
        (undated, {"a": "b"}, date(2000, 1, 1), "4 examples have no date"),
    ):
        with pytest.raises(le.FactError, match=message):
            relabelled(wrong, labels, since)


def test_claims_and_texts_with_labels_are_facts(tmp_path: Path) -> None:
    claims = le.read_facts(written(tmp_path / "claims.json", [CLAIM]))
    texts = le.read_facts(written(tmp_path / "texts.json", [{"text": "It is so ordered.", "label": 3, "date": "2009"}]))
    assert claims == [le.read_examples(tmp_path / "claims.json")[0].fact()]
    assert (texts[0].text, texts[0].subject, texts[0].target_new) == ("It is so ordered.", None, "3")


def test_long_texts_are_cut_to_the_models_positions() -> None:
    lm = other_model("bert")
    long = le.Example("The river rises in the hills to the north of the city and " * 30, "supports")
    short = le.Example("Rome", "refutes")
    cut, same = shortened(lm, [long, short])
    assert same == short and long.text.startswith(cut.text)
    (row,) = lm.encode([cut.text])
    assert lm.positions is not None and lm.positions - 3 <= len(row) <= lm.positions
    assert shortened(other_model("t5"), [long]) == [long]


@pytest.mark.skipif("LIGHTEDIT_DATA" not in os.environ, reason="LIGHTEDIT_DATA names no folder of data sets")
def test_whole_data_sets_are_read() -> None:
    folder = Path(os.environ["LIGHTEDIT_DATA"])
    claims = le.read_examples(folder / "feverous_claims.json")
    assert len(claims) == 2562 and {claim.answer for claim in claims} == {"supports", "refutes"}
    questions = le.read_examples(folder / "zsre_ke.json")
    assert len(questions) == 2358 and all(q.rephrasings and q.unrelated and q.condition for q in questions)
