"""Files and folders that appear complete or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a path to write to, in the same folder; what stands there becomes `path` at once as the context ends.

    If the context is left by an exception, `path` stays as it was and nothing else is left.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield unfinished
        _open_to_others(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside `folder`; as the context ends it becomes `folder`, in the place of an earlier one.

    If the context is left by an exception, `folder` stays as it was and nothing else is left.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        yield unfinished
        for path in (unfinished, *unfinished.rglob("*")):
            _open_to_others(path)
        if folder.exists():
            old = unfinished.with_name(unfinished.name + ".old")
            folder.rename(old)
            try:
                unfinished.rename(folder)
            except OSError:
                old.rename(folder)
                raise
            shutil.rmtree(old)
        else:
            unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _open_to_others(path: Path) -> None:
    """Give `path` the mode of any new file or folder; safetensors files and temporary folders are private."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
