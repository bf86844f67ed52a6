"""Tests the tests: makes one small mistake at a time in the code, and counts the mistakes that no test notices.

    python tests/mutation/run.py                      24 mistakes, spread over all rooms
    python tests/mutation/run.py qcow2 --count 100    100 mistakes in one room
    python tests/mutation/run.py extents --all        every position of a room, one mistake each

cosmic-ray makes the mistakes. They are made in a copy of the tree, which each worker has to itself. A mistake counts as
noticed when a test fails, or when the tests take ten times as long as without it. Mistakes that change no code are left
out: those in annotations, in docstrings and in messages of errors. A surviving mistake that makes no difference is
listed in `equivalent.txt`, with the reason.

Exit status: 0 if the share of noticed mistakes is at least `--least`, else 1.
"""

from __future__ import annotations

import argparse
import ast
import compileall
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

ROOT = Path(__file__).resolve().parents[2]
EQUIVALENT = Path(__file__).with_name("equivalent.txt")
CORE = "core/src/vmconv"


class Part(NamedTuple):
    """Modules, as patterns, and the tests that have to notice mistakes in them, the quickest first."""

    modules: tuple[str, ...]
    tests: tuple[str, ...]


PARSED = {"qcow2", "qed", "vdi", "vhd", "vhdx", "vmdk", "parallels"}
"""Formats whose writers are tested against a parser of the tests' own: in memory, so in seconds."""

Room = tuple[Part, ...]
"""Parts by the tests that notice mistakes in them: so that a mistake costs seconds."""


def _core(modules: str, tests: str) -> Part:
    paths = tuple(f"{CORE}/{module}.py" for module in modules.split())
    return Part(paths, tuple(map(_test, tests.split())))


def _test(name: str) -> str:
    """Returns the path of a module of tests in any room but the fleet's, which has modules of the same names."""
    (path,) = (path for path in ROOT.glob(f"tests/**/test_{name}.py") if path.parent.name != "fleet")
    return str(path.relative_to(ROOT))


def _writer(name: str, *tests: str) -> Room:
    modules = tuple(f"plugins/{name}/src/vmconv_{name}/{part}.py" for part in ("writer", "clusters", "grains"))
    quick = [f"tests/formats/{name}/test_writer.py"] if name in PARSED else []
    return (Part(modules, (*quick, f"tests/formats/{name}/test_{name}.py", *tests)),)


ROOMS: dict[str, Room] = {
    "extents": (_core("model/extents placing/ranges", "extents ranges"),),
    "blocks": (_core("placing/blocks", "blocks"), _core("placing/pinning", "staying")),
    "planner": (_core("conversion/planner model/plan model/planned model/layout", "planner planned conversion"),),
    "places": (
        _core(
            "conversion/refusals backends/targets model/paths io/directory io/attributes",
            "attributes directory targets paths planner conversion",
        ),
        _core("model/identity model/usage interface/findings", "usage check identity"),
    ),
    "verify": (
        _core("conversion/walk conversion/readback inspect/comparison", "readback verifying comparison"),
        _core("io/physical", "physical proof"),
        _core("conversion/verify conversion/results", "verify verifying conversion"),
    ),
    "backends": (
        _core("conversion/execute backends/files backends/direct backends/copy", "copying temporary backends"),
        _core("backends/temporary backends/naming", "temporary naming"),
        _core("backends/reflink", "reflink backends conversion"),
        _core("testing/memory", "memory planner backends"),
        _core("inplace/stay inplace/share inplace/shift", "inplace safety crash"),
    ),
    "inplace": (
        _core("inplace/codec inplace/journal inplace/undofile", "journals strangers"),
        _core("inplace/change inplace/space inplace/moves io/ownership", "changes strangers"),
        _core("inplace/neighbours inplace/rules inplace/strategies inplace/site", "safety inplace"),
        _core("inplace/recovery inplace/undo inplace/syscalls inplace/names", "inplace strangers crash"),
    ),
    "qcow2": _writer("qcow2", "tests/formats/shared/test_metadata.py"),
    "qed": _writer("qed"),
    "raw": _writer("raw"),
    "vdi": _writer("vdi"),
    "vhd": _writer("vhd", "tests/conversion/test_misaligned.py"),
    "vhdx": _writer("vhdx"),
    "vmdk": _writer("vmdk", "tests/conversion/test_misaligned.py"),
    "parallels": _writer("parallels"),
}


