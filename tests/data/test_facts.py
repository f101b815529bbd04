import json
import os

import pytest

from lightedit.data.facts import Fact, FactError, check_facts, distinct_facts, read_facts, write_facts

COUNTERFACT = {
    "case_id": 7,
    "pararel_idx": 1,
    "requested_rewrite": {
        "prompt": "The tower in {} was built by",
        "relation_id": "P1",
        "target_new": {"str": "Ada", "id": "Q1"},
        "target_true": {"str": "Bo", "id": "Q2"},
        "subject": "Avo",
    },
    "paraphrase_prompts": ["Avo's tower is by"],
    "neighborhood_prompts": ["The tower in Ume was built by", "The tower in Ost was built by"],
    "attribute_prompts": ["The mill in Ryd was built by"],
    "generation_prompts": ["Avo's tower"],
}
FLAT = {
    "case_id": 3,
    "subject": "Avo",
    "prompt": "The tower in Avo near Avoca was built by",
    "target_new": "Ada",
    "ground_truth": "Bo",
    "locality_prompt": "The tower in Ume was built by",
    "locality_ground_truth": "Cy",
}
ZSRE = {
    "subject": "Avo Tower",
    "src": "Who built Avo Tower?",
    "pred": "Cy",
    "rephrase": "Avo Tower was built by whom?",
    "alt": "Dee",
    "answers": ["Ada", "Ada Lund"],
    "loc": "nq question: who built the mill",
    "loc_ans": "Eva",
    "cond": "",
}
OWN = {"prompt": "The tower in {} was built by", "subject": "Avo", "target_new": "Ada"}
OTHER = OWN | {"subject": "Ume"}
EXAMPLES = {"counterfact": COUNTERFACT, "easyedit": FLAT, "zsre": ZSRE, "fact": OWN}


def _fact(**changes):
    return Fact(**{**OWN, **changes})


def _json(tmp_path, content, name="facts.json"):
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def _without(record, field):
    return {name: value for name, value in record.items() if name != field}


def test_text_fills_in_the_subject_and_leaves_other_braces_alone():
    assert _fact(prompt="In {0} the set {x} of {} is", subject="{y}").text == "In {0} the set {x} of {y} is"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "The tower was built by"}, r"prompt: no \"\{\}\" in 'The tower was built by'"),
        ({"prompt": "{} and {} were built by"}, r"prompt: 2 times \"\{\}\""),
        ({"prompt": "{} was built by "}, r"prompt: '\{\} was built by ' ends in whitespace"),
        ({"prompt": "{} was built by\n"}, "prompt: .* ends in whitespace"),
        ({"prompt": 3}, "prompt: expected text, got 3"),
        ({"subject": ""}, "subject: '' is empty"),
        ({"subject": "  "}, "subject: '  ' is empty"),
        ({"subject": "Avo "}, "subject: 'Avo ' begins or ends with whitespace"),
        ({"target_new": ""}, "target_new: '' is empty"),
        ({"target_new": " Ada"}, "target_new: ' Ada' begins or ends with whitespace"),
        ({"target_new": None}, "target_new: expected text, got None"),
        ({"target_true": "Bo "}, "target_true: 'Bo ' begins or ends with whitespace"),
        ({"target_true": "ADA"}, "target_new: 'Ada' is the target_true 'ADA' already"),
        ({"target_true": 1}, "target_true: expected text, got 1"),
        ({"neighborhood_target": " Cy"}, "neighborhood_target: ' Cy' begins or ends with whitespace"),
        (
            {"neighborhood_prompts": ["a", "b"], "neighborhood_answers": ["c"]},
            "neighborhood_answers: 1 for 2 prompts; give each one, or neighborhood_target",
        ),
        (
            {"neighborhood_prompts": ["a"], "neighborhood_answers": ["c"], "neighborhood_target": "d"},
            "neighborhood_answers: 1 for 1 prompts; give each one, or neighborhood_target",
        ),
        (
            {"neighborhood_prompts": ["a"], "neighborhood_answers": ["c "]},
            "neighborhood_answers: the answer 'c ' begins or ends",
        ),
        ({"relation": 4}, "relation: expected text, got 4"),
        ({"id": 4}, "id: expected text, got 4"),
        (
            {"paraphrase_prompts": "Avo's tower"},
            'paraphrase_prompts: expected a list of texts, got "Avo\'s tower"',
        ),
        ({"neighborhood_prompts": None}, "neighborhood_prompts: expected a list of texts, got None"),
        ({"attribute_prompts": ["a", 1]}, "attribute_prompts: expected text, got 1"),
        ({"generation_prompts": [""]}, "generation_prompts: '' is empty"),
        ({"target_id": 4}, "target_id: expected text, got 4"),
        ({"portability": "Who?"}, r"portability: expected a list of \[text, answer\], got 'Who\?'"),
        ({"portability": ["Who?"]}, r"portability: expected \[text, answer\], got 'Who\?'"),
        ({"portability": [["Who?", "Ada", "Bo"]]}, r"portability: expected \[text, answer\], got \['Who"),
        ({"portability": [["Who?", 3]]}, "portability: expected text, got 3"),
        ({"portability": [["Who?", " Ada"]]}, "portability: the answer ' Ada' begins or ends with whitespace"),
    ],
)
def test_an_invalid_field_is_rejected_by_name_and_value(changes, message):
    with pytest.raises(FactError, match=message):
        _fact(**changes)


