"""Digests tell what differs, and agree with sha256sum."""

import hashlib
from pathlib import Path

import torch

from lightedit.digests import digest, file_digest


def test_texts_bytes_and_files_have_the_usual_sha256(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes("Bärn".encode())
    expected = hashlib.sha256("Bärn".encode()).hexdigest()
    assert digest("Bärn") == digest("Bärn".encode()) == file_digest(tmp_path / "file") == expected


def test_tensors_count_with_name_dtype_shape_and_values_but_not_order() -> None:
    tensor = torch.arange(6.0)
    others = [
        digest("", {"a": tensor}), digest("", {"b": tensor}), digest("x", {"a": tensor}), digest("", {}),
        digest("", {"a": tensor.view(2, 3)}), digest("", {"a": tensor.view(torch.int32)}),
        digest("", {"a": tensor.flip(0)}), digest("", {"a": tensor, "b": tensor}),
    ]  # fmt: skip
    assert len(set(others)) == len(others)
    assert digest(tensors={"b": tensor, "a": tensor}) == others[-1]
    assert digest(tensors={"a": torch.arange(6.0).view(2, 3).T.contiguous().T}) == digest(
        tensors={"a": tensor.view(2, 3)}
    )
