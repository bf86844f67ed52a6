"""Tests the tests: makes one small mistake at a time in the code, and counts the mistakes that no test notices.

    python tests/mutation/run.py                      24 mistakes, spread over all rooms
    python tests/mutation/run.py qcow2 --count 100    100 mistakes in one room
    python tests/mutation/run.py extents --all        every position of a room, one mistake each

cosmic-ray makes the mistakes. They are made in a copy of the tree, which each worker has to itself. A mistake counts as
noticed when a test fails, or when the tests take five times as long as without it; a run of pytest that ends otherwise
has noticed nothing. Mistakes that change no code are left out: those in annotations, in docstrings and in messages of
errors. A surviving mistake that makes no difference is listed in `equivalent.txt`, with the reason.

Exit status: 0 if the share of noticed mistakes is at least `--least`, else 1.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import fnmatch
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from mutation import trials  # noqa: E402
from support.session import Run  # noqa: E402

EQUIVALENT = Path(__file__).with_name("equivalent.txt")
# To sync a filesystem in memory takes no time.
_MEMORY = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
CORE = "core/src/vmconv"


class Room(NamedTuple):
    """Modules, as patterns, and the tests that have to notice mistakes in them, the quickest first."""

    modules: tuple[str, ...]
    tests: tuple[str, ...]


PARSED = {"qcow2", "qed", "vdi", "vhd", "vhdx", "vmdk", "parallels"}
"""Formats whose writers are tested against a parser of the tests' own: in memory, so in seconds."""

CRASHES = (
    "test_a_torn_shift_is_finished[vhd-vmconv-raw]",
    "test_a_torn_shift_is_finished[qed-qemu-vhd-fixed]",
    "test_a_killed_conversion_is_rolled_back_or_completed[raw-cp-qcow2-back]",
    "test_a_killed_conversion_is_rolled_back_or_completed[raw-cp-vmdk-monolithicFlat-there and undoable]",
    "test_a_killed_conversion_is_rolled_back_or_completed[vhd-vmconv-qcow2-there]",
    "test_a_conversion_killed_while_shifting_is_rolled_back_or_completed[vhd-vmconv-raw]",
    "test_after_a_power_failure_a_change_is_rolled_back_or_completed[qcow2-qemu-vmdk-back]",
    "test_the_finished_conversion_is_the_disk[qed-qemu-qcow2]",
)
"""Of the conversions in place that are stopped everywhere, one of each way: all take minutes."""


def _core(modules: str, tests: str, *more: str, first: Sequence[str] = ()) -> Room:
    paths = tuple(f"{CORE}/{module}.py" for module in modules.split())
    return Room(paths, (*first, *map(_test, tests.split()), *more))


def _test(name: str) -> str:
    """Returns the path of a module of tests, of another plugin than those that have modules of the same names."""
    found = (path.relative_to(ROOT) for path in ROOT.glob(f"tests/**/test_{name}.py"))
    (path,) = (path for path in found if not {"fleet", "machine"} & {*path.parts})
    return str(path)


def _writer(name: str, *tests: str) -> Room:
    modules = tuple(f"plugins/{name}/src/vmconv_{name}/{part}.py" for part in ("writer", "clusters", "grains"))
    quick = [f"tests/formats/{name}/test_writer.py"] if name in PARSED else []
    return Room(modules, (*quick, f"tests/formats/{name}/test_{name}.py", *tests))


def _fleet(modules: str, tests: str) -> Room:
    paths = tuple(f"plugins/fleet/src/vmconv_fleet/{module}.py" for module in modules.split())
    return Room(paths, tuple(f"tests/fleet/test_{name}.py" for name in tests.split()))


