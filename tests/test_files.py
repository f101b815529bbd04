"""Files and folders that appear whole or not at all."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lightedit.files import whole_file, whole_folder


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_what_others_wrote_for_one_user_is_as_open_as_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "file").touch()
    with whole_file(tmp_path / "tensors") as unfinished:
        save_file({"one": torch.ones(1)}, unfinished)
    with whole_folder(tmp_path / "folder") as unfinished:
        (unfinished / "inner").mkdir()
        save_file({"one": torch.ones(1)}, unfinished / "inner" / "tensors")
    file, folder = mode(tmp_path / "plain" / "file"), mode(tmp_path / "plain")
    assert mode(tmp_path / "tensors") == mode(tmp_path / "folder" / "inner" / "tensors") == file
    assert mode(tmp_path / "folder") == mode(tmp_path / "folder" / "inner") == folder


def test_a_folder_takes_the_place_of_an_earlier_one_only_when_it_is_whole(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "folder"
    for content in ("first", "second"):
        with whole_folder(folder) as unfinished:
            (unfinished / content).touch()
    with pytest.raises(OSError, match="disk full"), whole_folder(folder) as unfinished:
        (unfinished / "third").touch()
        raise OSError("disk full")
    assert [path.name for path in folder.iterdir()] == ["second"]
    assert list(folder.parent.iterdir()) == [folder]


def test_a_file_stays_as_it_was_if_its_successor_breaks_off(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("first")
    with pytest.raises(OSError, match="disk full"), whole_file(path) as unfinished:
        unfinished.write_text("sec")
        raise OSError("disk full")
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]
