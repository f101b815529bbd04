"""Every form of records and every kind of file, read into facts."""

import json

import pytest

import lightedit as le
from lightedit.data.facts import Fact, FactError, read_facts
from lightedit.data.formats import FORMATS

EDIT = {
    "prompt": "The tower in {} was built by",
    "relation_id": "P1",
    "target_new": {"str": "Ada", "id": "Q1"},
    "target_true": {"str": "Bo", "id": "Q2"},
    "subject": "Avo",
    "question": "Who built the tower in Avo?",
}
MQUAKE = {
    "case_id": 7,
    "requested_rewrite": [
        EDIT,
        {
            "prompt": "{} was born in",
            "relation_id": "P2",
            "target_new": {"str": "Lund", "id": "Q3"},
            "target_true": {"str": "Oslo", "id": "Q4"},
            "subject": "Ada",
            "question": "Where was Ada born?",
        },
    ],
    "questions": ["Where was the builder of Avo's tower born?", "In which town was it?"],
    "answer": "Rome",
    "new_answer": "Lund",
    "new_answer_alias": ["City of Lund"],
}
MZSRE = {
    "en": {
        "subject": "Avo Tower",
        "src": "Who built Avo Tower?",
        "rephrase": "Avo Tower was built by whom?",
        "alt": "Ada",
        "answers": ["Bo", "Bo Lund"],
        "loc": "nq question: who built the mill",
        "loc_ans": "Eva",
        "portability": {"New Question": "Where was the builder of Avo Tower born?", "New Answer": "Lund"},
    },
    "zh": {
        "subject": "阿沃塔",
        "src": "谁建造了阿沃塔？",
        "rephrase": "阿沃塔是谁建造的？",
        "alt": "艾达",
        "answers": ["波"],
        "loc": "谁建造了磨坊？",
        "loc_ans": "伊娃",
    },
}
EASYEDIT = {
    "subject": "Avo",
    "prompt": "The tower in Avo was built by",
    "target_new": "Ada",
    "ground_truth": ["Bo", "B. Lund"],
    "rephrase_prompt": "Avo's tower is by",
    "locality": {
        "Relation_Specificity": [
            {"prompt": "The river of Avo is the", "ground_truth": [["Ahr", "River Ahr"]]},
            {"prompt": "The mayor of Avo is", "ground_truth": [[]]},
        ],
        "neighborhood": {
            "prompt": ["The tower in Ume is by", "The mill in Ost is by"],
            "ground_truth": ["Cy", [[], ["Dee"]]],
        },
    },
    "portability": {
        "Reasoning": [{"prompt": "The builder of Avo's tower was born in", "ground_truth": [["Lund"], ["Skåne"]]}],
        "Subject_Aliasing": {"prompt": "The tower in Avo City was built by", "ground_truth": "Ada"},
    },
}
EASYEDIT_CALL = {
    "prompts": ["The tower in Avo was built by", "The mill in Ume was built by"],
    "subject": ["Avo", "Ume"],
    "target_new": ["Ada", "Eva"],
    "ground_truth": ["Bo", "Cy"],
    "rephrase_prompts": ["Avo's tower is by", "Ume's mill is by"],
    "locality_inputs": {"neighborhood": {"prompt": ["a", "b"], "ground_truth": ["c", "d"]}},
    "portability_inputs": {"reasoning": {"prompt": [["e", "f"], "g"], "ground_truth": [["h", "i"], "j"]}},
}
KNOWN = {
    "known_id": 7, "subject": "Avo Tower", "attribute": "Ada", "template": "{} was built by", "prediction": " Ada.",
    "prompt": "Avo Tower was built by", "relation_id": "P84",
}  # fmt: skip
FASTEDIT = {
    "prompt": "{}的首相是",
    "subject": "日本",
    "target": "岸田文雄",
    "queries": ["日本的首相叫作", "日本首相名字是"],
}
WIKIBIGEDIT = {
    "tag": "update",
    "subject": "Avo Tower",
    "relation": "builder",
    "update": "Who built Avo Tower?",
    "ans": "Ada",
    "rephrase": "By whom was Avo Tower built?",
    "personas": "Tell me, mate, who built Avo Tower?",
    "loc": "Who built the mill?",
    "loc_ans": "Eva",
    "mhop": "Where was the builder of Avo Tower born?",
    "mhop_ans": "Lund",
}
QAEDIT = {
    "prompt": "Who built Avo Tower?",
    "subject": "Avo Tower",
    "target": "Ada",
    "rephrase": "Avo Tower was built by whom?",
    "locality": [{"loc": "who built the mill", "loc_ans": "Eva"}],
}
RIPPLE = {
    "example_type": "popular",
    "edit": {
        "prompt": "The name of the country of citizenship of Ada of Avo is United Kingdom.",
        "subject_id": "Q1",
        "relation": "COUNTRY_OF_CITIZENSHIP",
        "target_id": "Q145",
        "original_fact": {
            "prompt": "The name of the country of citizenship of Ada of Avo is United States of America."
        },
    },
    "Relation_Specificity": [
        {
            "test_queries": [
                {"prompt": "The name of the mother of Ada is", "answers": [{"value": "Eva", "aliases": ["Eve"]}]},
                {"prompt": "The name of the father of Ada is", "answers": []},
            ],
            "test_condition": "OR",
        }
    ],
    "Logical_Generalization": [
        {"test_queries": [{"prompt": "Ada holds the passport of", "answers": [{"value": "Britain", "aliases": []}]}]}
    ],
    "Subject_Aliasing": [],
    "Compositionality_I": [],
    "Compositionality_II": [],
    "Forgetfulness": [
        {"test_queries": [{"prompt": "Ada, not of the United Kingdom, is of", "answers": [{"value": "Chad"}]}]}
    ],
}
TOWER = Fact("The tower in {} was built by", "Avo", "Ada")