def test_lists_of_prompts_become_tuples_so_that_facts_can_be_hashed():
    fact = _fact(paraphrase_prompts=["a", "b"], portability=[["c", "d"]])
    assert fact.paraphrase_prompts == ("a", "b") and fact.portability == (("c", "d"),)
    assert fact in {fact}


def test_from_dict_undoes_to_dict_through_json():
    fact = _fact(
        target_true="Bo",
        paraphrase_prompts=("a",),
        neighborhood_prompts=("b", "c"),
        neighborhood_target="Cy",
        attribute_prompts=("d",),
        generation_prompts=("e",),
        relation="P1",
        id="7",
        target_id="Q1",
        portability=(("f", "g"), ("h", "i")),
    )
    assert Fact.from_dict(json.loads(json.dumps(fact.to_dict()))) == fact


def test_from_dict_rejects_unknown_and_missing_fields_by_name():
    with pytest.raises(FactError, match="paraphrases: unknown field; known are prompt, subject"):
        Fact.from_dict({**OWN, "paraphrases": []})
    with pytest.raises(FactError, match="subject: missing"):
        Fact.from_dict(_without(OWN, "subject"))


def test_counterfact_records_keep_all_their_fields(tmp_path):
    assert read_facts(_json(tmp_path, [COUNTERFACT])) == [
        Fact(
            prompt="The tower in {} was built by",
            subject="Avo",
            target_new="Ada",
            target_true="Bo",
            paraphrase_prompts=("Avo's tower is by",),
            neighborhood_prompts=("The tower in Ume was built by", "The tower in Ost was built by"),
            attribute_prompts=("The mill in Ryd was built by",),
            generation_prompts=("Avo's tower",),
            relation="P1",
            id="7",
            target_id="Q1",
        )
    ]


def test_counterfact_records_may_have_a_question_of_portability_or_lack_ids(tmp_path):
    asked = {"Recalled Relation": "(Ada, born in, Lund)", "New Question": "Where was it? ", "New Answer": "Lund"}
    bare = {**COUNTERFACT["requested_rewrite"], "target_new": {"str": "Ada"}}
    records = [{**COUNTERFACT, "portability": asked}, {**COUNTERFACT, "requested_rewrite": bare | {"subject": "Ume"}}]
    with_question, without_id = read_facts(_json(tmp_path, records))
    assert with_question.portability == (("Where was it?", "Lund"),)
    assert without_id.portability == () and without_id.target_id is None
    with pytest.raises(FactError, match=r"record 1: portability\.New Answer: missing"):
        read_facts(_json(tmp_path, [{**COUNTERFACT, "portability": _without(asked, "New Answer")}]))


def test_flat_records_may_have_a_paraphrase(tmp_path):
    plain, rephrased = read_facts(
        _json(tmp_path, [FLAT, FLAT | {"rephrase_prompt": "Avo's tower is by ", "target_new": "Eva"}])
    )
    assert plain.paraphrase_prompts == () and rephrased.paraphrase_prompts == ("Avo's tower is by",)


def test_flat_records_cut_the_subject_out_of_the_prompt_where_it_is_a_whole_word(tmp_path):
    (fact,) = read_facts(_json(tmp_path, [FLAT]))
    assert fact.prompt == "The tower in {} near Avoca was built by"
    assert fact.text == FLAT["prompt"]
    assert (fact.target_new, fact.target_true, fact.id) == ("Ada", "Bo", "3")
    assert fact.neighborhood_prompts == ("The tower in Ume was built by",)
    assert fact.neighborhood_target == "Cy"


