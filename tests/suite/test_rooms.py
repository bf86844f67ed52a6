"""How the tests are laid out."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parents[1]

RUN_BY_NAME = {"fleet/mutations.py", "fleet/mutations_kept.py", "fleet/mutations_merged.py"}
"""Programs that run tests by their names, to see whether these notice a mistake."""


def imported(path: Path) -> Iterator[str]:
    """Yields the last part of each module, and each name of a module, that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield (node.module or "").rpartition(".")[2]
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name.rpartition(".")[2] for alias in node.names)


def test_no_file_imports_a_test_or_a_conftest() -> None:
    """What several tests need is in `support`."""
    files = [path for path in TESTS.rglob("*.py") if str(path.relative_to(TESTS)) not in RUN_BY_NAME]
    modules = {path.stem for path in files if path.name.startswith("test_")} | {"conftest"}
    found = {str(path.relative_to(TESTS)): sorted(modules & set(imported(path))) for path in files}
    assert {path: names for path, names in found.items() if names} == {}


def test_every_test_is_in_a_room() -> None:
    assert list(TESTS.glob("test_*.py")) == []
    assert list((TESTS / "support").rglob("test_*.py")) == []