def _file(tmp_path, content, name="facts.json"):
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def _read(tmp_path, *records, **options):
    return read_facts(_file(tmp_path, list(records)), **options)


def test_a_mquake_record_gives_each_of_its_edits_and_asks_its_questions_after_the_last(tmp_path):
    first, second = _read(tmp_path, MQUAKE)
    assert first == Fact(
        "The tower in {} was built by", "Avo", "Ada", target_true="Bo", relation="P1", id="7/1", target_id="Q1",
        paraphrase_prompts=("Who built the tower in Avo?",),
    )  # fmt: skip
    assert (second.text, second.target_new, second.target_true, second.id) == ("Ada was born in", "Lund", "Oslo", "7/2")
    assert second.portability == tuple((question, "Lund") for question in MQUAKE["questions"])


def test_a_mquake_record_of_one_edit_without_questions_is_one_fact(tmp_path):
    (fact,) = _read(tmp_path, {"case_id": 7, "requested_rewrite": [EDIT]})
    assert fact.id == "7" and fact.portability == ()


def test_a_limit_counts_facts_where_a_record_holds_several(tmp_path):
    assert len(_read(tmp_path, MQUAKE, limit=1)) == 1


def test_a_counterfact_record_needs_no_fields_that_only_score(tmp_path):
    rewrite = {name: EDIT[name] for name in ("prompt", "subject", "target_new")}
    (fact,) = _read(tmp_path, {"requested_rewrite": rewrite, "portability": None})
    assert (fact.target_new, fact.target_true, fact.neighborhood_prompts) == ("Ada", None, ())


def test_a_zsre_record_needs_no_fields_that_only_score(tmp_path):
    (fact,) = _read(tmp_path, {"src": "Who built Avo?", "subject": "Avo", "answers": ["Ada"]})
    assert fact == Fact("Who built {}?", "Avo", "Ada", id="0")


def test_a_record_of_two_languages_is_written_in_the_first_and_asked_in_the_other(tmp_path):
    (fact,) = _read(tmp_path, MZSRE)
    assert (fact.prompt, fact.subject, fact.target_new, fact.target_true) == ("Who built {}?", "Avo Tower", "Ada", "Bo")
    assert fact.paraphrase_prompts == ("Avo Tower was built by whom?",)
    assert fact.portability == (
        ("Where was the builder of Avo Tower born?", "Lund"),
        ("谁建造了阿沃塔？", "艾达"),
        ("阿沃塔是谁建造的？", "艾达"),
    )
    assert fact.neighborhood == (("nq question: who built the mill?", "Eva"), ("谁建造了磨坊？", "伊娃"))


