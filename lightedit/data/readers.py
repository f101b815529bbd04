"""Readers of records, form by form: those of this package, and those of published data sets."""

from dataclasses import fields
from typing import Any

from lightedit.data.fact import PROMPT_LISTS, Fact, FactError
from lightedit.data.fields import (
    Pairs,
    groups,
    lookup,
    neighborhood,
    optional_text,
    pairs,
    prompt_and_subject,
    text,
    texts,
    unlike,
)

FACT_FIELDS = tuple(field.name for field in fields(Fact))


def from_fact(record: dict[str, Any], number: int) -> list[Fact]:
    """The fields of `Fact`. The subject may stand in the prompt in place of `{}`."""
    given = {name: _typed(name, value) for name, value in record.items() if value is not None}
    if "subject" in given and "{}" not in text(given, "prompt"):
        given |= prompt_and_subject(given, "prompt")
    return [Fact.from_dict(given)]


def _typed(name: str, value: Any) -> Any:
    """The value of a field whose text, in CSV and YAML, stands for a number, or for true or false."""
    if name in ("chat", "end_turn") and value in ("true", "false"):
        return value == "true"
    if name == "position" and isinstance(value, str) and value.lstrip("-").isdecimal():
        return int(value)
    return value


def from_counterfact(record: dict[str, Any], number: int) -> list[Fact]:
    """CounterFact (Meng et al., 2022), with the portability question of Yao et al. (2023, arXiv 2305.13172), if any."""
    question: Pairs = ()
    if record.get("portability"):
        question = ((text(record, "portability.New Question"), text(record, "portability.New Answer")),)
    prompts: dict[str, Any] = {field: record.get(field) or () for field in PROMPT_LISTS}
    id_ = str(record.get("case_id", number))
    return [Fact(**_rewrite(record, "requested_rewrite"), id=id_, portability=question, **prompts)]


def from_mquake(record: dict[str, Any], number: int) -> list[Fact]:
    """MQuAKE (Zhong et al., 2023): a list of edits, and questions whose answer follows from all of them.

    The questions stay with the last edit: where it is written, so are the others.
    """
    edits = record["requested_rewrite"]
    case, answer = str(record.get("case_id", number)), optional_text(record, "new_answer")
    questions = tuple((question, answer) for question in texts(record, "questions") if answer is not None)
    found = []
    for index in range(len(edits)):
        path = f"requested_rewrite.{index}"
        last = index == len(edits) - 1
        found.append(
            Fact(
                **_rewrite(record, path),
                paraphrase_prompts=texts(record, f"{path}.question"),
                id=case if len(edits) == 1 else f"{case}/{index + 1}",
                portability=questions if last else (),
            )
        )
    return found


def _rewrite(record: dict[str, Any], path: str) -> dict[str, Any]:
    """The fields of one edit in CounterFact's form."""
    return {
        "prompt": text(record, f"{path}.prompt"),
        "subject": text(record, f"{path}.subject"),
        "target_new": text(record, f"{path}.target_new.str"),
        "target_true": optional_text(record, f"{path}.target_true.str"),
        "relation": lookup(record, f"{path}.relation_id"),
        "target_id": lookup(record, f"{path}.target_new.id"),
    }


def from_zsre(record: dict[str, Any], number: int) -> list[Fact]:
    """ZsRE in MEND's form (Mitchell et al., 2022). Portability questions are left out, because they follow from `alt`.

    MEND writes the counterfactual `alt`. MEMIT's evaluation, which later work follows, writes the right answer.
    """
    return [
        Fact(
            **prompt_and_subject(record, "src", any_case=True),
            target_new=text(record, "answers"),
            paraphrase_prompts=texts(record, "rephrase"),
            **neighborhood(_natural_question(record)),
            id=str(number),
        )
    ]


