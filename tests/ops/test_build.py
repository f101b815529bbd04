"""The build, as far as it needs no compiler."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_an_extension_that_is_left_out_removes_the_one_that_was_there(tmp_path: Path) -> None:
    """An editable install loads what lies in the source folder."""
    shutil.copy(ROOT / "setup.py", tmp_path)
    (tmp_path / "lightedit").mkdir()
    built = tmp_path / "lightedit" / "_native.so"
    built.write_bytes(b"of an earlier build")
    environment = {**os.environ, "LIGHTEDIT_BUILD_EXT": "0"}
    subprocess.run([sys.executable, "setup.py", "--name"], cwd=tmp_path, env=environment, check=True)
    assert not built.exists()
    assert "LIGHTEDIT_BUILD_EXT=0" in built.with_name("_native_missing.txt").read_text()
