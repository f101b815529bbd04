"""What the documents say can be done: commands parse, files and links are there, the README's code runs."""

import contextlib
import io
import json
import re
import shlex
from functools import cache, wraps
from pathlib import Path
from typing import Any

import lightning
import pytest

import lightedit as le
from lightedit import __main__ as command_line
from lightedit.data.formats import FORMATS
from tests.methods.hypernetworks.trained import saved
from tests.models import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS = [*PAGES, ROOT / "CONTRIBUTING.md"]

# What a tiny model and a short time need, in the README's Python: text -> what stands for it
SUBSTITUTIONS = {
    "le.tune(lm)": "le.tune(lm, settings=le.TuningSettings(facts=1, depths=(0.3,), clamps=(1.0,), shares=(0.9,)))",
    "facts_per_round=100": "facts_per_round=1",
}


def code_lines(document: Path) -> list[str]:
    """Lines of indented and fenced code, those that end in a backslash joined to the next."""
    text = re.sub(r"\\\n\s*", " ", document.read_text())
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    indented = re.findall(r"^    (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return [line for block in fenced for line in block.splitlines()] + indented


def inline_code(document: Path) -> list[str]:
    """Code in backticks, its line breaks made spaces."""
    text = re.sub(r"^```.*?^```|^    .*$", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [" ".join(found.split()) for found in re.findall(r"`([^`]+)`", text)]


def commands(document: Path) -> list[str]:
    return [line for line in code_lines(document) if line.startswith("lightedit ")]


COMMANDS = [(page, command) for page in PAGES for command in commands(page)]


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """The commands that would have run, with their arguments, in place of running them."""
    calls: list[tuple[str, dict[str, Any]]] = []

    def recorder(name: str, command: Any) -> Any:
        @wraps(command)
        def record(**arguments: Any) -> None:
            calls.append((name, arguments))

        return record

    def recorders(commands: dict[str, Any], group: str = "") -> dict[str, Any]:
        return {
            name: recorders(command, f"{name} ")
            if isinstance(command, dict)
            else command
            if isinstance(command, str)
            else recorder(group + name, command)
            for name, command in commands.items()
        }

    monkeypatch.setattr(command_line, "COMMANDS", recorders(command_line.COMMANDS))
    return calls


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the documents' commands are typed: with the configurations, and a trained network."""
    here = tmp_path_factory.mktemp("documents")
    (here / "configs").symlink_to(ROOT / "configs")
    lm = le.LanguageModel(tiny_model("llama"), tiny_tokenizer("bytelevel"))
    (here / "editors").mkdir()
    saved(lm, le.MEND(layers=(2, 3), rank=8), here / "editors" / "mend")
    return here


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[f"{page.name}: {line[:60]}" for page, line in COMMANDS])
def test_a_command_of_the_documents_is_understood(
    page: Path, command: str, called: list[tuple[str, dict[str, Any]]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    arguments = shlex.split(command, comments=True)[1:]
    command_line.main(arguments)
    ((name, _),) = called
    assert name.split() == arguments[: len(name.split())]


def test_a_command_that_is_wrong_would_be_noticed(called: list[tuple[str, dict[str, Any]]]) -> None:
    with pytest.raises(SystemExit) as stop:
        command_line.main(["evaluate", "--lm", "smollm2", "--facts", "facts.jsonl", "--edits", "x", "--no_such", "1"])
    assert stop.value.code == 2 and not called


def test_the_documents_show_every_command() -> None:
    spoken = [command for page in PAGES for command in [*commands(page), *inline_code(page)]]
    shown = {
        name for name in command_line.commands() for command in spoken if f"{command} ".startswith(f"lightedit {name} ")
    }
    assert shown | {"demo"} == command_line.commands().keys()  # that one is `make demo`


@cache
def options() -> frozenset[str]:
    """Every option of every command, from their help."""
    found: set[str] = set()
    for name in command_line.commands():
        with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit):
            command_line.main([*name.split(), "--help"])
        found |= set(re.findall(r"--[\w.]+", printed.getvalue()))
    return frozenset(found)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_options_that_a_document_names_exist(page: Path) -> None:
    named = {option for code in inline_code(page) for option in re.findall(r"(?<!\S)--[a-z_]+", code)}
    assert named <= options()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_configurations_that_a_document_names_exist(document: Path) -> None:
    for name in re.findall(r"\bconfigs/[\w./-]*", document.read_text()):
        assert (ROOT / name.rstrip(".")).exists(), name


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_lead_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if "://" in link or link.startswith("mailto:"):
            continue
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def anchors(document: Path) -> set[str]:
    """What GitHub calls the headings of a document."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readmes_record_is_a_fact(tmp_path: Path) -> None:
    [record] = re.findall(r"^    (\{.*?\})$", README.read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "facts.jsonl").write_text(json.dumps(json.loads(record)) + "\n")
    [fact] = le.read_facts(tmp_path / "facts.jsonl")
    assert fact.paraphrase_prompts and fact.neighborhood_prompts


def test_the_tables_of_facts_that_the_documents_show_are_read(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "facts.md").read_text()
    shown = re.findall(r"^```(yaml|csv)$\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert [kind for kind, _ in shown] == ["yaml", "csv"]
    for kind, content in shown:
        (tmp_path / f"facts.{kind}").write_text(content)
        [fact] = le.read_facts(tmp_path / f"facts.{kind}")
        assert fact.text == "The capital of France is" and len(fact.paraphrase_prompts) == 2
        assert fact.portability == (("The river in the capital of France is the", "Tiber"),)


def test_the_documents_name_every_format() -> None:
    page = (ROOT / "docs" / "facts.md").read_text()
    assert {*re.findall(r"^\| `(\w+)` \| .* \| .* \| .* \|$", page, re.MULTILINE), "fact"} == {*FORMATS}


def test_the_readmes_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIGHTEDIT_CACHE", str(tmp_path / "cache"))

    def load(*arguments: Any, **settings: Any) -> le.LanguageModel:
        return le.LanguageModel(tiny_model("llama"), tiny_tokenizer("bytelevel"))

    monkeypatch.setattr(le.LanguageModel, "load", load)
    Path("wiki.txt").write_text("The river is long and the city is old. Paris is in France. " * 200)
    text = README.read_text()
    assert all(expected in text for expected in SUBSTITUTIONS)
    # what the README leaves to the reader
    known: dict[str, Any] = {
        "lightning": lightning,
        "method": le.MEMIT(layers=[1, 2], lambda_=10.0, values=le.ValueSettings(steps=2)),
    }
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    for block in blocks:
        for expected, tiny in SUBSTITUTIONS.items():
            block = block.replace(expected, tiny)
        exec(compile(block, "README.md", "exec"), known)
    saved = re.findall(r'\.save\("(.*?)"', "".join(blocks))
    assert saved and all(Path(folder).exists() for folder in saved)
