"""Files and folders that appear whole or not at all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lightedit import files
from lightedit.files import whole_file, whole_folder
from lightedit.runs import folder
from lightedit.runs.folder import ResumeError, locked, remove_run


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


def test_a_folder_that_another_process_finished_first_stays(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    with whole_folder(folder, finished_by="done") as unfinished:
        (unfinished / "ours").touch()
        folder.mkdir()
        (folder / "done").touch()
    assert [path.name for path in folder.iterdir()] == ["done"] and list(tmp_path.iterdir()) == [folder]
    (folder / "done").rename(folder / "half")
    with whole_folder(folder, finished_by="done") as unfinished:  # what never was finished is replaced
        (unfinished / "ours").touch()
    assert [path.name for path in folder.iterdir()] == ["ours"] and list(tmp_path.iterdir()) == [folder]


def test_content_is_on_the_disk_before_its_name_and_then_the_name_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    sync, place, rename = os.fsync, os.replace, Path.rename

    def synced(opened: int) -> None:
        events.append(f"sync {'folder' if os.path.isdir(f'/proc/self/fd/{opened}') else 'file'}")
        sync(opened)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda *args: (events.append("appears"), place(*args)))
    monkeypatch.setattr(Path, "rename", lambda path, to: (events.append("appears"), rename(path, to))[1])
    with whole_file(tmp_path / "file") as unfinished:
        unfinished.write_text("content")
    assert events == ["sync file", "appears", "sync folder"]
    events.clear()
    with whole_folder(tmp_path / "folder") as unfinished:
        (unfinished / "file").write_text("content")
    assert events == ["sync file", "sync folder", "appears", "sync folder"]


@pytest.mark.parametrize("posix", [True, False])
def test_a_run_is_locked_with_and_without_the_locks_of_posix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, posix: bool
) -> None:
    if not posix:
        monkeypatch.setattr(folder, "fcntl", None)
    with locked(tmp_path):
        with pytest.raises(ResumeError, match=f"another process is at work on the run in {tmp_path}"), locked(tmp_path):
            pass
        other = (
            f"from lightedit.runs.folder import *; from pathlib import Path\nwith locked(Path({str(tmp_path)!r})): 1"
        )
        without = "import sys; sys.modules['fcntl'] = None\n" if not posix else ""
        found = subprocess.run([sys.executable, "-c", without + other], capture_output=True, text=True)
        assert "ResumeError: another process is at work" in found.stderr
    with locked(tmp_path):
        (tmp_path / "run.json").touch()
        remove_run(tmp_path)
    remove_run(tmp_path)
    assert not tmp_path.exists()


def test_the_package_is_imported_without_the_locks_of_posix() -> None:
    code = "import sys; sys.modules['fcntl'] = None\nimport lightedit.__main__"  # as on Windows
    subprocess.run([sys.executable, "-c", code], check=True)


def test_windows_syncs_files_that_it_may_write_and_no_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, open_ = [], os.open
    monkeypatch.setattr(files, "_WINDOWS", True)
    monkeypatch.setattr(
        os, "open", lambda path, mode, *more: (opened.append((Path(path).name, mode)), open_(path, mode))[1]
    )
    with whole_folder(tmp_path / "folder") as unfinished:
        (unfinished / "file").write_bytes(b"content")
    assert ("file", os.O_RDWR) in opened and {name for name, mode in opened if mode == os.O_RDONLY} == set()
    assert (tmp_path / "folder" / "file").read_bytes() == b"content"


def test_what_a_killed_process_left_is_deleted_when_its_run_goes_on(tmp_path: Path) -> None:
    (tmp_path / ".round-0001.safetensors.17.tmp").touch()
    with locked(tmp_path):
        assert list(tmp_path.iterdir()) == []
