"""Scores of finished chunks, kept on disk so that an interrupted run can resume."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightedit.files import whole_file
from lightedit.metrics import RecordScores
from lightedit.runs.folder import ResumeError, check_run, kept_chunks, kept_rounds, locked, remove_run, start_run


class KeptScores:
    """The scores of finished facts in a run's folder, one file a chunk.

    Attributes:
        records: fact's index -> its scores.
        seconds: time spent on computing them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.records: dict[int, RecordScores] = {}
        self.seconds = 0.0
        for file in kept_chunks(folder):
            try:
                content = json.loads(file.read_text(encoding="utf-8"))
                records = {int(index): RecordScores.from_dict(fields) for index, fields in content["records"].items()}
                self.records.update(records)
                self.seconds += float(content["seconds"])
            except (ValueError, TypeError, LookupError, AttributeError) as error:
                raise ResumeError(
                    f"{file} is truncated or was altered ({error!r}); delete it to score its facts again"
                ) from error

    def add(self, records: Mapping[int, RecordScores], seconds: float) -> None:
        """Write the scores of one chunk, fact's index -> scores."""
        self.records.update(records)
        self.seconds += seconds
        content = {"seconds": seconds, "records": {index: record.to_dict() for index, record in records.items()}}
        with whole_file(self.folder / f"chunk-{min(records):06}.json") as unfinished:
            unfinished.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


@contextmanager
def kept_scores(folder: Path, settings: dict[str, Any]) -> Iterator[KeptScores]:
    """Open the folder of a run with these settings; it is created if it does not exist.

    Delete the folder once the scores are saved. It is removed on exit if it holds no scores.

    Raises:
        ResumeError: the folder holds another run, a file is damaged, or another process uses the folder.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]  # innermost first
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        settings = json.loads(json.dumps(settings))
        if kept_chunks(folder) or kept_rounds(folder):
            check_run(folder, settings)
        else:
            start_run(folder, "scores", settings)
        try:
            yield KeptScores(folder)
        finally:
            if not kept_chunks(folder):  # most likely wrong input: leave no empty folder behind
                remove_run(folder)
                for place in made:
                    if place.is_dir() and not any(place.iterdir()):
                        place.rmdir()
