"""How the fleet is built: no import runs in a circle, and the pages list every module."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "plugins/fleet/src/vmconv_fleet"
ARCHITECTURE, REPLICATION = ROOT / "docs/architecture.md", ROOT / "docs/fleet-replication.md"


def modules() -> dict[str, Path]:
    """Returns the files of all modules, by name."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yields every import of a file but those for annotations, whether at the top or inside a function."""
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting += node.orelse
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        waiting += ast.iter_child_nodes(node)


def imported(path: Path, known: dict[str, Path]) -> set[str]:
    """Returns the modules of the fleet that a file imports."""
    found = set()
    for node in imports(path):
        if isinstance(node, ast.Import):
            found |= {one.name for one in node.names}
        else:
            assert node.level == 0, f"{path}: relative import"
            assert node.module
            found |= {name if (name := f"{node.module}.{one.name}") in known else node.module for one in node.names}
    return found & known.keys()


def test_no_import_runs_in_a_circle() -> None:
    known = modules()
    assert len(known) > 80
    left = {name: imported(path, known) for name, path in known.items()}
    # Modules without a dependency that is left are taken away until none can be; circles, and what needs them, stay.
    while free := {name for name, needed in left.items() if not needed & left.keys()}:
        left = {name: needed for name, needed in left.items() if name not in free}
    assert not left


def test_every_module_is_on_a_page() -> None:
    _, _, section = ARCHITECTURE.read_text().partition("\n## Modules of the fleet\n")
    assert section
    listed = set(re.findall(r"`((?:\w+/)+\w+\.py)`", section.partition("\n## ")[0]))
    listed |= {f"replication/{name}" for name in re.findall(r"`(\w+\.py)`", REPLICATION.read_text())}
    described_as_a_package = {"api", "cli", "console", "testing"}
    existing = {
        str(path.relative_to(SOURCE))
        for path in modules().values()
        if path.name != "__init__.py" and path.parent != SOURCE and path.parent.name not in described_as_a_package
    }
    assert existing == listed