_JOBS = (
    "tests/fleet/test_scanning.py::test_the_id_of_a_disk_is_that_of_earlier_versions",
    "tests/fleet/test_renames.py::test_nothing_outside_is_made_read_or_removed[convert-once]",
    *(
        f"tests/fleet/test_jobs.py::test_a_{name}"
        for name in (
            "job_is_done",
            "dry_run_makes_nothing",
            "link_out_of_the_datastore_is_not_converted",
            "link_in_the_targets_place_is_not_followed",
            "chain_out_of_the_datastores_is_not_converted",
            "job_that_cannot_be_done_says_why",
            "source_is_removed_on_request_if_no_disk_needs_it",
            "node_killed_after_it_was_done_finds_it_done",
            "file_of_the_same_name_that_the_job_did_not_make_is_not_its_own",
            "file_that_has_got_the_inode_of_what_the_job_made_is_not_its_own",
        )
    ),
)
"""What a worker may do; all tests of jobs take minutes."""

_CRASHES = tuple(f"tests/inplace/test_crash.py::{name}" for name in CRASHES)

_LONG = tuple(
    f"--deselect=tests/inplace/test_{name}"
    for name in (
        "inplace.py::test_a_process_that_is_killed_at_any_moment_loses_nothing",
        "inplace.py::test_payload_stays_where_it_lies[btrfs",
        "inplace.py::test_payload_stays_where_it_lies[xfs",
        "inplace.py::test_with_shared_blocks_the_source_is_replaced[btrfs",
        "safety.py::test_a_signal_at_any_call_ends_in_the_truth",
        "safety.py::test_names_may_be_as_long_as_the_filesystem_has_them[btrfs",
        "safety.py::test_names_may_be_as_long_as_the_filesystem_has_them[xfs",
        "strangers.py::test_a_planted_journal_does_not_stop_other_commands",
    )
)
"""What takes half of the time of these tests, and is done once more on another filesystem or at random."""

_RAM = ("elf", "elf_writer", "ending", "lime", "mapped", "qemu", "ranges", "vmware", "vmware_writer")

