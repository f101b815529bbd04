"""Results of studies as JSON files of a version."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightedit.errors import ArgumentError, MissingFileError
from lightedit.files import whole_file


def write_record(file: Path, version: int, record: Mapping[str, Any]) -> None:
    """Write a result's fields, with the version of the form."""
    with whole_file(file) as unfinished:
        content = json.dumps({"format": version} | dict(record), ensure_ascii=False)
        unfinished.write_text(content, encoding="utf-8")


@contextmanager
def read_record(file: Path, version: int, command: str, again: str) -> Iterator[dict[str, Any]]:
    """The fields that `write_record` wrote, within a context that builds the result from them.

    Args:
        file: the file.
        version: version of the form.
        command: the command whose --out writes such files.
        again: what makes a new one, such as "trace again".

    Raises:
        MissingFileError: there is no such file.
        ArgumentError: it is damaged or of another version.
    """
    if not file.is_file():
        raise MissingFileError(f"{file}: there is no such file; lightedit {command} --out writes it")
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if record.pop("format") != version:
            raise ValueError("it is of another version")
        yield record
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ArgumentError(f"{file} is damaged ({error}); {again}, or delete it") from error
