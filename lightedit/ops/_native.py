"""The built extension: found, checked against this torch and its own sources, and loaded."""

import re
import warnings
from pathlib import Path

import torch

from lightedit.ops._sources import digest

_PACKAGE = Path(__file__).parents[1]
_FILE = _PACKAGE / "_native.so"
_BUILT = re.compile(rb"lightedit built for torch=(\S*) from sources=(\S*)(?: for gpus=(\S*))? end")
_REBUILD = "the slower reference runs instead; rebuild it with `pip install --no-build-isolation -e .`, or delete it"


def load(file: Path = _FILE, sources: Path = _PACKAGE.parent / "csrc") -> str:
    """Load the extension, if there is one, and say in a few words what became of it.

    One that does not fit is not loaded, because calling it could end the process; a warning says so. Whether it fits is
    read from the file: which torch it was built for, and from which sources, where these are at hand.
    """
    why = file.with_name("_native_missing.txt")  # written by the build
    lacks = f" ({why.read_text(encoding='utf-8').strip()})" if why.is_file() else ""
    if not file.is_file():
        return f"not built{lacks}"
    problem = _mismatch(file.read_bytes(), sources)
    if problem is None:
        try:
            torch.ops.load_library(file)
        except (OSError, RuntimeError) as error:
            problem = f"broken ({error})"
    if problem is None:
        return f"built for torch {torch.__version__.partition('+')[0]}{lacks}"
    warnings.warn(f"the native extension {file} is {problem}: {_REBUILD}", stacklevel=2)
    return problem


def gpu_codes(file: Path = _FILE) -> list[str]:
    """What the CUDA kernels in the extension were compiled for, as nvcc names it, such as sm_80; none without any."""
    found = _BUILT.search(file.read_bytes()) if file.is_file() else None
    return found[3].decode().split(",") if found and found[3] else []


def _mismatch(content: bytes, sources: Path) -> str | None:
    found = _BUILT.search(content)
    if not found:
        return "damaged, or none of lightedit's"
    built, current = found[1].decode(), torch.__version__.partition("+")[0]
    if built != current:
        return f"stale (built for torch {built}, not {current})"
    if sources.is_dir() and found[2].decode() != digest(sources):
        return f"stale (built from other sources than {sources} holds)"
    return None