def test_zsre_records_take_the_first_answer_and_not_the_alternative(tmp_path):
    assert read_facts(_json(tmp_path, [ZSRE])) == [
        Fact(
            prompt="Who built {}?",
            subject="Avo Tower",
            target_new="Ada",
            paraphrase_prompts=("Avo Tower was built by whom?",),
            neighborhood_prompts=("nq question: who built the mill?",),
            neighborhood_target="Eva",
            id="0",
        )
    ]


def test_zsre_locality_questions_get_one_question_mark(tmp_path):
    (fact,) = read_facts(_json(tmp_path, [{**ZSRE, "loc": "who built the mill?"}]))
    assert fact.neighborhood_prompts == ("who built the mill?",)


def test_zsre_subjects_in_another_case_are_taken_as_the_question_writes_them(tmp_path):
    (fact,) = read_facts(_json(tmp_path, [{**ZSRE, "src": "Who built avo tower?"}]))
    assert (fact.prompt, fact.subject) == ("Who built {}?", "avo tower")


def test_zsre_subjects_prefer_the_mention_in_their_own_case(tmp_path):
    (fact,) = read_facts(_json(tmp_path, [{**ZSRE, "src": "Is avo tower Avo Tower?"}]))
    assert (fact.prompt, fact.subject) == ("Is avo tower {}?", "Avo Tower")


def test_readers_strip_the_targets_of_published_data(tmp_path):
    (fact,) = read_facts(_json(tmp_path, [{**FLAT, "target_new": " Ada", "ground_truth": "Bo "}]))
    assert (fact.target_new, fact.target_true) == ("Ada", "Bo")


@pytest.mark.parametrize("format", EXAMPLES)
@pytest.mark.parametrize("name", ["facts.json", "facts.jsonl"])
def test_every_format_is_recognised_in_both_kinds_of_file(tmp_path, format, name):
    record = EXAMPLES[format]
    path = _json(tmp_path, [record] if name == "facts.json" else json.dumps(record) + "\n\n", name)
    assert read_facts(path) == read_facts(path, format=format)


def test_a_named_format_is_not_guessed_away(tmp_path):
    with pytest.raises(FactError, match=r"record 1: requested_rewrite\.prompt: missing; the format counterfact has"):
        read_facts(_json(tmp_path, [OWN]), format="counterfact")


def test_written_facts_are_read_back_unchanged(tmp_path):
    facts = [_fact(), _fact(subject="Ōsaka \u2028 城", target_true="Bo", paraphrase_prompts=("a",), id="x")]
    write_facts(tmp_path / "facts.jsonl", facts)
    assert read_facts(tmp_path / "facts.jsonl") == facts


def test_an_interrupted_write_leaves_the_earlier_file_and_nothing_else(tmp_path):
    path = tmp_path / "facts.jsonl"
    write_facts(path, [_fact()])

    def interrupted():
        yield _fact(subject="Ume")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_facts(path, interrupted())
    assert read_facts(path) == [_fact()]
    assert os.listdir(tmp_path) == ["facts.jsonl"]


def test_facts_are_not_written_under_a_name_that_reads_as_one_json_list(tmp_path):
    with pytest.raises(FactError, match=r"facts\.json: .*name the file facts\.jsonl"):
        write_facts(tmp_path / "facts.json", [_fact()])


def test_a_limit_reads_and_checks_only_the_first_records(tmp_path):
    bad = {**OWN, "prompt": "x"}
    assert len(read_facts(_json(tmp_path, [OWN, OTHER, bad]), limit=2)) == 2
    lines = f"{json.dumps(OWN)}\n{json.dumps(OTHER)}\n{{ not json"
    assert len(read_facts(_json(tmp_path, lines, "facts.jsonl"), limit=2)) == 2


def test_a_limit_beyond_the_file_reads_all(tmp_path):
    assert len(read_facts(_json(tmp_path, [OWN, OTHER]), limit=5)) == 2


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_rejected(tmp_path, limit):
    with pytest.raises(FactError, match=f"limit: {limit} "):
        read_facts(_json(tmp_path, [OWN]), limit=limit)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        read_facts(tmp_path / "nowhere.json")