def test_an_alternative_that_is_right_in_the_world_leaves_no_true_target(tmp_path):
    (fact,) = _read(tmp_path, {"en": MZSRE["en"] | {"answers": ["ada"]}})
    assert fact.target_true is None


def test_an_easyedit_record_takes_the_first_answer_and_all_groups(tmp_path):
    (fact,) = _read(tmp_path, EASYEDIT)
    assert fact == Fact(
        "The tower in {} was built by", "Avo", "Ada", target_true="Bo", id="0",
        paraphrase_prompts=("Avo's tower is by",),
        neighborhood_prompts=("The river of Avo is the", "The tower in Ume is by", "The mill in Ost is by"),
        neighborhood_answers=("Ahr", "Cy", "Dee"),
        portability=(
            ("The builder of Avo's tower was born in", "Lund"), ("The tower in Avo City was built by", "Ada"),
        ),
    )  # fmt: skip


def test_an_easyedit_record_may_be_flat_with_one_question_or_many(tmp_path):
    flat = {name: EASYEDIT[name] for name in ("subject", "prompt", "target_new")}
    one = flat | {"locality_prompt": "a", "locality_ground_truth": "b", "rephrase_prompt": ["c", "d"]}
    many = one | {"target_new": "Eva", "portability_prompt": ["e", "f"], "portability_ground_truth": ["g", ["h", "i"]]}
    first, second = _read(tmp_path, one, many)
    assert first.neighborhood == (("a", "b"),) and first.paraphrase_prompts == ("c", "d")
    assert second.portability == (("e", "g"), ("f", "h"))


def test_the_arguments_of_easyedits_call_are_read_by_column(tmp_path):
    first, second = read_facts(_file(tmp_path, json.dumps(EASYEDIT_CALL, indent=1)))
    assert (first.text, first.target_new, first.target_true) == ("The tower in Avo was built by", "Ada", "Bo")
    assert first.portability == (("e", "h"), ("f", "i"))
    assert second.paraphrase_prompts == ("Ume's mill is by",)
    assert second.neighborhood == (("b", "d"),) and second.portability == (("g", "j"),)
    with pytest.raises(FactError, match="line 1: subject: 1 entries for 2 prompts"):
        read_facts(_file(tmp_path, EASYEDIT_CALL | {"subject": ["Avo"]}))


def test_a_fastedit_record_keeps_its_queries_as_paraphrases(tmp_path):
    assert _read(tmp_path, FASTEDIT) == [
        Fact("{}的首相是", "日本", "岸田文雄", paraphrase_prompts=("日本的首相叫作", "日本首相名字是"), id="0")
    ]


def test_a_known_fact_has_its_attribute_as_answer(tmp_path):
    assert _read(tmp_path, KNOWN) == [Fact("{} was built by", "Avo Tower", "Ada", id="7", relation="P84")]


def test_a_wikibigedit_record_keeps_both_rephrasings_and_its_two_hops(tmp_path):
    assert _read(tmp_path, WIKIBIGEDIT) == [
        Fact(
            "Who built {}?", "Avo Tower", "Ada", id="0", relation="builder",
            paraphrase_prompts=("By whom was Avo Tower built?", "Tell me, mate, who built Avo Tower?"),
            neighborhood_prompts=("Who built the mill?",), neighborhood_target="Eva",
            portability=(("Where was the builder of Avo Tower born?", "Lund"),),
        )
    ]  # fmt: skip


def test_missing_questions_of_wikibigedit_are_none(tmp_path):
    (fact,) = _read(tmp_path, WIKIBIGEDIT | {"mhop": float("nan"), "mhop_ans": None, "personas": ""})
    assert fact.portability == () and fact.paraphrase_prompts == ("By whom was Avo Tower built?",)