class Mistake(NamedTuple):
    """One change of one module: `line` counts from 1."""

    room: str
    part: Part
    module: str
    line: int
    before: str
    after: str
    code: str

    def __str__(self) -> str:
        return f"{self.module}:{self.line}: {self.before} -> {self.after}"


class _Bare(ast.NodeTransformer):
    """Takes out of a module what does not run: annotations, docstrings, and what errors are told."""

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        node.annotation = ast.Constant(0)
        return self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    def visit_arguments(self, node: ast.arguments) -> ast.AST:
        node.args, node.posonlyargs = [*node.posonlyargs, *node.args], []
        if not node.vararg:
            node.args, node.kwonlyargs = [*node.args, *node.kwonlyargs], []
            node.defaults, node.kw_defaults = [*node.defaults, *filter(None, node.kw_defaults)], []
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        return ast.Pass() if isinstance(node.value, ast.Constant) else self.generic_visit(node)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        return ast.Constant("")

    def visit_If(self, node: ast.If) -> ast.AST:
        return ast.Pass() if "TYPE_CHECKING" in ast.unparse(node.test) else self.generic_visit(node)


def _bare(code: str) -> str | None:
    """Returns what runs of a module; None when it is no Python."""
    try:
        return ast.dump(_Bare().visit(ast.parse(code)))
    except SyntaxError:
        return None


def mistakes(room: str, rng: random.Random) -> Iterator[Mistake]:
    """Yields one mistake for each position of the room's modules, in random order, chosen from all that fit there."""
    positions: list[tuple[Part, str, list[tuple[str, int]]]] = []
    for part in ROOMS[room]:
        for path in sorted(path for pattern in part.modules for path in ROOT.glob(pattern)):
            positions += [(part, str(path.relative_to(ROOT)), found) for found in _positions(path).values()]
    rng.shuffle(positions)
    for part, module, choices in positions:
        rng.shuffle(choices)
        made = next(filter(None, (_made(room, part, module, *choice) for choice in choices)), None)
        if made:
            yield made


def _positions(path: Path) -> dict[object, list[tuple[str, int]]]:
    """Returns the operators, and which of their occurrences, that can change each position of a module."""
    found: dict[object, list[tuple[str, int]]] = {}
    tree = get_ast(path.read_text())
    for name in operator_names():
        # Needs arguments, and what it makes of a decorator is no Python that could be imported.
        if "variable" in name.lower() or name.endswith(("RemoveDecorator", "NoOp")):
            continue
        operator = get_operator(name)()
        occurrence = 0
        for node in ast_nodes(tree):
            for position in operator.mutation_positions(node):
                found.setdefault(position, []).append((name, occurrence))
                occurrence += 1
    return found


def _made(room: str, part: Part, module: str, operator: str, occurrence: int) -> Mistake | None:
    """Returns a mistake; None when it changes nothing that runs."""
    code = (ROOT / module).read_text()
    changed = mutate_code(code, get_operator(operator)(), occurrence)
    bare = None if changed is None else _bare(changed)
    if changed is None or bare is None or bare == _bare(code):
        return None
    lines = zip(code.splitlines(), changed.splitlines(), strict=False)
    number, (before, after) = next((i, pair) for i, pair in enumerate(lines, 1) if pair[0] != pair[1])
    return Mistake(room, part, module, number, before.strip(), after.strip(), changed)