def test_a_byte_order_mark_is_no_error(tmp_path):
    path = tmp_path / "facts.jsonl"
    path.write_text(json.dumps(OWN), encoding="utf-8-sig")
    assert read_facts(path) == [_fact()]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("facts.json", "", "holds no facts"),
        ("facts.json", "[]", "holds no facts"),
        ("facts.jsonl", "\n\n", "holds no facts"),
        ("facts.json", json.dumps([OWN, OWN])[:-20], "line 1: not valid JSON .*truncated"),
        ("facts.json", f"[]\n{json.dumps(OWN)}", "line 2: not valid JSON .*one list of records, or one record a line"),
        ("facts.jsonl", f"{json.dumps(OWN)}\n{json.dumps(OWN)[:-9]}", "line 2: not valid JSON .*truncated"),
        ("facts.json", "3", "line 1: '3' is no header of a CSV file, and the file holds neither JSON nor YAML"),
        ("facts.json", '["a"]', "record 1: expected an object with fields, got text"),
        ("facts.jsonl", json.dumps([[OWN]]), "record 1: expected an object with fields, got a list"),
        ("facts.json", '[{"a": 1}]', "record 1: no field of any format: the record has a; .*counterfact, easyedit"),
        ("facts.json", json.dumps([OWN, {**OWN, "prompt": "x"}]), "record 2: subject: 'Avo' is not in the prompt 'x'"),
        ("facts.json", json.dumps([OWN, {**OWN, "extra": 1}]), "record 2: extra: unknown field"),
        (
            "facts.jsonl",
            f"{json.dumps(OWN)}\n\n3\n",
            "line 3: expected an object with fields, got a number",
        ),
    ],
)
def test_an_unusable_file_is_an_error_that_names_file_and_place(tmp_path, name, content, message):
    with pytest.raises(FactError, match=rf"{name}: {message}"):
        read_facts(_json(tmp_path, content, name))


def test_a_file_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "facts.jsonl"
    path.write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(FactError, match=r"facts\.jsonl: not UTF-8"):
        read_facts(path)


def test_an_unknown_format_lists_the_known_ones(tmp_path):
    with pytest.raises(FactError, match=r"format: 'csv' is unknown; .*counterfact, easyedit.* seen from its content"):
        read_facts(_json(tmp_path, [OWN]), format="csv")


@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [
        (FLAT, {**FLAT, "subject": "Avon"}, "subject: 'Avon' is not in the prompt"),
        (FLAT, {**FLAT, "subject": "avo"}, "subject: 'avo' is not in the prompt"),
        (FLAT, {**FLAT, "subject": " "}, "subject: '' is empty"),
        (FLAT, {**FLAT, "prompt": "The {} tower in {} is"}, "subject: 'Avo' is not in the prompt"),
        (FLAT, {**FLAT, "target_new": 3}, "target_new: expected text, got 3"),
        (FLAT, {**FLAT, "target_new": "bo"}, "target_new: 'bo' is the target_true 'Bo' already"),
        (ZSRE, {**ZSRE, "src": "Who built it?"}, "subject: 'Avo Tower' is not in the prompt 'Who built it"),
        (ZSRE, {**ZSRE, "answers": []}, "answers: the list is empty"),
        (ZSRE, {**ZSRE, "answers": 3}, "answers: expected text, got 3"),
        (ZSRE, {**ZSRE, "answers": [None]}, "answers: expected text, got None"),
        (ZSRE, _without(ZSRE, "answers"), "answers: missing; the format zsre has src, subject, answers"),
        (COUNTERFACT, {"requested_rewrite": "x"}, r"requested_rewrite\.prompt: missing"),
        (
            COUNTERFACT,
            {**COUNTERFACT, "paraphrase_prompts": "x"},
            "paraphrase_prompts: expected a list of texts",
        ),
        (
            COUNTERFACT,
            {"requested_rewrite": {**COUNTERFACT["requested_rewrite"], "target_new": "Ada"}},
            r"requested_rewrite\.target_new\.str: missing",
        ),
    ],
)
def test_an_invalid_record_is_named_by_file_number_and_field(tmp_path, good, bad, message):
    with pytest.raises(FactError, match=rf"facts\.json: record 2: {message}"):
        read_facts(_json(tmp_path, [good, bad]))


def test_check_facts_accepts_different_texts_and_rejects_none_at_all():
    check_facts([_fact(), _fact(subject="Ume")])
    with pytest.raises(FactError, match="empty"):
        check_facts([])