ROOMS: dict[str, Room] = {
    "extents": _core("model/extents placing/ranges", "extents ranges"),
    "blocks": _core("placing/blocks", "blocks"),
    "pinning": _core("placing/pinning", "pinning"),
    "planner": _core("conversion/planner model/plan model/planned model/layout", "planner planned conversion"),
    "places": _core(
        "conversion/refusals backends/targets model/paths io/directory io/attributes",
        "attributes directory targets paths planner conversion",
    ),
    "usage": _core("model/identity model/usage interface/findings", "usage check identity"),
    "reading": _core("conversion/walk conversion/readback inspect/comparison", "readback verifying comparison"),
    "draft": _core("model/draft", "draft"),
    "strips": _core("inspect/strips", "pictures"),
    "physical": _core("io/physical", "physical proof"),
    "verify": _core("conversion/verify conversion/results", "verify verifying conversion"),
    "files": _core(
        "conversion/execute backends/files backends/writing backends/direct backends/copy",
        "copying temporary targets backends",
    ),
    "devices": _core("backends/device conversion/device io/devices system/block", "devices"),
    "stream": _core("backends/stream backends/planned", "stream"),
    "naming": _core("backends/temporary backends/naming", "temporary naming"),
    "reflink": _core("backends/reflink", "reflink backends conversion"),
    "memory": _core("testing/memory", "memory planner backends"),
    "staying": _core("inplace/stay inplace/share inplace/shift", "strategies inplace safety", *_LONG, first=_CRASHES),
    "journal": _core("inplace/codec inplace/journal inplace/undofile", "journals strangers", *_LONG),
    "change": _core(
        "inplace/change inplace/journalled inplace/space inplace/moves io/ownership", "changes strangers", *_LONG
    ),
    "strategies": _core(
        "inplace/neighbours inplace/rules inplace/strategies inplace/site",
        "strategies safety inplace",
        *_LONG,
        *_CRASHES[:1],
    ),
    "recovery": _core(
        "inplace/recovery inplace/undo inplace/syscalls inplace/names inplace/settling",
        "recovery strangers inplace safety",
        *_LONG,
        first=_CRASHES,
    ),
    "group": _core(
        "inplace/group", "group", "tests/machine/test_in_place.py", "tests/machine/test_in_place_stopped.py"
    ),
    "qcow2": _writer("qcow2", "tests/formats/shared/test_metadata.py"),
    "qed": _writer("qed"),
    "vdi": _writer("vdi"),
    "vhd": _writer("vhd", "tests/conversion/test_misaligned.py"),
    "vhdx": _writer("vhdx"),
    "vmdk": _writer("vmdk", "tests/conversion/test_misaligned.py"),
    "parallels": _writer("parallels"),
    "ram": Room(
        tuple(f"plugins/memory/src/vmconv_memory/{part}.py" for part in _RAM),
        tuple(f"tests/memory/test_{name}.py" for name in ("layouts", "streams", "matrix", "kits")),
    ),
    "commit": _core("syncing/commit syncing/replacing", "commit"),
    "rebase": _core("syncing/rebase conversion/rebasing", "rebase rebase_unsafe"),
    "edits": Room(
        (
            *(f"{CORE}/conversion/{name}.py" for name in ("editing", "snapshots", "bitmaps", "repairing", "resizing")),
            *(f"plugins/qcow2/src/vmconv_qcow2/{name}.py" for name in ("snapshots", "bitmap_edits", "repair")),
        ),
        (
            *(f"tests/formats/qcow2/test_{name}.py" for name in ("snapshots", "snapshot_names", "bitmap_edits")),
            "tests/formats/shared/test_repair.py",
            "tests/inplace/test_resize.py",
        ),
    ),
    "refcounts": Room(
        ("plugins/qcow2/src/vmconv_qcow2/refcounts.py",),
        (
            "tests/formats/qcow2/test_writer.py",
            "tests/formats/shared/test_repair.py",
            "tests/formats/qcow2/test_snapshots.py",
            "tests/formats/shared/test_check.py",
        ),
    ),
    "packing": Room(
        ("plugins/qcow2/src/vmconv_qcow2/packing.py", f"{CORE}/conversion/encoded.py"),
        ("tests/formats/qcow2/test_compressing.py",),
    ),
    "batch": _core("conversion/batch", "batch"),
    "zeros": _core("conversion/zeros", "zeros"),
    "syncing": Room((f"{CORE}/syncing/*.py",), ("tests/syncing",)),
    "guest": Room((f"{CORE}/guest/*.py",), ("tests/machine/guest", "tests/machine/test_guests.py")),
    "vma": Room(("plugins/vma/src/vmconv_vma/*.py",), ("tests/machine/vma",)),
    "xva": Room(("plugins/xva/src/vmconv_xva/*.py",), ("tests/machine/xva",)),
    "bochs": Room(("plugins/bochs/src/vmconv_bochs/*.py",), ("tests/formats/bochs",)),
    "cloop": Room(("plugins/cloop/src/vmconv_cloop/*.py",), ("tests/formats/cloop",)),
    "dmg": Room(("plugins/dmg/src/vmconv_dmg/*.py",), ("tests/formats/dmg",)),
    "ewf": Room(("plugins/ewf/src/vmconv_ewf/*.py",), ("tests/formats/ewf",)),
    "luks": Room(("plugins/luks/src/vmconv_luks/*.py",), ("tests/formats/luks",)),
    "oidc": _fleet("oidc/*", "oidc_oracle oidc_provider oidc"),
    "notices": _fleet("notices/*", "resolving notices"),
    "joining": _fleet("catalogue/joining catalogue/overridden replication/merging replication/strays", "forks"),
    "idle": _fleet("node/memory node/room", "room memory"),
    "peers": _fleet("links/peers", "peers"),
    "starting": _fleet("jobs/starting trust/groups", "starting rights handlers"),
    "rights": _fleet("trust/rights trust/roles trust/tokens", "rights starting handlers"),
    "trust": _fleet("trust/authority trust/certificates trust/names trust/membership", "identity names authority"),
    "histories": _fleet(
        "replication/forks replication/epochs replication/recovery replication/ownlog", "store forks replica"
    ),
    "pulling": _fleet(
        "replication/anti_entropy replication/receiver replication/reorder_buffer replication/verifier", "replica forks"
    ),
    "limiter": _fleet("limiter", "limiter"),
    "worker": _fleet("jobs/conversion jobs/disks jobs/journal jobs/worker catalogue/places", "")._replace(tests=_JOBS),
}


