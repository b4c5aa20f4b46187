"""The house can be seen through: imports go one way, files and functions fit a reader's eye."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "gateway").rglob("*.py"))
}
MOST_LINES, MOST_OF_A_FUNCTION = 400, 60


def imported(path: Path) -> set[str]:
    """Files of the gateway that one imports, wherever in it, but for types alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            node.body = [ast.Pass()]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & FILES.keys()


def test_no_file_imports_one_that_imports_it() -> None:
    graph = {name: imported(path) - {name} for name, path in FILES.items()}
    # A package's face hands on names of its own files, which may import each other but not the face.
    assert list(TopologicalSorter(graph).static_order())


def test_files_and_functions_are_short() -> None:
    for path in FILES.values():
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= MOST_LINES, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                assert node.end_lineno - node.lineno < MOST_OF_A_FUNCTION, f"{path}: {node.name}"


def test_every_file_of_the_proxy_has_its_tests() -> None:
    tests = {path.stem.removeprefix("test_") for path in Path(__file__).parent.glob("test_*.py")}
    files = {path.stem for path in (ROOT / "gateway/proxy").glob("*.py")} - {"__init__"}
    assert files - tests == {"escalations", "fields"}, "which test_limits.py and test_body.py have"