def test_two_answers_to_one_text_in_one_round_are_refused_with_both_named():
    facts = [_fact(subject="Ume"), _fact(), _fact(target_new="Bo")]
    with pytest.raises(
        FactError, match=r"facts 2 and 3: both complete 'The tower in Avo was built by', with 'Ada' and"
    ):
        check_facts(facts)
    check_facts([_fact(), _fact(subject="Ume"), _fact(target_new="Bo")], facts_per_round=2)
    with pytest.raises(FactError, match="facts 3 and 4: "):
        check_facts([_fact(), _fact(subject="Ume"), _fact(), _fact(target_new="Bo")], facts_per_round=2)


def test_texts_are_compared_exactly():
    facts = [Fact("People think that {} is", subject, "warm") for subject in ("Turkey", "turkey")]
    check_facts(facts)
    assert distinct_facts(facts) == facts


def test_a_repeated_fact_is_dropped_with_a_word():
    with pytest.warns(
        UserWarning, match="^2 facts repeat earlier ones and are dropped, first 'The tower in Avo .*Ada'$"
    ):
        assert distinct_facts([_fact(), _fact(subject="Ume"), _fact(), _fact()]) == [_fact(), _fact(subject="Ume")]
    with pytest.warns(UserWarning, match="^1 fact repeats an earlier one and is dropped: 'The tower"):
        assert distinct_facts([_fact(), _fact()]) == [_fact()]


def test_a_repeated_fact_leaves_its_further_questions_with_the_first():
    first = _fact(generation_prompts=("a", "a"), portability=(("b", "c"),))
    again = _fact(portability=(("b", "c"), ("d", "e")), paraphrase_prompts=("f",))
    with pytest.warns(UserWarning, match="1 fact"):
        (fact,) = distinct_facts([first, again])
    both = (("b", "c"), ("d", "e"))
    assert fact == _fact(generation_prompts=("a", "a"), portability=both, paraphrase_prompts=("f",))


def test_a_fact_that_is_changed_and_changed_back_is_kept():
    facts = [_fact(), _fact(target_new="Bo"), _fact()]
    assert distinct_facts(facts) == facts


def test_a_file_that_repeats_a_record_is_read_with_a_word(tmp_path):
    with pytest.warns(UserWarning, match=r"facts\.json: 1 fact repeats an earlier one"):
        assert read_facts(_json(tmp_path, [OWN, OTHER, OWN])) == [_fact(), _fact(subject="Ume")]
    assert read_facts(_json(tmp_path, [OWN, OTHER, OWN]), limit=2) == [_fact(), _fact(subject="Ume")]


def test_each_neighbourhood_prompt_may_have_its_own_answer():
    fact = _fact(neighborhood_prompts=("a", "b"), neighborhood_answers=("c", "d"), target_true="Bo")
    assert fact.neighborhood == (("a", "c"), ("b", "d"))
    assert _fact(neighborhood_prompts=("a",), neighborhood_target="c", target_true="Bo").neighborhood == (("a", "c"),)
    assert _fact(neighborhood_prompts=("a",), target_true="Bo").neighborhood == (("a", "Bo"),)
    assert _fact(neighborhood_prompts=("a",)).neighborhood == ()


def test_published_counterfact_is_read_completely(data_dir):
    path = data_dir / "counterfact_1000.json"
    facts = read_facts(path)
    check_facts(facts)
    records = json.loads(path.read_text(encoding="utf-8"))
    assert len(facts) == len(records) == 1000
    for fact, record in zip(facts, records, strict=True):
        assert fact.target_true == record["requested_rewrite"]["target_true"]["str"]
        assert list(fact.neighborhood_prompts) == record["neighborhood_prompts"]
        assert fact.paraphrase_prompts and fact.attribute_prompts and fact.generation_prompts


def test_published_flat_counterfact_keeps_every_prompt(data_dir):
    path = data_dir / "counterfact_edits_flat.json"
    records = json.loads(path.read_text(encoding="utf-8"))
    with pytest.warns(UserWarning, match="3 facts repeat earlier ones"):
        facts = read_facts(path)
    assert len(facts) == len(records) - 3
    written = {(record["prompt"], record["subject"], record["target_new"]) for record in records}
    assert {(fact.text, fact.subject, fact.target_new) for fact in facts} == written


def test_published_zsre_keeps_every_question(data_dir):
    path = data_dir / "zsre_700.json"
    records = json.loads(path.read_text(encoding="utf-8"))
    facts = read_facts(path)
    check_facts(facts)
    assert [fact.text for fact in facts] == [record["src"] for record in records]
    assert all(
        fact.target_true is None and fact.neighborhood_prompts[0].endswith("?") and fact.neighborhood_target
        for fact in facts
    )
