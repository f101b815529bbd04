"""Examples in docstrings run and print what they say; examples in documents are Python."""

import ast
import doctest
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "lightedit").rglob("*.py"))
    if path.name != "__main__.py"
}
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_are_right(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # an example may write files
    written = len(re.findall(r"^\s*>>> ", MODULES[name].read_text(), re.MULTILINE))
    if not written and "_triton" in name:
        return  # may lack Triton
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0
    # one that stands outside of a public object's docstring would be passed over in silence
    assert result.attempted == written


def python_blocks(document: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_examples_of_a_document_are_python(document: Path) -> None:
    for block in python_blocks(document):
        ast.parse(block)


def test_the_readme_has_examples() -> None:
    assert python_blocks(ROOT / "README.md")