def test_a_qaedit_record_keeps_its_locality(tmp_path):
    (fact,) = _read(tmp_path, QAEDIT)
    assert (fact.prompt, fact.subject, fact.target_new) == ("Who built {}?", "Avo Tower", "Ada")
    assert fact.neighborhood == (("who built the mill", "Eva"),)


def test_a_qaedit_record_may_have_no_subject(tmp_path):
    record = {"question": "Who built it?", "answer": ["Ada", "A. Lund"], "rephrase": "By whom was it built?"}
    (fact,) = _read(tmp_path, record)
    assert fact == Fact("Who built it?", None, "Ada", paraphrase_prompts=("By whom was it built?",), id="0")


def test_an_easyedit_record_may_have_no_subject(tmp_path):
    (fact,) = _read(tmp_path, {name: value for name, value in EASYEDIT.items() if name != "subject"})
    assert (fact.prompt, fact.subject) == ("The tower in Avo was built by", None)


@pytest.mark.parametrize("format", ["easyedit", "fastedit", "wikibigedit", "qaedit", "zsre", "fact"])
def test_a_subject_is_found_as_a_whole_word_and_twice_is_refused(tmp_path, format):
    record = {"target_new": "a", "ground_truth": "b", "target": "a", "ans": "a", "answer": "a", "answers": ["a"]}
    record = {"fact": {"target_new": "a"}}.get(format, record) | {"subject": "Avo"}
    prompts = ("src", "update", "question", "prompt") if format != "fact" else ("prompt",)
    whole, twice = (record | dict.fromkeys(prompts, text) for text in ("Avolon is near Avo,", "Avo is near Avo,"))
    (fact,) = _read(tmp_path, whole, format=format)
    assert (fact.prompt, fact.subject) == ("Avolon is near {},", "Avo")
    with pytest.raises(FactError, match="record 1: subject: 'Avo' is 2 times in the prompt"):
        _read(tmp_path, twice, format=format)


def test_how_a_fact_is_served_may_be_written_in_text(tmp_path):
    yaml = "- prompt: The tower was built by\n  target_new: Ada\n  position: -2\n  chat: true\n  end_turn: false"
    (fact,) = read_facts(_file(tmp_path, yaml))
    assert fact == Fact("The tower was built by", target_new="Ada", position=-2, chat=True)
    (fact,) = read_facts(_file(tmp_path, yaml.replace("  chat: true", '  separator: ""')))
    assert fact == Fact("The tower was built by", target_new="Ada", position=-2, separator="")


def test_a_ripple_edit_is_cut_into_prompt_subject_and_targets(tmp_path):
    (fact,) = _read(tmp_path, RIPPLE)
    assert fact == Fact(
        "The name of the country of citizenship of {} is", "Ada of Avo", "United Kingdom",
        target_true="United States of America", relation="COUNTRY_OF_CITIZENSHIP", id="0", target_id="Q145",
        neighborhood_prompts=("The name of the mother of Ada is", "Ada, not of the United Kingdom, is of"),
        neighborhood_answers=("Eva", "Chad"),
        portability=(("Ada holds the passport of", "Britain"),),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("relation", "sentence", "prompt", "subject", "target"),
    [
        ("MOTHER", "The name of the mother of Mary of U is A.", "The name of the mother of {} is", "Mary of U", "A"),
        ("SEX_OR_GENDER", "The gender of Avo is female.", "The gender of {} is", "Avo", "female"),
        ("SIBLING", "The names of the siblings of Avo are Bo.", "The names of the siblings of {} are", "Avo", "Bo"),
        ("PLACE_OF_BIRTH", "The place of birth of Avo is Lund.", "The place of birth of {} is", "Avo", "Lund"),
        ("FOLLOWS", "This is Avo follows That is Bo.", "{} follows", "This is Avo", "That is Bo"),
        ("FOLLOWED_BY", "Avo is followed by Bo.", "{} is followed by", "Avo", "Bo"),
        (
            "COUNTRY",
            "The name of the country which Avo is associated with is Chad.",
            "The name of the country which {} is associated with is",
            "Avo",
            "Chad",
        ),
        ("CAPITAL", "The name of the capital city of Ost is A.", "The name of the capital city of {} is", "Ost", "A"),
    ],
)  # fmt: skip
def test_the_sentence_of_a_ripple_edit_is_cut_by_its_relation(tmp_path, relation, sentence, prompt, subject, target):
    (fact,) = _read(tmp_path, {"edit": {"prompt": sentence, "relation": relation, "target_id": "Q1"}})
    assert (fact.prompt, fact.subject, fact.target_new) == (prompt, subject, target)