class Worker:
    """A copy of the tree in which one mistake after the other is made."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        ignored = shutil.ignore_patterns(".*", "__pycache__", "results")
        for name in ("core", "plugins", "tests", "pyproject.toml", "docs", "README.md"):
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, directory / name, ignore=ignored)
            else:
                shutil.copy(source, directory / name)
        sources = [directory / "core/src", *directory.glob("plugins/*/src")]
        for source in sources:
            # Once for all mistakes. A changed module is newer than its bytecode.
            compileall.compile_dir(source, quiet=1)
        self.environment = {
            **os.environ,
            "PYTHONPATH": ":".join(map(str, [*sources, directory / "tests/mutation"])),
            "PYTHONDONTWRITEBYTECODE": "1",
            "VMCONV_REQUIRE": "",
        }

    def seconds(self, part: Part) -> float:
        """Returns how long the tests of a part take; ends the run when they fail without a mistake."""
        began = time.monotonic()
        done = self._run(part, timeout=1200)
        if done is None or done.returncode:
            sys.exit(f"{' '.join(part.tests)}: the tests fail as they are:\n{done.stdout if done else 'too slow'}")
        return time.monotonic() - began

    def notices(self, mistake: Mistake, timeout: float) -> bool:
        path = self.directory / mistake.module
        whole = path.read_text()
        path.write_text(mistake.code)
        try:
            done = self._run(mistake.part, timeout)
        finally:
            path.write_text(whole)
        return done is None or done.returncode in {1, 2}

    def _run(self, part: Part, timeout: float) -> subprocess.CompletedProcess[str] | None:
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider"]
        # Without deadlines, which a busy machine misses: nothing of that was noticed by a test.
        command += ["-p", "unshrunk", "--hypothesis-profile=unshrunk"]
        try:
            return subprocess.run(
                [*command, *part.tests],
                cwd=self.directory,
                env=self.environment,
                capture_output=True,
                text=True,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return None


def _equivalent() -> set[tuple[str, str, str]]:
    """Returns the mistakes that make no difference: `MODULE | BEFORE | AFTER | REASON` on each line."""
    lines = EQUIVALENT.read_text().splitlines() if EQUIVALENT.exists() else []
    fields = [[field.strip() for field in line.split(" ¦ ")] for line in lines if line and not line.startswith("#")]
    return {(module, before, after) for module, before, after, _ in fields}


def _chosen(rooms: Sequence[str], count: int | None, rng: random.Random) -> list[Mistake]:
    known = _equivalent()
    chosen: list[Mistake] = []
    for index, room in enumerate(rooms):
        share = None if count is None else count * (index + 1) // len(rooms) - count * index // len(rooms)
        for made in mistakes(room, rng):
            if share == 0:
                break
            if (made.module, made.before, made.after) not in known:
                chosen.append(made)
                share = None if share is None else share - 1
    return chosen


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rooms", nargs="*", default=list(ROOMS), help=", ".join(ROOMS))
    parser.add_argument("--count", type=int, default=24, help="mistakes in all (%(default)s)")
    parser.add_argument("--all", action="store_true", help="one mistake for each position")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--least", type=float, default=0.95, help="share that has to be noticed (%(default)s)")
    options = parser.parse_args()
    chosen = _chosen(options.rooms, None if options.all else options.count, random.Random(options.seed))
    with tempfile.TemporaryDirectory(prefix="vmconv-mutation-") as directory:
        workers: SimpleQueue[Worker] = SimpleQueue()
        for number in range(options.workers):
            workers.put(Worker(Path(directory, str(number))))
        first = workers.get()
        limits = {part: 10 + 10 * first.seconds(part) for part in {made.part for made in chosen}}
        workers.put(first)

        def noticed(made: Mistake) -> bool:
            worker = workers.get()
            try:
                found = worker.notices(made, limits[made.part])
            finally:
                workers.put(worker)
            if not found:
                print(f"survives  {made}", flush=True)
            return found

        with ThreadPoolExecutor(options.workers) as pool:
            results = list(pool.map(noticed, chosen))
    share = sum(results) / len(results) if results else 1.0
    for room in options.rooms:
        own = [found for made, found in zip(chosen, results, strict=True) if made.room == room]
        if own:
            print(f"{room:10} {sum(own):4} of {len(own):4} noticed")
    print(f"{sum(results)} of {len(results)} mistakes noticed, {share:.1%}")
    return 0 if share >= options.least else 1


if __name__ == "__main__":
    sys.exit(main())
