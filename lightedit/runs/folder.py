"""The folder of a run that can be resumed.

`run.json` holds all settings that determine the run. A run that edits adds a file for each finished round, such as
`round-0001.safetensors`, with the round's updates and keys. A run of the single protocol adds a file for each finished
chunk of facts, such as `chunk-000032.json`. Files are only added, so the cost of a checkpoint does not grow with the
number of rounds. The training of a model has one file, `training.ckpt`, which it replaces. Each file is written
completely or not at all, so a process may be killed at any time.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lightedit.errors import LightEditError
from lightedit.files import whole_file

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_FORMAT = 3
_RUN = "run.json"
_ROUNDS = "round-*.safetensors"
_CHUNKS = "chunk-*.json"
_STATE = "training.ckpt"
_UNFINISHED = ".*.tmp"
_LOCK = ".lock"
_ANEW = "choose another folder, or delete this one to start anew (on the command line: another --out, or --restart)"


class ResumeError(LightEditError, ValueError):
    """A run cannot resume from its folder. The message names the file or setting and the way out."""


def kept_rounds(folder: Path) -> list[Path]:
    """The files of the finished rounds in a run's folder, in order. The list is empty if the folder does not exist.

    Raises:
        ResumeError: the file of a round is missing, and a later one is there.
    """
    files = sorted(folder.glob(_ROUNDS), key=lambda file: (len(file.name), file.name))
    for number, file in enumerate(files, 1):
        if file != round_file(folder, number):
            raise ResumeError(
                f"{round_file(folder, number)} is missing, but {file.name} is there; restore it, or delete the "
                "rounds after it to repeat them"
            )
    return files


def kept_chunks(folder: Path) -> list[Path]:
    """The files of the finished chunks in a run's folder. The list is empty if the folder does not exist."""
    return sorted(folder.glob(_CHUNKS))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Within the context, hold the lock of the run in `folder`. The system also releases it when the process dies.

    Unfinished files of a killed process are deleted first.

    Raises:
        ResumeError: another process holds the lock, or the folder cannot be locked.
    """
    with _folder_held(folder) if fcntl else _file_held(folder):
        for unfinished in folder.glob(_UNFINISHED):
            unfinished.unlink()
        yield


@contextmanager
def _folder_held(folder: Path) -> Iterator[None]:
    """Hold the lock of the folder itself, which leaves no file."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _busy(folder) from None
        except OSError as error:
            raise _no_locks(folder, error) from error
        yield
    finally:
        os.close(lock)


@contextmanager
def _file_held(folder: Path) -> Iterator[None]:
    """Hold the lock of a file in the folder, where folders cannot be locked (Windows)."""
    file = folder / _LOCK
    lock = FileLock(file, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise _busy(folder) from None
    except (OSError, NotImplementedError) as error:
        raise _no_locks(folder, error) from error
    try:
        yield
    finally:
        lock.release()
        with suppress(OSError):  # another process has it open, or the run was removed
            file.unlink(missing_ok=True)


def _busy(folder: Path) -> ResumeError:
    return ResumeError(f"another process is at work on the run in {folder}; let it finish, or choose another folder")


def _no_locks(folder: Path, error: Exception) -> ResumeError:
    return ResumeError(f"{folder} cannot be locked ({error}); choose a folder on another file system")


def remove_run(folder: Path) -> None:
    """Delete the files of a run, and its folder if it is then empty."""
    for pattern in (_ROUNDS, _CHUNKS, _STATE, _RUN, _UNFINISHED):
        # the last round first, so that an interrupted deletion leaves a run that can be resumed
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
    """Check that the run in `folder` has these settings, and return its id.

    Raises:
        ResumeError: `run.json` is missing, damaged or of another format, or settings differ; the message names them.
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
    """Names of the settings that differ, with both values if these are short."""
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


def round_file(folder: Path, number: int) -> Path:
    """The file of a finished round, counted from 1."""
    return folder / _ROUNDS.replace("*", f"{number:04}")


def state_file(folder: Path) -> Path:
    """The file of a training's latest state."""
    return folder / _STATE