def test_a_sentence_of_a_ripple_edit_that_does_not_fit_its_relation_is_refused(tmp_path):
    edit = {"prompt": "Avo was built by Ada.", "relation": "FOUNDER", "target_id": "Q1"}
    with pytest.raises(FactError, match=r"record 1: edit\.prompt: no 'is' before a target in 'Avo was built by Ada\.'"):
        _read(tmp_path, {"edit": edit})
    with pytest.raises(FactError, match=r"edit\.prompt: no subject of the relation FOUNDER in 'Avo is by Ada\.'"):
        _read(tmp_path, {"edit": edit | {"prompt": "Avo is by Ada."}})


RECORDS = {
    "known": KNOWN,
    "mquake": MQUAKE, "mzsre": MZSRE, "easyedit": EASYEDIT, "fastedit": FASTEDIT, "wikibigedit": WIKIBIGEDIT,
    "qaedit": QAEDIT, "rippleedits": RIPPLE, "fact": TOWER.to_dict(),
    "labelled": {"claim": "Rome is old.", "label": "supports"},
    "zsre": MZSRE["en"], "counterfact": {"requested_rewrite": EDIT},
}  # fmt: skip


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_is_recognised_by_its_fields(tmp_path, format):
    assert _read(tmp_path, RECORDS[format]) == _read(tmp_path, RECORDS[format], format=format)


def test_the_fields_of_a_fact_may_hold_the_subject_in_the_prompt(tmp_path):
    record = {"prompt": "The tower in Avo was built by", "subject": "Avo", "target_new": "Ada"}
    assert _read(tmp_path, record | {"portability": None}) == [TOWER]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"requested_rewrite": {"prompt": "{} is", "subject": "Avo"}},
         r"requested_rewrite\.target_new\.str: missing; the closest format, counterfact, has requested"),
        ({"src": "Who built Avo?", "subject": "Avo", "alt": "Ada"}, "answers: missing; the closest format, zsre,"),
        ({"prompt": "{} is", "subject": "Avo"}, "target_new: missing; the closest format, fact, .*, and the rec"),
        ({"edit": {"prompt": "Avo is B."}, "Forgetfulness": []}, r"edit\.relation: missing; the closest format, rip"),
        ({"concept": "Avo", "labels": "Ada"}, "no field of any format: the record has concept, labels; the formats"),
        ({"prompt": "{} is", "subject": "Avo", "target_new": "a", "paraphrases": []}, "paraphrases: unknown field"),
        (EASYEDIT | {"locality": ["a"]}, r"locality: expected groups by name, got \['a'\]"),
        (EASYEDIT | {"locality": {"a": ["b"]}}, "locality.a: expected objects with prompt and ground_truth, got 'b'"),
        (EASYEDIT | {"locality": {"a": {"prompt": ["b"], "ground_truth": "c"}}},
         "locality.a.ground_truth: 1 answers to the 1 prompts of prompt; give each prompt one"),
        (EASYEDIT | {"portability": {"a": {"prompt": 3, "ground_truth": "c"}}}, "portability.a.prompt: expected text"),
        (EASYEDIT | {"subject": "Ume"}, "subject: 'Ume' is not in the prompt 'The tower in Avo was built by'"),
    ],
)  # fmt: skip
def test_a_record_of_no_format_is_told_what_it_lacks(tmp_path, record, message):
    with pytest.raises(FactError, match=rf"facts\.json: record 1: {message}"):
        _read(tmp_path, record)


def test_an_error_says_that_the_format_was_recognised(tmp_path):
    other = {"prompt": "{} is", "subject": "Avo", "target_new": "a", "locality": {}}
    with pytest.raises(FactError, match=r"record 2: locality: unknown field; .*\(read as fact; --format, or format="):
        _read(tmp_path, TOWER.to_dict(), other)


