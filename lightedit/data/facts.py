"""Reading, writing and checking lists of facts."""

import json
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightedit.data.fact import Fact, FactError, Serving
from lightedit.data.formats import FORMATS, form_of
from lightedit.data.records import json_name, records
from lightedit.errors import MissingFileError
from lightedit.files import whole_file

__all__ = ["Fact", "FactError", "check_facts", "distinct_facts", "read_facts", "write_facts"]

_TESTS = ("paraphrase_prompts", "attribute_prompts", "generation_prompts", "portability")


def read_facts(path: str | os.PathLike[str], limit: int | None = None, format: str | None = None) -> list[Fact]:
    """Read facts from a file.

    The file holds a JSON list, one JSON record a line, a CSV table or a YAML list, whatever its suffix. Records may
    have these forms, which [facts](docs/facts.md) describes:

    - `fact`: the fields of `Fact`, as `write_facts` writes them; of a CSV table, one column each;
    - `counterfact`, `zsre`, `easyedit` (also KnowEdit's), `mquake`, `mzsre`, `fastedit`, `known`, `wikibigedit`,
      `qaedit`, `rippleedits`, `labelled`: those of published data sets and tools. Fields that only score an edit may
      be missing. Where an answer is a list of answers or aliases, the first is taken.

    A fact that repeats an earlier one is dropped with a warning; see `distinct_facts`.

    Args:
        path: the file.
        limit: number of facts to read, at least 1; later records are not checked. None reads all.
        format: one of the names above; None recognises it by the fields of the first record.

    Raises:
        MissingFileError: there is no such file.
        FactError: the file, its format or a record is invalid. The message names the file, the line or the record,
            both counted from 1, and the field.
    """
    path = Path(path)
    if limit is not None and limit < 1:
        raise FactError(f"limit: {limit} facts asked of {path}; expected at least 1, or None for all")
    if format is not None and format not in FORMATS:
        raise FactError(
            f"format: {format!r} is unknown; expected one of {', '.join(FORMATS)}. Whether a file holds JSON, CSV or "
            "YAML is seen from its content"
        )
    if not path.exists():
        raise MissingFileError(f"{path}: no such file of facts")
    facts, repeats = _distinct(_facts_of(path, format), limit)
    if not facts:
        raise FactError(f"{path}: holds no facts; expected at least one record")
    _warn_of(repeats, f"{path}: ")
    return facts


def _facts_of(path: Path, format: str | None) -> Iterator[Fact]:
    asked = format
    for number, (where, record) in enumerate(records(path)):
        try:
            if not isinstance(record, dict):
                raise FactError(f"expected an object with fields, got {json_name(record)}")
            form = form_of(record, format)
            yield from form.read(record, number)
        except FactError as error:
            read_as = f" (read as {format}; --format, or format=, names another)" if format and not asked else ""
            raise FactError(f"{path}: {where}: {error}{read_as}") from error
        format = form.format


def write_facts(path: str | os.PathLike[str], facts: Iterable[Fact]) -> None:
    """Write facts as JSON lines, which `read_facts` reads back unchanged.

    The file is written completely or not at all. An interrupted call leaves an earlier file unchanged.

    Raises:
        FactError: `path` ends in `.json`, and other programs would expect one JSON list there.
    """
    path = Path(path)
    if path.suffix == ".json":
        raise FactError(f"{path}: facts are written one a line; name the file {path.with_suffix('.jsonl').name}")
    with whole_file(path) as unfinished, unfinished.open("w", encoding="utf-8", newline="\n") as file:
        for fact in facts:
            file.write(json.dumps(fact.to_dict(), ensure_ascii=False) + "\n")


def distinct_facts(facts: Iterable[Fact]) -> list[Fact]:
    """The facts without those that repeat an earlier one, with a warning that says how many were dropped.

    A fact repeats the last one of the same text, served alike, if it has the same target; letter case counts. The one
    that stays also gets the paraphrases, attribute and generation prompts and portability questions that only the other
    has.
    """
    kept, repeats = _distinct(facts)
    _warn_of(repeats)
    return kept


def _distinct(facts: Iterable[Fact], limit: int | None = None) -> tuple[list[Fact], list[Fact]]:
    """The first `limit` distinct facts, and the repeats among them."""
    kept: list[Fact] = []
    repeats: list[Fact] = []
    latest: dict[tuple[str, Serving], int] = {}
    for fact in facts:
        index = latest.get((fact.text, fact.serving))
        if index is not None and kept[index].target_new == fact.target_new:
            repeats.append(fact)
            kept[index] = _with_tests(kept[index], fact)
        else:
            latest[fact.text, fact.serving] = len(kept)
            kept.append(fact)
        if len(kept) == limit:
            break
    return kept, repeats


def _with_tests(fact: Fact, other: Fact) -> Fact:
    added: dict[str, Any] = {
        name: (*getattr(fact, name), *(test for test in getattr(other, name) if test not in getattr(fact, name)))
        for name in _TESTS
    }
    return replace(fact, **added)


def _warn_of(repeats: Sequence[Fact], where: str = "") -> None:
    """Warn of facts that were dropped; the warning points to the caller's caller."""
    if repeats:
        many = len(repeats) > 1
        said = f"{len(repeats)} facts repeat earlier ones and are" if many else "1 fact repeats an earlier one and is"
        first = f"{repeats[0].text!r} with {repeats[0].target_new!r}"
        warnings.warn(f"{where}{said} dropped{', first' if many else ':'} {first}", stacklevel=3)


def check_facts(facts: Sequence[Fact], facts_per_round: int | None = None) -> None:
    """Check that the facts of each round can be written together.

    Args:
        facts: the facts.
        facts_per_round: facts written together; None for all.

    Raises:
        FactError: there are none, or two of one round complete the same text. The message counts facts from 1.
    """
    if not facts:
        raise FactError("facts: the list is empty; give at least one fact")
    size = facts_per_round or len(facts)
    first: dict[tuple[int, str, Serving], int] = {}
    for number, fact in enumerate(facts):
        earlier = first.setdefault((number // size, fact.text, fact.serving), number)
        if earlier != number:
            raise FactError(
                f"facts {earlier + 1} and {number + 1}: both complete {fact.text!r}, "
                f"with {facts[earlier].target_new!r} and {fact.target_new!r}; keep one of them, or write the newer one "
                "in a later round (facts_per_round)"
            )
