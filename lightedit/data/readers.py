"""Readers of fact files, one record at a time: CounterFact, zsRE and JSON lines."""

import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from lightedit.data.fact import PROMPT_LISTS, Fact, FactError, as_prompts, cut_subject


def _get(record: dict[str, Any], path: str, kind: type) -> Any:
    """The value at a dotted path of a nested record. Texts are stripped."""
    value: Any = record
    for key in path.split("."):
        if not isinstance(value, dict) or key not in value:
            raise FactError(f"{path}: missing")
        value = value[key]
    if not isinstance(value, kind):
        expected = "text" if kind is str else "a list"
        raise FactError(f"{path}: expected {expected}, got {value!r}")
    return value.strip() if isinstance(value, str) else value


def _from_counterfact(record: dict[str, Any], number: int) -> Fact:
    return Fact(
        prompt=_get(record, "requested_rewrite.prompt", str),
        subject=_get(record, "requested_rewrite.subject", str),
        target_new=_get(record, "requested_rewrite.target_new.str", str),
        target_true=_get(record, "requested_rewrite.target_true.str", str),
        relation=record["requested_rewrite"].get("relation_id"),
        id=str(record.get("case_id", number)),
        target_id=record["requested_rewrite"]["target_new"].get("id"),
        portability=_one_hop(record),
        **{field: record.get(field, ()) for field in PROMPT_LISTS},
    )


def _one_hop(record: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """The portability question that Yao et al. (2023, arXiv 2305.13172) add to records of CounterFact, if present."""
    if "portability" not in record:
        return ()
    return ((_get(record, "portability.New Question", str), _get(record, "portability.New Answer", str)),)


def _from_counterfact_flat(record: dict[str, Any], number: int) -> Fact:
    prompt, subject = cut_subject(_get(record, "prompt", str), _get(record, "subject", str))
    return Fact(
        prompt=prompt,
        subject=subject,
        target_new=_get(record, "target_new", str),
        target_true=_get(record, "ground_truth", str),
        paraphrase_prompts=(_get(record, "rephrase_prompt", str),) if "rephrase_prompt" in record else (),
        neighborhood_prompts=(_get(record, "locality_prompt", str),),
        neighborhood_target=_get(record, "locality_ground_truth", str),
        id=str(record.get("case_id", number)),
    )


def _from_zsre(record: dict[str, Any], number: int) -> Fact:
    prompt, subject = cut_subject(_get(record, "src", str), _get(record, "subject", str), any_case=True)
    answers = as_prompts("answers", _get(record, "answers", list))
    if not answers:
        raise FactError("answers: the list is empty; its first entry is the target to write")
    question = _get(record, "loc", str)
    return Fact(
        prompt=prompt,
        subject=subject,
        # MEND writes the counterfactual `alt`. MEMIT's evaluation, which later work follows, writes the right answer
        target_new=answers[0].strip(),
        paraphrase_prompts=(_get(record, "rephrase", str),),
        neighborhood_prompts=(question if question.endswith("?") else question + "?",),
        neighborhood_target=_get(record, "loc_ans", str),
        id=str(number),
    )


def _from_own(record: dict[str, Any], number: int) -> Fact:
    return Fact.from_dict(record)


READERS: dict[str, Callable[[dict[str, Any], int], Fact]] = {
    "counterfact": _from_counterfact,
    "counterfact_flat": _from_counterfact_flat,
    "zsre": _from_zsre,
    "jsonl": _from_own,
}
"""Format -> function of (record, its number) that returns the fact."""

_MARKS = {
    "counterfact": {"requested_rewrite"},
    "counterfact_flat": {"prompt", "ground_truth"},
    "zsre": {"src", "answers"},
    "jsonl": {"prompt", "target_new"},
}


def records(path: Path, limit: int | None) -> Iterator[Any]:
    """Parsed records of a JSON list (files ending in .json) or of JSON lines (other files), at most `limit`."""
    number = 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            if path.suffix == ".json":
                content = file.read()
                if content.strip():
                    top = json.loads(content)
                    if not isinstance(top, list):
                        raise FactError(
                            f"{path}: the top level is {json_name(top)}; expected a list of records, "
                            "or one record a line in a file ending in .jsonl"
                        )
                    yield from islice(top, limit)
                return
            for line in file:
                if number == limit:
                    return
                if line.strip():
                    yield json.loads(line)
                    number += 1
    except json.JSONDecodeError as error:
        where = f"{path}: line {error.lineno}" if path.suffix == ".json" else f"{path}: record {number}"
        lines = path.suffix == ".json" and error.msg == "Extra data"
        hint = "one record a line belongs in a file ending in .jsonl" if lines else "is the file truncated?"
        raise FactError(f"{where}: not valid JSON ({error.msg} at column {error.colno}); {hint}") from error
    except UnicodeDecodeError as error:
        raise FactError(f"{path}: not UTF-8 text ({error}); save the file as UTF-8") from error


def json_name(value: Any) -> str:
    """JSON's name for the type of a value, with its article."""
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def format_of(record: Any) -> str | None:
    """The first format whose marking fields are all in the record; None if there is none."""
    if not isinstance(record, dict):
        return None
    return next((name for name, marks in _MARKS.items() if marks <= record.keys()), None)
