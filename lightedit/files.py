"""Atomic writes: a file or folder appears completely or not at all, and is synced to disk when it appears."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_WINDOWS = os.name == "nt"


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder, which is renamed to `path` on success.

    If the context raises, `path` stays as it was and the temporary file is deleted. A killed process leaves the
    temporary file, whose name begins with a dot and ends in `.tmp`.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield unfinished
        _open_to_others(unfinished)
        _sync(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    _sync(path.parent)


@contextmanager
def whole_folder(folder: Path, finished_by: str | None = None) -> Iterator[Path]:
    """Yield an empty temporary folder beside `folder`, which is renamed to `folder` on success and replaces an old one.

    If the context raises, `folder` stays as it was and the temporary folder is deleted.

    Args:
        folder: the folder; its missing parents are created.
        finished_by: name of a file that only a finished folder holds. If `folder` holds it at the end, another process
            was faster, and its folder stays.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        yield unfinished
        for path in (*unfinished.rglob("*"), unfinished):
            _open_to_others(path)
            _sync(path)
        if not _is_finished(folder, finished_by):
            _take_the_place(unfinished, folder, finished_by)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    _sync(folder.parent)


def _take_the_place(unfinished: Path, folder: Path, finished_by: str | None) -> None:
    """Rename `unfinished` to `folder`. If that fails, an earlier folder is put back."""
    old = unfinished.with_name(unfinished.name + ".old")
    try:
        if folder.exists():
            folder.rename(old)
        unfinished.rename(folder)
    except OSError:
        if not _is_finished(folder, finished_by):
            if old.exists():
                old.rename(folder)
            raise
    if old.exists():
        shutil.rmtree(old)


def _is_finished(folder: Path, finished_by: str | None) -> bool:
    return finished_by is not None and (folder / finished_by).is_file()


def _sync(path: Path) -> None:
    """Sync a file's content, or a folder's list of names, to disk. Windows syncs no folder, and no read-only file."""
    if _WINDOWS and path.is_dir():
        return
    opened = os.open(path, os.O_RDWR if _WINDOWS else os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _open_to_others(path: Path) -> None:
    """Give `path` the default mode of a new file or folder. safetensors files and temporary folders start private."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
