"""The files of a run that can be continued.

`run.json` names all that determines the run. A run that edits has a file for each finished round, such as
`round-0001.safetensors`, with its updates and keys; one that scores single edits has a file for each finished chunk of
facts, such as `chunk-000032.json`. Files are only added, each whole or not at all, so a process may be killed at any
moment and a checkpoint costs the same after a thousand rounds as after one.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor

from lightedit.digests import digest
from lightedit.files import whole_file
from lightedit.lm import Place
from lightedit.lm.weights import LowRankUpdate

_FORMAT = 3
_RUN = "run.json"
_ROUNDS = "round-*.safetensors"
_CHUNKS = "chunk-*.json"
_UNFINISHED = ".*.tmp"
_TENSORS = ("updates", "keys", "random")
_ANEW = (
    "choose another folder, or delete this one to start anew (on the command line: another --out, or --restart true)"
)


class ResumeError(ValueError):
    """A run cannot go on from its folder; the message names the file or setting and the way out."""


@dataclass(frozen=True)
class Round:
    """One finished round, and what a process needs to go on after it.

    Attributes:
        run: id of the run's edit.
        number: of the round, from 1.
        facts: facts in the round.
        last: whether the fit ended with it.
        seconds: of the run so far, by step.
        tokens: of the run so far, by kind.
        steps: optimizer steps of the run so far.
        batches: the trainer's count of batches.
        stopped: why a callback ended the fit with it, if one did.
        tables: this round's rows of `Edit.tables`.
        updates: matrix -> update.
        keys: matrix -> keys, [d_in, B] float64, where the method keeps past keys.
        random: state of torch's random numbers on the CPU after the round.
    """

    run: str
    number: int
    facts: int
    last: bool
    seconds: dict[str, float]
    tokens: dict[str, int]
    steps: int
    batches: dict[str, int]
    stopped: str | None
    tables: dict[str, list[dict[str, Any]]]
    updates: dict[Place, LowRankUpdate]
    keys: dict[Place, Tensor]
    random: Tensor

    def save(self, folder: Path) -> None:
        """Write the round's file into `folder`."""
        tensors = {"random": self.random}
        for matrix, update in self.updates.items():
            tensors |= {f"{matrix.key}.left": update.left, f"{matrix.key}.right": update.right}
        # as rows: a round reads its keys row by row, and another memory layout may change the order of sums
        tensors |= {f"{matrix.key}.keys": keys.T for matrix, keys in self.keys.items()}
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        record = json.dumps({name: value for name, value in vars(self).items() if name not in _TENSORS})
        content = save_tensors(tensors, {"record": record, "sha256": digest(record, tensors)})
        with whole_file(_round_file(folder, self.number)) as unfinished:
            unfinished.write_bytes(content)

    @classmethod
    def load(cls, file: Path, run: str, number: int) -> Self:
        """Read round `number` of `run` and check that it is whole.

        Raises:
            ResumeError: it is damaged, or of another run.
        """
        way_out = "delete it and the rounds after it to repeat them"
        try:
            with safe_open(file, "pt") as opened:
                metadata = opened.metadata() or {}
                # copies, because views into the file may be unaligned, which changes sums' order
                tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
            if metadata["sha256"] != digest(metadata["record"], tensors):
                raise ValueError("its checksum is wrong")
            record = json.loads(metadata["record"])
        except (SafetensorError, ValueError, LookupError) as error:
            raise ResumeError(f"{file} is truncated or was altered ({error}); {way_out}") from error
        if (record["run"], record["number"]) != (run, number):
            raise ResumeError(
                f"{file} is round {record['number']} of run {record['run']}, not round {number} of {run}; {way_out}"
            )
        names = (name.removesuffix(".left") for name in tensors if name.endswith(".left"))
        matrices = {matrix: matrix.key for matrix in sorted(map(Place.from_key, names))}
        return cls(
            **record,
            updates={m: LowRankUpdate(tensors[f"{key}.left"], tensors[f"{key}.right"]) for m, key in matrices.items()},
            keys={m: tensors[f"{key}.keys"].T for m, key in matrices.items() if f"{key}.keys" in tensors},
            random=tensors["random"],
        )