def _natural_question(record: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """The unrelated question of a zsRE record, with one question mark."""
    asked = pairs(record, "loc", "loc_ans")
    return tuple((question if question.endswith(("?", "？")) else question + "?", answer) for question, answer in asked)


def from_mzsre(record: dict[str, Any], number: int) -> list[Fact]:
    """MzsRE and Bi-zsRE (Wang et al., 2023): zsRE records by language, such as `en` and `zh`.

    The fact is written in the first language, with `alt` as its target. The questions in the other languages are
    portability questions.
    """
    first, *others = [name for name, value in record.items() if isinstance(value, dict) and "src" in value]
    of = record[first]
    target = text(record, f"{first}.alt")
    asked = pairs(of, "portability.New Question", "portability.New Answer")
    unrelated = _natural_question(of)
    for other in others:
        questions = (*texts(record, f"{other}.src"), *texts(record, f"{other}.rephrase"))
        asked += tuple((question, text(record, f"{other}.alt")) for question in questions)
        asked += pairs(record[other], "portability.New Question", "portability.New Answer")
        unrelated += _natural_question(record[other])
    return [
        Fact(
            **prompt_and_subject(of, "src", any_case=True),
            target_new=target,
            target_true=unlike(optional_text(record, f"{first}.answers"), target),
            paraphrase_prompts=texts(record, f"{first}.rephrase"),
            **neighborhood(unrelated),
            id=str(number),
            portability=asked,
        )
    ]


def from_wikibigedit(record: dict[str, Any], number: int) -> list[Fact]:
    """WikiBigEdit (Thede et al., 2025): `update` and `ans`, a rephrasing, a persona's, an unrelated and a 2-hop one."""
    return [
        Fact(
            **prompt_and_subject(record, "update", any_case=True),
            target_new=text(record, "ans"),
            paraphrase_prompts=(*texts(record, "rephrase"), *texts(record, "personas")),
            **neighborhood(pairs(record, "loc", "loc_ans")),
            id=str(number),
            relation=optional_text(record, "relation"),
            portability=pairs(record, "mhop", "mhop_ans"),
        )
    ]


def from_qaedit(record: dict[str, Any], number: int) -> list[Fact]:
    """QAEdit (Yang et al., 2025): questions of natural data sets, with or without a subject."""
    unrelated = groups({"locality": {"questions": record.get("locality") or []}}, "locality", "loc", "loc_ans")
    asked = "question" if "question" in record else "prompt"
    answer = "answer" if "answer" in record else "target"
    return [
        Fact(
            **prompt_and_subject(record, asked, any_case=True),
            target_new=text(record, answer),
            paraphrase_prompts=texts(record, "rephrase"),
            **neighborhood(unrelated),
            id=str(number),
        )
    ]


def from_fastedit(record: dict[str, Any], number: int) -> list[Fact]:
    """FastEdit: a prompt with `{}`, a subject, a target, and `queries`, which ask for the same fact."""
    return [
        Fact(
            **prompt_and_subject(record, "prompt"),
            target_new=text(record, "target"),
            paraphrase_prompts=texts(record, "queries"),
            id=str(number),
        )
    ]


def from_known(record: dict[str, Any], number: int) -> list[Fact]:
    """Known facts of ROME's causal tracing (Meng et al., 2022): the answer is the right one, and there is no other."""
    return [
        Fact(
            **prompt_and_subject(record, "prompt"),
            target_new=text(record, "attribute"),
            relation=optional_text(record, "relation_id"),
            id=str(record.get("known_id", number)),
        )
    ]


def from_labelled(record: dict[str, Any], number: int) -> list[Fact]:
    """Claims and texts with a class, as FEVER's and SCOTUS's: the class is written, and may also be a number."""
    label = record["label"]
    return [
        Fact(
            text(record, "claim" if "claim" in record else "text"),
            target_new=str(label) if isinstance(label, int) and not isinstance(label, bool) else text(record, "label"),
            id=str(record.get("id", number)),
        )
    ]


def from_easyedit(record: dict[str, Any], number: int) -> list[Fact]:
    """EasyEdit's and KnowEdit's forms (Wang et al., 2023; Zhang et al., 2024).

    Rephrasings, locality and portability may be flat (`locality_prompt` and `locality_ground_truth`) or in named
    groups (`locality`), one or many. Of answers with aliases the first is taken.
    """
    unrelated = pairs(record, "locality_prompt", "locality_ground_truth") + groups(record, "locality")
    follows = pairs(record, "portability_prompt", "portability_ground_truth") + groups(record, "portability")
    return [
        Fact(
            **prompt_and_subject(record, "prompt"),
            target_new=text(record, "target_new"),
            target_true=optional_text(record, "ground_truth"),
            paraphrase_prompts=texts(record, "rephrase_prompt", "rephrase_prompts", "rephrase"),
            **neighborhood(unrelated),
            id=str(record.get("case_id", number)),
            portability=follows,
        )
    ]


def from_easyedit_call(record: dict[str, Any], number: int) -> list[Fact]:
    """The arguments of EasyEdit's `edit`: lists with one entry a fact, and groups of such lists."""
    prompts = record["prompts"]
    rows: list[dict[str, Any]] = [{"prompt": prompt, "case_id": index} for index, prompt in enumerate(prompts)]

    def spread(values: Any, path: str, *names: str) -> None:
        if values is None:
            return
        if not isinstance(values, list) or len(values) != len(prompts):
            count = len(values) if isinstance(values, list) else 1
            raise FactError(f"{path}: {count} entries for {len(prompts)} prompts; give each prompt one")
        for row, value in zip(rows, values, strict=True):
            for name in names[:-1]:
                row = row.setdefault(name, {})
            row[names[-1]] = value

    for name, field in (("subject", "subject"), ("target_new", "target_new"), ("ground_truth", "ground_truth"),
                        ("rephrase_prompts", "rephrase_prompt")):  # fmt: skip
        spread(record.get(name), name, field)
    for kind in ("locality", "portability"):
        for group, columns in (record.get(f"{kind}_inputs") or {}).items():
            for name in ("prompt", "ground_truth"):
                spread(lookup(columns, name), f"{kind}_inputs.{group}.{name}", kind, group, name)
    return [fact for row in rows for fact in from_easyedit(row, number)]