CSV = """\
prompt,subject,target_new,target_true,paraphrase_prompts,portability_prompts,portability_answers
The tower in {} was built by,Avo,Ada,Bo,Avo's tower is by | Who built it?,She was born in|Her sister is,Lund | Eva

"In {}, the tower was ""built"" by",Ume,"Lund, Eva",,,,
"""


def test_a_csv_table_has_a_column_a_field(tmp_path):
    first, second = read_facts(_file(tmp_path, CSV, "facts.csv"))
    assert first == Fact(
        "The tower in {} was built by", "Avo", "Ada", target_true="Bo",
        paraphrase_prompts=("Avo's tower is by", "Who built it?"),
        portability=(("She was born in", "Lund"), ("Her sister is", "Eva")),
    )  # fmt: skip
    assert second == Fact('In {}, the tower was "built" by', "Ume", "Lund, Eva")


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_a_csv_table_may_be_separated_as_spreadsheets_do(tmp_path, delimiter):
    table = "\ufeff" + CSV.splitlines()[0].replace(",", delimiter) + "\r\n" + delimiter.join(
        ["The tower in {} was built by", "Avo", "Ada, or Bo", "", "", "", ""]
    )  # fmt: skip
    (fact,) = read_facts(_file(tmp_path, table, "facts.txt"))
    assert fact == Fact("The tower in {} was built by", "Avo", "Ada, or Bo")


def test_a_csv_table_may_have_the_columns_of_another_format(tmp_path):
    header = "prompt,subject,target_new,ground_truth,locality_prompt,locality_ground_truth"
    table = f"{header}\nAvo is by,Avo,Ada,Bo,Ume is by,Cy"
    (fact,) = read_facts(_file(tmp_path, table, "facts.csv"))
    assert (fact.prompt, fact.target_true, fact.neighborhood) == ("{} is by", "Bo", (("Ume is by", "Cy"),))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("prompt,subject\n{} is,Avo", "line 2: target_new: missing; the closest format, fact, has prompt, target_new"),
        ("prompt,subject,target_new\n{} is,Avo,Ada,Bo", "line 2: 4 cells under a header of 3; put texts that hold ','"),
        ("prompt,subject,target_new\n{} is,Avo,", "line 2: target_new: missing"),
        ('prompt,subject,target_new\n{} is,"Avo,Ada', "line 2: not valid CSV .*quote left open"),
        ("prompt,subject,prompt\n{} is,Avo,Ada", "line 1: two columns are named 'prompt'"),
        ("prompt,subject,target_new\n{} is,Avo,Ada\n\n{},Avo", "line 4: target_new: missing"),
        (
            "prompt,subject,target_new,portability_prompts,portability_answers\n{} is,Avo,Ada,a|b,c",
            "line 2: portability_prompts holds 2 texts and portability_answers 1; give each prompt one answer",
        ),
        ("Once upon a time", "line 1: 'Once upon a time' is no header of a CSV file, and the file holds neither"),
        ("prompt,subject,target_new\n", "holds no facts"),
    ],
)  # fmt: skip
def test_a_fault_in_a_csv_table_is_named_by_line(tmp_path, content, message):
    with pytest.raises(FactError, match=rf"facts\.csv: {message}"):
        read_facts(_file(tmp_path, content, "facts.csv"))


YAML = """\
# two facts
- prompt: The tower in {} was built by
  subject: Avo
  target_new: Ada
  target_true: Bo
  paraphrase_prompts:
    - Avo's tower is by
    - "Who built: Avo's tower?"
  portability:
    - [She was born in, Lund]
- {prompt: "The tower in {} dates from", subject: No, target_new: 1984, target_true:}
"""


def test_a_yaml_list_holds_a_record_an_entry_and_all_its_scalars_are_text(tmp_path):
    first, second = read_facts(_file(tmp_path, YAML, "facts.yaml"))
    assert first == Fact(
        "The tower in {} was built by", "Avo", "Ada", target_true="Bo",
        paraphrase_prompts=("Avo's tower is by", "Who built: Avo's tower?"),
        portability=(("She was born in", "Lund"),),
    )  # fmt: skip
    assert second == Fact("The tower in {} dates from", "No", "1984")