class Mistake(NamedTuple):
    """One change of one module: `line` counts from 1."""

    room: str
    module: str
    line: int
    before: str
    after: str
    operator: str
    code: str

    def __str__(self) -> str:
        return f"{self.module}:{self.line}: {self.before} -> {self.after}"


class _Bare(ast.NodeTransformer):
    """Removes the parts of a module that do not run: annotations, docstrings, arguments of errors."""

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
    positions: list[tuple[str, list[tuple[str, int]]]] = []
    for path in sorted(path for pattern in ROOMS[room].modules for path in ROOT.glob(pattern)):
        positions += [(str(path.relative_to(ROOT)), found) for found in _positions(path).values()]
    rng.shuffle(positions)
    for module, choices in positions:
        rng.shuffle(choices)
        made = next(filter(None, (_made(room, module, *choice) for choice in choices)), None)
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


def _made(room: str, module: str, operator: str, occurrence: int) -> Mistake | None:
    """Returns a mistake; None when it changes nothing that runs."""
    code = (ROOT / module).read_text()
    try:
        changed = mutate_code(code, get_operator(operator)(), occurrence)
    except AttributeError:
        # cosmic-ray 8.7 replaces no exception whose name has a dot.
        return None
    bare = None if changed is None else _bare(changed)
    if changed is None or bare is None or bare == _bare(code):
        return None
    lines = zip(code.splitlines(), changed.splitlines(), strict=False)
    number, (before, after) = next((i, pair) for i, pair in enumerate(lines, 1) if pair[0] != pair[1])
    name = operator.removeprefix("core/").removeprefix("ReplaceBinaryOperator_")
    return Mistake(room, module, number, before.strip(), after.strip(), name, changed)


class Explained(NamedTuple):
    """Mistakes that make no difference; `module` is a pattern, and `*` stands for any line or any change."""

    module: str
    before: str
    after: str
    reason: str

    def covers(self, made: Mistake) -> bool:
        return (
            fnmatch.fnmatchcase(made.module, self.module)
            and self.before in ("*", made.before)
            and self.after in ("*", made.after, made.operator)
        )


def _explained() -> list[Explained]:
    lines = [line for line in EQUIVALENT.read_text().splitlines() if line and not line.startswith("#")]
    return [Explained(*(field.strip() for field in line.split(" ¦ "))) for line in lines]


def _chosen(rooms: Sequence[str], count: int | None, rng: random.Random) -> list[Mistake]:
    known = _explained()
    chosen: list[Mistake] = []
    for index, room in enumerate(rooms):
        share = None if count is None else count * (index + 1) // len(rooms) - count * index // len(rooms)
        for made in mistakes(room, rng):
            if share == 0:
                break
            if not any(explained.covers(made) for explained in known):
                chosen.append(made)
                share = None if share is None else share - 1
    return chosen


class Outcome(NamedTuple):
    """What became of a mistake: the exit status of pytest, None when its time was over."""

    made: Mistake
    status: int | None
    seconds: float

    @property
    def is_noticed(self) -> bool:
        # A module that can no longer be imported interrupts pytest.
        return self.status in (None, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED)

    def __str__(self) -> str:
        how = {None: "too slow", 0: "survives", 1: "noticed", 2: "noticed"}.get(self.status, f"ends with {self.status}")
        return f"{how:10}{self.seconds:4.0f} s  {self.made}"


