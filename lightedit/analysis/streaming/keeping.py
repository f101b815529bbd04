"""The state of a stream of edits on disk, from which an interrupted one resumes."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor

from lightedit.digests import digest
from lightedit.errors import ArgumentError
from lightedit.files import whole_file
from lightedit.lm.changes import Change, load_changes, save_changes
from lightedit.lm.place import Place
from lightedit.runs.folder import ResumeError, check_run, locked, remove_run, round_file, start_run


@dataclass
class Progress:
    """How far a stream is.

    Attributes:
        rounds: what was written, place -> change; several edits may be in one.
        facts_in_round: edits of each.
        states: the editor's state after each edit; see `Editor.state`.
        record: steps and facts so far, as JSON values.
        random: state of torch's CPU random number generator.
    """

    rounds: list[dict[Place, Change]] = field(default_factory=list)
    facts_in_round: list[int] = field(default_factory=list)
    states: list[dict[str, Tensor]] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)
    random: Tensor = field(default_factory=torch.get_rng_state)


class KeptStream:
    """The folder of one stream, in one file that is replaced as the stream goes on.

    Attributes:
        id: id of the stream's edit.
        found: what an earlier process stored; None if it stored nothing.
    """

    def __init__(self, folder: Path, id_: str) -> None:
        self.id = id_
        self._file = round_file(folder, 1)
        self.found = self._load() if self._file.exists() else None

    def save(self, progress: Progress) -> None:
        """Replace what is stored."""
        tensors: dict[str, Tensor] = {"random": progress.random}
        settings: list[dict[str, Any]] = []
        for number, changes in enumerate(progress.rounds):
            own, of_changes = save_changes(changes, f"round.{number}.")
            tensors |= own
            settings.append(of_changes)
        for number, state in enumerate(progress.states):
            tensors |= {f"state.{number}.{name}": tensor for name, tensor in state.items()}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        record = {"rounds": settings, "facts_in_round": progress.facts_in_round, "states": len(progress.states)}
        text = json.dumps({**record, "record": progress.record})
        content = save_tensors(tensors, {"record": text, "sha256": digest(text, tensors)})
        with whole_file(self._file) as unfinished:
            unfinished.write_bytes(content)

    def _load(self) -> Progress:
        try:
            with safe_open(self._file, "pt") as opened:
                metadata = opened.metadata() or {}
                # copies, because views into the file may be unaligned, which changes sums' order
                tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
            if metadata["sha256"] != digest(metadata["record"], tensors):
                raise ArgumentError("its checksum is wrong")
            kept = json.loads(metadata["record"])
            rounds = [load_changes(tensors, own, f"round.{number}.") for number, own in enumerate(kept["rounds"])]
        except (SafetensorError, ValueError, LookupError) as error:
            raise ResumeError(
                f"{self._file} is truncated or was altered ({error}); delete its folder to start anew"
            ) from error
        states = [_state(tensors, f"state.{number}.") for number in range(kept["states"])]
        return Progress(rounds, kept["facts_in_round"], states, kept["record"], tensors["random"])


def _state(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


@contextmanager
def kept_stream(folder: Path, id_: str, settings: Mapping[str, Any]) -> Iterator[KeptStream]:
    """Open the folder of a stream with these settings; it is created if it does not exist, and removed if unused.

    Raises:
        ResumeError: the folder holds another run, the file is damaged, or another process uses the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        given = json.loads(json.dumps(settings))
        if round_file(folder, 1).exists():
            id_ = check_run(folder, given)
        else:
            start_run(folder, id_, given)
        try:
            yield KeptStream(folder, id_)
        finally:
            if not round_file(folder, 1).exists():
                remove_run(folder)