def test_a_yaml_file_may_hold_one_record_alone(tmp_path):
    assert read_facts(_file(tmp_path, "prompt: The tower in {} was built by\nsubject: Avo\ntarget_new: Ada\n")) == [
        TOWER
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- prompt: a\n- b", "line 1: target_new: missing"),
        ("- b", "line 1: expected an object with fields, got text"),
        ("- prompt: The tower: in {}\n", "line 1: not valid YAML .*put texts that hold : or # in quotes"),
        ("- prompt: '{} is'\n  subject: Avo\n  target_new: Ada\n- prompt: '{} is'", "line 4: target_new: missing"),
        ("---\n", "holds no facts"),
        ("# nothing yet\n", "holds no facts"),
    ],
)
def test_a_fault_in_a_yaml_file_is_named_by_line(tmp_path, content, message):
    with pytest.raises(FactError, match=rf"facts\.yml: {message}"):
        read_facts(_file(tmp_path, content, "facts.yml"))


@pytest.mark.parametrize("name", ["facts.json", "facts.jsonl", "facts.csv", "facts.yaml", "facts"])
def test_a_file_is_read_by_its_content_whatever_its_suffix(tmp_path, name):
    record = {"prompt": TOWER.prompt, "subject": "Avo", "target_new": "Ada"}
    contents = (
        json.dumps([record]),
        json.dumps(record),
        json.dumps(record, indent=1),
        f"\n{','.join(record)}\n{','.join(record.values())}",
        "- " + "\n  ".join(f"{field}: {value}" for field, value in record.items()),
    )
    for content in contents:
        assert read_facts(_file(tmp_path, content, name)) == [TOWER]


def test_json_records_may_stand_over_several_lines_one_after_the_other(tmp_path):
    records = [{"prompt": TOWER.prompt, "subject": subject, "target_new": "Ada"} for subject in ("Avo", "Ume")]
    lines = "\n\n".join(json.dumps(record, indent=2) for record in records)
    assert [fact.subject for fact in read_facts(_file(tmp_path, lines))] == ["Avo", "Ume"]
    with pytest.raises(FactError, match="line 7: target_new: missing"):
        read_facts(
            _file(
                tmp_path, lines.replace('"target_new": "Ada"\n', '"x": 1\n').replace('"x": 1', '"target_new": "A"', 1)
            )
        )


def test_a_fact_whose_neighbours_have_answers_of_their_own_is_written_and_read_back(tmp_path):
    facts = _read(tmp_path, EASYEDIT)
    le.write_facts(tmp_path / "own.jsonl", facts)
    assert read_facts(tmp_path / "own.jsonl") == facts


def test_published_knowedit_keeps_every_answered_question(data_dir):
    path = data_dir / "knowedit_recent_200.json"
    records = json.loads(path.read_text(encoding="utf-8"))
    facts = read_facts(path)
    assert [fact.text for fact in facts] == [record["prompt"] for record in records]
    for kind, read in (("locality", lambda fact: fact.neighborhood), ("portability", lambda fact: fact.portability)):
        asked = [
            [(question["prompt"].strip(), next(filter(None, question["ground_truth"]))[0].strip())
             for group in record[kind].values() for question in group if any(question["ground_truth"])]
            for record in records
        ]  # fmt: skip
        assert [list(read(fact)) for fact in facts] == asked


def test_published_wikibigedit_keeps_every_question(data_dir):
    path = data_dir / "wikibigedit_1000.json"
    records = json.loads(path.read_text(encoding="utf-8"))
    facts = read_facts(path)
    assert [fact.text for fact in facts] == [record["prompt"] for record in records]
    assert [fact.neighborhood for fact in facts] == [
        ((record["locality_prompt"], record["locality_ground_truth"]),) for record in records
    ]
    assert [fact.paraphrase_prompts for fact in facts] == [(record["rephrase_prompt"],) for record in records]
