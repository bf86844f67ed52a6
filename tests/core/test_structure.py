"""The structure of the code: no import cycles, and façades whose names are where they say."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

import vmconv
from vmconv import api, plugin
from vmconv.interface import hooks

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {path.name: path for path in sorted(ROOT.glob("*/src/*")) + sorted(ROOT.glob("plugins/*/src/*"))}


class Import(NamedTuple):
    """One import: `runs` is false for an import that only type checkers see."""

    module: str
    runs: bool


def modules_of(package: Path) -> dict[str, Path]:
    found = {}
    for path in package.rglob("*.py"):
        name = ".".join(path.relative_to(package.parent).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


def imports_of(path: Path, modules: set[str]) -> Iterator[Import]:
    """Yields the imports of a module, also those inside its functions."""
    yield from _imports_in(ast.parse(path.read_text()), modules, runs=True)


def _imports_in(node: ast.AST, modules: set[str], *, runs: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ImportFrom) and child.module:
            for alias in child.names:
                whole = f"{child.module}.{alias.name}"
                yield Import(whole if whole in modules else child.module, runs)
        elif isinstance(child, ast.Import):
            yield from (Import(alias.name, runs) for alias in child.names)
        elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            for part in child.orelse:
                yield from _imports_in(ast.Module([part], []), modules, runs=runs)
            yield from (
                Import(one.module, False) for one in _imports_in(ast.Module(child.body, []), modules, runs=False)
            )
        else:
            yield from _imports_in(child, modules, runs=runs)


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Returns the groups of modules that import each other, by taking away what imports nothing that is left."""
    left = {module: targets - {module} for module, targets in graph.items()}
    while free := [module for module, targets in left.items() if not targets]:
        for module in free:
            del left[module]
        left = {module: targets - set(free) for module, targets in left.items()}
    # What is left imports a cycle or is in one: the latter reach themselves.
    return [[module] for module in sorted(left) if module in _reached(left, module)]


def _reached(graph: dict[str, set[str]], start: str) -> set[str]:
    found: set[str] = set()
    waiting = [start]
    while waiting:
        new = graph[waiting.pop()] - found
        found |= new
        waiting += new
    return found


def test_cycles_are_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}, "e": set()}
    assert cycles(graph) == [["b"], ["c"]]


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_imports_itself_by_any_way(package: str) -> None:
    modules = modules_of(PACKAGES[package])
    names = set(modules)
    graph = {
        module: {one.module for one in imports_of(path, names) if one.runs and one.module in names}
        for module, path in modules.items()
    }
    assert graph[package] is not None
    assert cycles(graph) == []


SHARED = {
    "vmconv_vma": {"vmconv_proxmox", "vmconv_proxmox.backup"},
    "vmconv_vmrs": {"vmconv_hyperv", "vmconv_hyperv.storage"},
}
"""Modules that a plugin offers to another one; docs/decisions, 0071 and 0076."""


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_no_plugin_but_itself(package: str) -> None:
    plugins = set(PACKAGES) - {"vmconv", package}
    paths = modules_of(PACKAGES[package]).values()
    found = {one.module for path in paths for one in imports_of(path, set())} - SHARED.get(package, set())
    assert not plugins & {module.split(".")[0] for module in found}


FACADE = {"vmconv.plugin", "vmconv.testing", "vmconv.machine"}


@pytest.mark.parametrize("package", [name for name in PACKAGES if name.startswith("vmconv_")])
def test_plugins_import_nothing_of_core_but_its_facades(package: str) -> None:
    allowed = FACADE | ({"vmconv.api"} if package in ("vmconv_view", "vmconv_fleet") else set())
    core = set(modules_of(PACKAGES["vmconv"]))
    found = {
        (module, one.module)
        for module, path in modules_of(PACKAGES[package]).items()
        for one in imports_of(path, core)
        if one.module.split(".")[0] == "vmconv" and one.module not in allowed
    }
    assert found == set()


@pytest.mark.parametrize("facade", [plugin, api, vmconv], ids=lambda module: module.__name__)
def test_the_names_of_a_facade_can_be_imported_and_are_typed(facade: ModuleType) -> None:
    assert facade.__file__
    checked = next(
        node
        for node in ast.parse(Path(facade.__file__).read_text()).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    for node in checked.body:
        assert isinstance(node, ast.ImportFrom)
        assert node.module
        for alias in node.names:
            if alias.name in facade.__all__:
                home = importlib.import_module(node.module)
                whole = f"{node.module}.{alias.name}"
                meant = getattr(home, alias.name, None) or importlib.import_module(whole)
                assert getattr(facade, alias.name) is meant
    for name in facade.__all__:
        assert getattr(facade, name) is not None


def test_the_interface_has_a_version() -> None:
    assert plugin.VMCONV_INTERFACE == hooks.VMCONV_INTERFACE >= plugin.OLDEST_INTERFACE
