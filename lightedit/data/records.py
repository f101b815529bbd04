"""The records of a file: JSON, JSON lines, CSV or YAML, recognised by content."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import yaml

from lightedit.data.fact import PROMPT_LISTS, FactError

_SEPARATOR = "|"
_DELIMITERS = ",;\t"


def records(path: Path) -> Iterator[tuple[str, Any]]:
    """The records of a file, each with its place in it, such as "line 3" or "record 3", counted from 1.

    A record is read when it is asked for, if the file holds one a line.

    Raises:
        FactError: the file is not UTF-8, or none of JSON, JSON lines, CSV and YAML; the message names file and line.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            content = (line.strip() for line in file)
            first = next((line for line in content if line and not line.startswith("#")), "")
            file.seek(0)
            if first[:1] == "[":
                yield from _json_list(path, file.read())
            elif first[:1] == "{":
                yield from _json_lines(path, file)
            elif _is_yaml(first):
                yield from _yaml(path, file.read())
            elif first:
                yield from _csv(path, file)
    except UnicodeDecodeError as error:
        raise FactError(f"{path}: not UTF-8 text ({error}); save the file as UTF-8") from error


def json_name(value: Any) -> str:
    """JSON's name for the type of a value, with its article."""
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _json_list(path: Path, content: str) -> Iterator[tuple[str, Any]]:
    try:
        entries = json.loads(content)
    except json.JSONDecodeError as error:
        after = error.msg == "Extra data"
        hint = "expected one list of records, or one record a line" if after else "is the file truncated?"
        raise _not_json(path, error.lineno, error, hint) from error
    for number, record in enumerate(entries, 1):
        yield f"record {number}", record


def _json_lines(path: Path, file: TextIO) -> Iterator[tuple[str, Any]]:
    none_yet = True
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if none_yet and not line.rstrip().endswith("}"):
                file.seek(0)
                yield from _json_objects(path, file.read())
                return
            raise _not_json(path, number, error, "is the file truncated?") from error
        none_yet = False
        yield f"line {number}", record


def _json_objects(path: Path, content: str) -> Iterator[tuple[str, Any]]:
    """Records of several lines each, one after the other."""
    decoder, end = json.JSONDecoder(), 0
    while rest := content[end:].lstrip():
        start = len(content) - len(rest)
        try:
            record, end = decoder.raw_decode(content, start)
        except json.JSONDecodeError as error:
            raise _not_json(path, error.lineno, error, "is the file truncated?") from error
        yield f"line {content.count(chr(10), 0, start) + 1}", record


def _not_json(path: Path, line: int, error: json.JSONDecodeError, hint: str) -> FactError:
    return FactError(f"{path}: line {line}: not valid JSON ({error.msg} at column {error.colno}); {hint}")


def _csv(path: Path, file: TextIO) -> Iterator[tuple[str, Any]]:
    """Rows under a header. Empty cells are left out; a cell of a list field holds texts separated by `|`."""
    header = next(line for line in file if line.strip())
    delimiter = max(_DELIMITERS, key=header.count)
    file.seek(0)
    rows = csv.reader(file, delimiter=delimiter, strict=True)
    names: list[str] = []
    line = 1
    try:
        for row in rows:
            where, line = f"line {line}", rows.line_num + 1
            cells = [cell.strip() for cell in row]
            if not any(cells):
                continue
            if not names:
                names = cells
                _check_header(path, where, names)
                continue
            if len(cells) > len(names):
                raise FactError(
                    f"{path}: {where}: {len(cells)} cells under a header of {len(names)}; "
                    f"put texts that hold {delimiter!r} in double quotes"
                )
            yield where, _with_lists(path, where, dict(zip(names, cells, strict=False)))
    except csv.Error as error:
        raise FactError(f"{path}: line {rows.line_num}: not valid CSV ({error}); is a quote left open?") from error


def _check_header(path: Path, where: str, names: list[str]) -> None:
    if len(names) < 2:
        raise FactError(
            f"{path}: {where}: {names[0][:60]!r} is no header of a CSV file, and the file holds neither JSON nor YAML; "
            "expected a JSON list, one JSON record a line, a CSV file whose first line names the fields, or a YAML list"
        )
    for name in names:
        if names.count(name) > 1:
            raise FactError(f"{path}: {where}: two columns are named {name!r}; give each its own name")


def _with_lists(path: Path, where: str, cells: dict[str, str]) -> dict[str, Any]:
    record: dict[str, Any] = {name: cell for name, cell in cells.items() if cell}
    lists = (*PROMPT_LISTS, "neighborhood_answers", "portability_prompts", "portability_answers")
    for name in record.keys() & lists:
        record[name] = [text.strip() for text in record[name].split(_SEPARATOR)]
    prompts, answers = record.pop("portability_prompts", []), record.pop("portability_answers", [])
    if len(prompts) != len(answers):
        raise FactError(
            f"{path}: {where}: portability_prompts holds {len(prompts)} texts and portability_answers {len(answers)}; "
            f"give each prompt one answer, separated by {_SEPARATOR}"
        )
    if prompts:
        record["portability"] = list(zip(prompts, answers, strict=True))
    return record


class _Texts(yaml.SafeLoader):
    """Every scalar is text, so that no, 1984 and 2024-05-01 stay what was written; an empty one and `null` are None."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (the attribute of the base class)
        first: [(tag, pattern) for tag, pattern in resolvers if tag == "tag:yaml.org,2002:null"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def _is_yaml(line: str) -> bool:
    return line == "-" or line.startswith(("- ", "---", "%")) or line.endswith(":") or ": " in line.split(",")[0]


def _yaml(path: Path, content: str) -> Iterator[tuple[str, Any]]:
    loader = _Texts(content)
    try:
        top = loader.get_single_node()
        if isinstance(top, yaml.ScalarNode) and not top.value:
            return
        assert top is not None  # the file has a line that is no comment
        for entry in top.value if isinstance(top, yaml.SequenceNode) else [top]:
            yield f"line {entry.start_mark.line + 1}", loader.construct_object(entry, deep=True)
    except yaml.MarkedYAMLError as error:
        where = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise FactError(
            f"{path}: {where}not valid YAML ({error.problem}); put texts that hold : or # in quotes"
        ) from error
    except yaml.YAMLError as error:
        raise FactError(f"{path}: not valid YAML ({error})") from error
    finally:
        loader.dispose()
