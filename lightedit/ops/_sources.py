"""A short name for the native sources, shared by the build and the check of what was built. Imports no torch."""

import hashlib
from pathlib import Path


def digest(folder: Path) -> str:
    """Hash names and contents of the C++ and CUDA files under `folder`: 16 hexadecimal digits."""
    total = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.suffix in {".cpp", ".cu", ".cuh", ".h"}):
        content = file.read_bytes()
        total.update(f"{file.relative_to(folder).as_posix()} {len(content)}\n".encode() + content)
    return total.hexdigest()[:16]
