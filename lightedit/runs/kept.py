"""Records of finished facts, kept on disk so that an interrupted run can resume."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightedit.files import whole_file
from lightedit.runs.folder import ResumeError, check_run, kept_chunks, locked, remove_run, start_run


class KeptRecords:
    """The records of finished facts in a run's folder, one file a fact.

    Attributes:
        records: fact's index -> its record, as JSON holds it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.records: dict[int, dict[str, Any]] = {}
        for file in kept_chunks(folder):
            try:
                content = json.loads(file.read_text(encoding="utf-8"))
                self.records[int(content["index"])] = dict(content["record"])
            except (ValueError, TypeError, LookupError) as error:
                raise ResumeError(
                    f"{file} is truncated or was altered ({error!r}); delete it to repeat its fact"
                ) from error

    def add(self, index: int, record: Mapping[str, Any]) -> None:
        """Write the record of one fact."""
        with whole_file(self.folder / f"chunk-{index:06}.json") as unfinished:
            unfinished.write_text(json.dumps({"index": index, "record": record}, ensure_ascii=False), encoding="utf-8")
        self.records[index] = dict(record)


@contextmanager
def kept_records(folder: Path, id_: str, settings: Mapping[str, Any]) -> Iterator[KeptRecords]:
    """Open the folder of a run with these settings; it is created if it does not exist.

    Delete the folder once the result is saved. It is removed on exit if it holds no records.

    Raises:
        ResumeError: the folder holds another run, a file is damaged, or another process uses the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        given = json.loads(json.dumps(settings))
        if kept_chunks(folder):
            check_run(folder, given)
        else:
            start_run(folder, id_, given)
        try:
            yield KeptRecords(folder)
        finally:
            if not kept_chunks(folder):
                remove_run(folder)