def _end(*_: object) -> None:
    """Ends this process by a signal, once: then it unmounts and removes what it has made, and a second one waits."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit("ended by a signal")


class Worker:
    """Tries mistakes in a tree of its own."""

    tree: trials.Tree

    @classmethod
    def begin(cls, original: Path, *parents: Path) -> None:
        # The pool ends its workers by this signal.
        signal.signal(signal.SIGTERM, _end)
        cls.tree = trials.Tree(original, *(parent / str(os.getpid()) for parent in parents))

    @classmethod
    def outcome(cls, task: tuple[Mistake, float]) -> Outcome:
        made, timeout = task
        began = time.monotonic()
        with cls.tree.changed(made.module, made.code):
            status = cls.tree.test(ROOMS[made.room].tests, timeout)
        return Outcome(made, status, time.monotonic() - began)


def _limit(tree: trials.Tree, tests: Sequence[str]) -> float:
    """Returns after how many seconds these tests are too slow; ends the run when they fail as they are."""
    began = time.monotonic()
    status = tree.test(tests, 1200, as_it_is=True)
    if status != 0:
        sys.exit(f"{' '.join(tests)}: the tests fail as they are ({status}):\n{tree.output.read_text()}")
    return 10 + 5 * (time.monotonic() - began)


@contextlib.contextmanager
def _directory(parent: Path | None = None) -> Iterator[Path]:
    # Short: nodes have sockets below it, whose paths may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="vmm-", dir=parent) as name:
        directory = Path(name)
        # Some tests run the program as another user.
        directory.chmod(0o755)
        try:
            yield directory
        finally:
            for left in directory.iterdir():
                Run(left).end()


def _outcomes(chosen: Sequence[Mistake], workers: int) -> Iterator[Outcome]:
    with _directory() as directory, _directory(_MEMORY) as mounted:
        trials.preload()
        first = trials.Tree(ROOT, directory / "first", mounted / "first")
        limits = {room: _limit(first, ROOMS[room].tests) for room in dict.fromkeys(made.room for made in chosen)}
        print(", ".join(f"{room}: at most {limit:.0f} s" for room, limit in limits.items()), flush=True)
        fork = multiprocessing.get_context("fork")
        with fork.Pool(workers, Worker.begin, (first.directory, directory, mounted)) as pool:
            yield from pool.imap_unordered(Worker.outcome, [(made, limits[made.room]) for made in chosen])
            # The signal of the block's end can reach a worker that holds a lock of the pool.
            pool.close()
            pool.join()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rooms", nargs="*", default=list(ROOMS), help=", ".join(ROOMS))
    parser.add_argument("--count", type=int, default=24, help="mistakes in all (%(default)s)")
    parser.add_argument("--all", action="store_true", help="one mistake for each position")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--least", type=float, default=0.95, help="share that has to be noticed (%(default)s)")
    parser.add_argument("--verbose", action="store_true", help="say of each mistake what became of it")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, _end)
    chosen = _chosen(options.rooms, None if options.all else options.count, random.Random(options.seed))
    tried, noticed = Counter[str](), Counter[str]()
    for outcome in _outcomes(chosen, options.workers):
        tried[outcome.made.room] += 1
        noticed[outcome.made.room] += outcome.is_noticed
        if options.verbose or not outcome.is_noticed:
            print(outcome, flush=True)
    for room in tried:
        print(f"{room:10} {noticed[room]:4} of {tried[room]:4} noticed")
    share = noticed.total() / tried.total() if tried else 1.0
    print(f"{noticed.total()} of {tried.total()} mistakes noticed, {share:.1%}")
    return 0 if share >= options.least else 1


if __name__ == "__main__":
    sys.exit(main())
