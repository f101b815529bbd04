"""Reading, writing and checking lists of facts."""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from lightedit.data.fact import Fact, FactError
from lightedit.data.readers import READERS, format_of, json_name, records
from lightedit.errors import MissingFileError
from lightedit.files import whole_file

__all__ = ["Fact", "FactError", "check_facts", "read_facts", "write_facts"]


def read_facts(path: str | os.PathLike[str], limit: int | None = None, format: str | None = None) -> list[Fact]:
    """Read facts from a file.

    A file ending in `.json` holds a list of records, any other file one JSON record a line. Formats:

    - `counterfact`: the nested records of CounterFact (Meng et al., 2022), with `requested_rewrite`, and optionally the
      portability question of Yao et al. (2023);
    - `counterfact_flat`: `prompt` (subject filled in), `subject`, `target_new`, `ground_truth`,
      `locality_prompt`, `locality_ground_truth`, and optionally `rephrase_prompt`;
    - `zsre`: the records of MEND (Mitchell et al., 2022): `src`, `rephrase`, `subject`, `answers`, `loc`,
      `loc_ans`. The first answer is the new target, as in MEMIT's evaluation. Portability questions are left out,
      because they follow from `alt`;
    - `jsonl`: the field names of `Fact`, as `write_facts` writes them.

    Args:
        path: the file.
        limit: number of records to read, at least 1; later records are not checked. None reads all.
        format: one of the names above; None recognises it by the fields of the first record.

    Raises:
        MissingFileError: there is no such file.
        FactError: the file, its format or a record is invalid. The message names file, record (from 0) and field.
    """
    path = Path(path)
    if limit is not None and limit < 1:
        raise FactError(f"limit: {limit} facts asked of {path}; expected at least 1, or None for all")
    if format is not None and format not in READERS:
        raise FactError(f"format: {format!r} is unknown; expected one of {', '.join(READERS)}")
    if not path.exists():
        raise MissingFileError(f"{path}: no such file of facts")

    facts = []
    for number, record in enumerate(records(path, limit)):
        if not isinstance(record, dict):
            raise FactError(
                f"{path}: record {number}: expected an object with fields, got {json_name(record)}; "
                "one list of all records belongs in a file ending in .json"
            )
        if format is None:
            format = format_of(record)
        if format is None:
            raise FactError(
                f"{path}: record {number}: format not recognised by the fields "
                f"{', '.join(record) or '(none)'}; pass format=, one of {', '.join(READERS)}"
            )
        try:
            facts.append(READERS[format](record, number))
        except FactError as error:
            raise FactError(f"{path}: record {number}: {error}") from error
    if not facts:
        raise FactError(f"{path}: holds no facts; expected at least one record")
    return facts


def write_facts(path: str | os.PathLike[str], facts: Iterable[Fact]) -> None:
    """Write facts as JSON lines, which `read_facts` reads back unchanged.

    The file is written completely or not at all. An interrupted call leaves an earlier file unchanged.

    Raises:
        FactError: `path` ends in `.json`, so it would be read as one JSON list.
    """
    path = Path(path)
    if path.suffix == ".json":
        raise FactError(f"{path}: facts are written one a line; name the file {path.with_suffix('.jsonl').name}")
    with whole_file(path) as unfinished, unfinished.open("w", encoding="utf-8", newline="\n") as file:
        for fact in facts:
            file.write(json.dumps(fact.to_dict(), ensure_ascii=False) + "\n")


def check_facts(facts: Sequence[Fact]) -> None:
    """Check that the facts can be written together.

    Raises:
        FactError: there are none, or two facts have the same text, ignoring letter case.
    """
    if not facts:
        raise FactError("facts: the list is empty; give at least one fact")
    first: dict[str, int] = {}
    for number, fact in enumerate(facts):
        earlier = first.setdefault(fact.text.casefold(), number)
        if earlier != number:
            raise FactError(
                f"facts {earlier} and {number}: both complete {fact.text!r}, "
                f"with {facts[earlier].target_new!r} and {fact.target_new!r}; keep one of them"
            )
