"""SHA-256 digests of texts, tensors and files. Different content has a different digest."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor


def digest(content: str | bytes = "", tensors: Mapping[str, Tensor] | None = None) -> str:
    """The digest of a text or bytes and of tensors with their names, dtypes and shapes, in 64 hexadecimal digits.

    >>> digest("Rome")[:16]
    'd0d22019186582c6'
    """
    found = hashlib.sha256(content.encode() if isinstance(content, str) else content)
    for name, tensor in sorted((tensors or {}).items()):
        found.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def file_digest(path: str | Path) -> str:
    """The digest of a file's bytes, in 64 hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
