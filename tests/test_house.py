"""The rules of the house: which module may import which, how long one may be, and what is seen from outside."""

import ast
import importlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import lightedit as le

ROOT = Path(__file__).parents[1]
PACKAGES = ("lightedit", "benchmarks")

MODULE_LINES = 350
FUNCTION_LINES = 60

LAYERS: list[set[str]] = [
    {"errors", "digests", "files", "progress", "figures"},
    {"ops"},
    {"lm"},
    {"data"},
    {"runs"},
    {"statistics", "training"},
    {"metrics"},
    {"methods"},
    {"evaluation"},
    {"editing"},
    {"analysis"},
    {"sweeps", "reports"},
    {"commands"},
    {"__main__"},
]
"""The rooms from low to high: a module imports from its own room and from lower ones. Rooms of one line may not import
each other, but for those of the lowest."""

FREE_TO_SHADOW = "lightedit.ops"  # its files are named as the ops that they hold, and the room gives these out


class Import(NamedTuple):
    """One imported module, or one name of it."""

    importer: str
    imported: str
    name: str | None  # what is taken from it, None for the module itself
    line: int

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}" + (f", {self.name}" if self.name else "")


@lru_cache
def modules() -> dict[str, Path]:
    """Every module of the packages -> its file, read from the disk."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@lru_cache
def tree(module: str) -> ast.Module:
    return ast.parse(modules()[module].read_text())


def imports_of(module: str) -> Iterator[Import]:
    """All imports of our own modules in `module`, wherever they stand: in functions and under TYPE_CHECKING too."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in modules():
                    yield Import(module, alias.name, None, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            source = _source(module, node)
            for alias in node.names:
                if f"{source}.{alias.name}" in modules():
                    yield Import(module, f"{source}.{alias.name}", None, node.lineno)
                elif source in modules():
                    yield Import(module, source, alias.name, node.lineno)


def _source(module: str, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    package = module if modules()[module].name == "__init__.py" else module.rpartition(".")[0]
    for _ in range(node.level - 1):
        package = package.rpartition(".")[0]
    return f"{package}.{node.module}" if node.module else package


def graph() -> dict[str, set[str]]:
    """Module -> the modules that importing it runs, the packages that hold an imported module among them."""
    return {module: {run for found in imports_of(module) for run in _run(found)} - {module} for module in modules()}


def _run(found: Import) -> set[str]:
    parts = found.imported.split(".")
    packages = {".".join(parts[:depth]) for depth in range(1, len(parts))}
    # the packages that hold the importer run before it anyway, and need it no more than it needs them
    return {package for package in packages if not found.importer.startswith(f"{package}.")} | {found.imported}


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected components of more than one module (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in sorted(edges[module]):
            if other not in index:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], index[other])
        if low[module] == index[module]:
            component = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(component) > 1:
                found.append(sorted(component))

    for module in edges:
        if module not in index:
            visit(module)
    return found


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circles(graph()) == []


def test_a_circle_would_be_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]


def room(module: str) -> str:
    """The part of the package that a module belongs to; "" for the package itself, which may import all."""
    return module.split(".")[1] if "." in module else ""


def height(module: str) -> int:
    return next(level for level, rooms in enumerate(LAYERS) if room(module) in rooms)


def test_every_module_has_its_place_in_the_order_of_rooms() -> None:
    known = set.union(*LAYERS)
    assert {room(module) for module in modules() if module.startswith("lightedit.")} <= known


def test_no_import_runs_up() -> None:
    wrong = [
        str(found)
        for module in modules()
        if module.startswith("lightedit.") and room(module) in set.union(*LAYERS)
        for found in imports_of(module)
        if runs_up(module, found.imported)
    ]
    assert wrong == []


def runs_up(module: str, imported: str) -> bool:
    if imported.partition(".")[0] != "lightedit":
        return True  # the package knows nothing of its benchmarks
    if imported == "lightedit":
        return height(module) < height("lightedit.commands")  # commands speak as a user does: import lightedit as le
    same_line = height(imported) == height(module) and room(imported) != room(module) and height(module) > 0
    return same_line or height(imported) > height(module)


def _of_package(module: str) -> bool:
    """Whether it is of the package; benchmarks hold a published loop and long tables."""
    return module.partition(".")[0] == "lightedit"


def test_no_module_is_long() -> None:
    lines = {module: len(path.read_text().splitlines()) for module, path in modules().items() if _of_package(module)}
    assert {module: count for module, count in lines.items() if count > MODULE_LINES} == {}


def test_no_function_is_long() -> None:
    lengths = {
        f"{module}.{node.name}": length(node)
        for module in filter(_of_package, modules())
        for node in ast.walk(tree(module))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {function: count for function, count in lengths.items() if count > FUNCTION_LINES} == {}


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function from its signature on, without its docstring."""
    documented = ast.get_docstring(function, clean=False) is not None
    return _lines(function) - (_lines(function.body[0]) if documented else 0)


def _lines(node: ast.stmt) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def test_no_module_is_hidden_behind_an_attribute_of_its_name() -> None:
    hidden = []
    for module in modules():
        parent, _, name = module.rpartition(".")
        if not parent or parent == FREE_TO_SHADOW or name == "__main__" or "_triton" in module:
            continue
        imported = importlib.import_module(module)
        if getattr(importlib.import_module(parent), name) is not imported:
            hidden.append(module)
    assert hidden == []


def test_from_outside_only_the_public_names_are_seen() -> None:
    assert [name for name in dir(le) if not (name.startswith("__") and name.endswith("__"))] == sorted(le.__all__)
    assert all(hasattr(le, name) for name in le.__all__)


def test_no_private_name_crosses_a_module() -> None:
    assert [str(found) for module in modules() for found in imports_of(module) if _crosses(found)] == []


def _crosses(found: Import) -> bool:
    """Whether the name taken is private, or the module is and stands in a package that does not hold the importer."""
    holder = found.imported.partition("._")[0]
    return _private(found.name or "") or (
        holder != found.imported and not f"{found.importer}.".startswith(f"{holder}.")
    )


def _private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")