def kept_rounds(folder: Path) -> list[Path]:
    """The files of the finished rounds in a run's folder, in order; none if there is no such folder.

    Raises:
        ResumeError: a file is missing between others.
    """
    files = sorted(folder.glob(_ROUNDS), key=lambda file: (len(file.name), file.name))
    for number, file in enumerate(files, 1):
        if file != _round_file(folder, number):
            raise ResumeError(
                f"{_round_file(folder, number)} is missing, but {file.name} is there; restore it, or delete the "
                "rounds after it to repeat them"
            )
    return files


def kept_chunks(folder: Path) -> list[Path]:
    """The files of the finished chunks in a run's folder; none if there is no such folder."""
    return sorted(folder.glob(_CHUNKS))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes off the run in `folder`; the system gives the lock back when the process dies, too.

    Unfinished files that a killed process left there are deleted.

    Raises:
        ResumeError: another process is at work there.
    """
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ResumeError(
                f"another process is at work on the run in {folder}; let it finish, or choose another folder"
            ) from None
        except OSError as error:
            raise ResumeError(f"{folder} cannot be locked ({error}); choose a folder on another file system") from error
        for unfinished in folder.glob(_UNFINISHED):
            unfinished.unlink()
        yield
    finally:
        os.close(lock)


def remove_run(folder: Path) -> None:
    """Delete a run's files, and their folder unless it holds anything else."""
    for pattern in (_ROUNDS, _CHUNKS, _RUN, _UNFINISHED):
        # the last round first, so that what a kill leaves is a run that can go on
        for file in sorted(folder.glob(pattern), reverse=True):
            file.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def start_run(folder: Path, id_: str, settings: dict[str, Any]) -> None:
    """Write `run.json` for a run without finished rounds."""
    run = {"format": _FORMAT, "id": id_, "settings": settings}
    with whole_file(folder / _RUN) as unfinished:
        unfinished.write_text(json.dumps(run, indent=1, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")


def check_run(folder: Path, settings: dict[str, Any]) -> str:
    """The id of the run in `folder`, which must have these settings.

    Raises:
        ResumeError: `run.json` is missing, damaged or of another format, or a setting differs; names what differs.
    """
    file = folder / _RUN
    try:
        run = json.loads(file.read_text(encoding="utf-8"))
        known, id_, format_ = run["settings"], run["id"], run["format"]
        if not isinstance(id_, str):
            raise TypeError(f"id {id_!r}")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ResumeError(
            f"{file} is missing or damaged ({type(error).__name__}: {error}), so what is kept beside it cannot be "
            f"continued; {_ANEW}"
        ) from error
    if format_ != _FORMAT:
        raise ResumeError(f"{file} has format {format_}, this version continues {_FORMAT}; {_ANEW}")
    if differences := _differences(known, settings):
        raise ResumeError(
            f"{folder} holds another run, which differs in {', '.join(differences)}; to continue that run give its "
            f"settings, else {_ANEW}"
        )
    return id_


def _differences(known: Any, now: Any, name: str = "") -> list[str]:
    """Names of the settings that differ, with their values where these are short."""
    if known == now:
        return []
    if isinstance(known, dict) and isinstance(now, dict):
        return [
            difference
            for key in dict.fromkeys([*known, *now])
            for difference in _differences(known.get(key), now.get(key), f"{name}.{key}" if name else key)
        ]
    values = f" ({known!r} there, {now!r} now)"
    return [name + (values if len(values) < 60 else "")]


def _round_file(folder: Path, number: int) -> Path:
    return folder / _ROUNDS.replace("*", f"{number:04}")
