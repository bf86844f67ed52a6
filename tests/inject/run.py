"""Runs vmconv with failing system calls: each call, each time it is made, each of its errors and short results.

    python tests/inject/run.py --all                    the whole table, which takes a quarter of an hour
    python tests/inject/run.py --count 700              a sample of it, as in CI
    python tests/inject/run.py --all --only in-place    one scenario; --call pread64 one call

As root; a filesystem is made and mounted, unless `--directory` names one that shares blocks (XFS, Btrfs). vmconv is
imported once, with `shim.c` loaded before the C library; each case is a process forked from that. `judge.py`
decides what is right. Each failure is printed with what it takes to repeat it (`--case`), and at the end the counts.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import fcntl
import gc
import importlib
import json
import os
import pkgutil
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from inject.judge import Judge, Oracle, Ran, state_of  # noqa: E402
from inject.scenarios import SCENARIOS, Scenario  # noqa: E402
from inject.table import ANSWERS, FEW, LASTING, OPTIONAL, TABLE, number  # noqa: E402

FAIL, HALF, ONE, ZERO, KILL = 1, 2, 3, 4, 5
SHORT = {"half": HALF, "one": ONE, "zero": ZERO}
PATIENCE = 200
FICLONE = 0x40049409


class Case(NamedTuple):
    """The `nth` time that `call` is made, and later ones too if `lasting`, ends with an errno or a short result."""

    scenario: str
    call: str
    nth: int
    lasting: bool
    result: str

    def __str__(self) -> str:
        return f"{self.scenario},{self.call},{self.nth}{'+' if self.lasting else ''},{self.result}"

    @classmethod
    def parse(cls, text: str) -> Case:
        scenario, call, nth, result = text.split(",")
        return cls(scenario, call, int(nth.rstrip("+")), nth.endswith("+"), result)


class Shim:
    """The library, as this process and its children see it."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(None)
        for name in ("inject_call", "inject_where"):
            getattr(self._library, name).restype = ctypes.c_char_p

    def arm(self, root: Path, watched: int, case: Case | None, *, kill: int = 0) -> None:
        what, errno_ = (SHORT[case.result], 0) if case and case.result in SHORT else (FAIL, 0)
        if case and case.result not in SHORT:
            errno_ = number(case.result)
        call = case.call if case else ""
        nth, lasting = (case.nth, case.lasting) if case else (0, False)
        if kill:
            call, nth, what = "*", kill, KILL
        self._library.inject_arm(os.fsencode(root), watched, call.encode(), nth, int(lasting), what, errno_)

    def disarm(self) -> None:
        self._library.inject_disarm()

    @property
    def failed(self) -> int:
        found: int = self._library.inject_failed()
        return found

    def calls(self) -> list[tuple[str, str]]:
        """Returns the calls on files below the root, in order, each with the file."""
        library = self._library
        return [
            (library.inject_call(i).decode(), os.fsdecode(library.inject_where(i)))
            for i in range(library.inject_recorded())
        ]


class Runner:
    """Runs scenarios, each time in a fresh copy of the directory that it was built in once."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.root = base / "root"
        self.directory = self.root / "case"
        self.state = self.root / "state"
        self.templates = base / "templates"
        for path in (self.root, self.templates):
            path.mkdir(parents=True)
        os.environ["XDG_STATE_HOME"] = str(self.state)
        self.shim = Shim()
        self.oracle = Oracle(base)

    def build(self, scenario: Scenario) -> None:
        template = self.templates / scenario.name
        shutil.rmtree(self.directory, ignore_errors=True)
        shutil.rmtree(self.state, ignore_errors=True)
        self.directory.mkdir()
        self.state.mkdir()
        scenario.build(self.directory)
        template.mkdir()
        _copy_tree(self.directory, template / "case")
        _copy_tree(self.state, template / "state")

    def reset(self, scenario: Scenario) -> None:
        for name, path in (("case", self.directory), ("state", self.state)):
            shutil.rmtree(path, ignore_errors=True)
            _copy_tree(self.templates / scenario.name / name, path)

    def run(
        self, scenario: Scenario, case: Case | None = None, argv: tuple[str, ...] | None = None, *, kill: int = 0
    ) -> Ran:
        """Runs a scenario, or another command, in the directory as it is; with a case, a call of it fails."""
        out, err = self.base / "stdout", self.base / "stderr"
        reading, writing = os.pipe() if scenario.pipe else (-1, -1)
        sys.stdout.flush()
        child = os.fork()
        if not child:
            try:
                os.dup2(writing if scenario.pipe else os.open(out, os.O_RDWR | os.O_CREAT | os.O_TRUNC), 1)
                os.dup2(os.open(err, os.O_RDWR | os.O_CREAT | os.O_TRUNC), 2)
                for descriptor in (reading, writing):
                    if descriptor > 2:
                        os.close(descriptor)
                self._child(scenario, case, argv, kill)
            finally:
                os._exit(71)
        sent = b""
        if scenario.pipe:
            os.close(writing)
            with os.fdopen(reading, "rb") as pipe:
                sent = pipe.read()
        _, status = os.waitpid(child, 0)
        self.shim.disarm()
        code = os.waitstatus_to_exitcode(status)
        said = err.read_text(errors="backslashreplace")
        broken = case is not None and case.result == "EPIPE"
        return Ran(code, sent if scenario.pipe else out.read_bytes(), said, state_of(self.directory), broken)

    def _child(self, scenario: Scenario, case: Case | None, argv: tuple[str, ...] | None, kill: int) -> None:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(PATIENCE)
        os.chdir("/")
        # The parent's know what their descriptors were.
        sys.stdout = sys.__stdout__ = os.fdopen(1, "w", encoding="utf-8", closefd=False)  # type: ignore[misc]
        sys.stderr = sys.__stderr__ = os.fdopen(2, "w", encoding="utf-8", closefd=False)  # type: ignore[misc]
        from vmconv.cli.main import main

        if argv is None:
            scenario.before()
            arguments = [part.replace("{}", str(self.directory)) for part in scenario.argv]
        else:
            arguments = list(argv)
        watched = 1 if scenario.kind == "stream" else -1
        code = 70
        self.shim.arm(self.root, watched, case, kill=kill)
        try:
            code = scenario.main(self.directory) if scenario.main and argv is None else main(arguments)
        except SystemExit as exc:
            code = exc.code if isinstance(exc.code, int) else 1
        except BaseException:
            self.shim.disarm()
            traceback.print_exc()
        self.shim.disarm()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def judge(self, scenario: Scenario) -> tuple[Judge, list[tuple[str, str]]]:
        """Returns the judge of a scenario, and the calls that it makes when none fails."""
        self.reset(scenario)
        before = state_of(self.directory)
        usual = self.run(scenario)
        calls = self.shim.calls()
        if usual.code not in scenario.shown:
            raise SystemExit(f"{scenario.name}: returns {usual.code} undisturbed\n{usual.err}")
        made = Judge(scenario, self.directory, before, usual, self.oracle, lambda argv: self.run(scenario, argv=argv))
        problems = list(made.problems(usual, harmless=True))
        if problems:
            raise SystemExit(f"{scenario.name}: undisturbed: {problems}\n{usual.err}")
        return made, calls

    def stopped(self, name: str, of: Scenario, *, committed: bool) -> Scenario:
        """Returns `recover` after a kill of a change in place, soon after its first or just before its last rename."""
        whole = of._replace(name=f"{name}-of")
        self.build(whole)
        self.reset(whole)
        self.run(whole)
        renames = [at for at, (call, _) in enumerate(self.shim.calls(), 1) if call.startswith("rename")]
        self.reset(whole)
        self.run(whole, kill=renames[-1] if committed else renames[0] + 5)
        assert any(".vmconv-" in entry for entry in os.listdir(self.directory)), name
        template = self.templates / f"{name}-state"
        _copy_tree(self.directory, template / "case")
        _copy_tree(self.state, template / "state")

        def build(at: Path) -> None:
            for path, which in ((at, "case"), (self.state, "state")):
                shutil.rmtree(path)
                _copy_tree(template / which, path)

        (source,), (target, kind) = of.kept, next(iter(of.targets.items()))
        made = {target: kind} if committed else {source: source.rpartition(".")[2]}
        return Scenario(name, build, ("recover", f"{{}}/{source}"), made, (), kind="recover")

    def all_scenarios(self) -> Iterator[Scenario]:
        """Yields the scenarios, and those that begin where another one was killed."""
        yield from SCENARIOS
        of = next(one for one in SCENARIOS if one.name == "in-place-undo")
        yield self.stopped("recover-back", of, committed=False)
        yield self.stopped("recover-on", of, committed=True)


def _copy_tree(source: Path, target: Path) -> None:
    """Copies a directory; its files share their blocks with the copies, and have their times."""
    target.mkdir(parents=True)
    for path in source.iterdir():
        copy = target / path.name
        if path.is_dir():
            _copy_tree(path, copy)
            continue
        with path.open("rb") as old, copy.open("wb") as new:
            fcntl.ioctl(new.fileno(), FICLONE, old.fileno())
        shutil.copystat(path, copy)
    shutil.copystat(source, target)


def cases(scenario: Scenario, calls: list[tuple[str, str]]) -> Iterator[Case]:
    """Yields every case of a scenario that makes these calls.

    Of calls that are made often on one file, the first two and the last one get all results, the others a few: a loop
    treats its calls alike.
    """
    places: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    nth: Counter[str] = Counter()
    for call, where in calls:
        nth[call] += 1
        places[call, where].append(nth[call])
    for (call, _), times in places.items():
        row = TABLE[call]
        for at, time_ in enumerate(times):
            often = 2 <= at < len(times) - 1
            for result in (*row.all_errnos, *row.short):
                if (call, result) in ANSWERS or (often and result not in FEW):
                    continue
                yield Case(scenario.name, call, time_, False, result)
                if time_ == 1 and (result in LASTING or result in ("half", "zero")):
                    yield Case(scenario.name, call, time_, True, result)


def import_all() -> None:
    """Imports what any case imports, so that no child has to."""
    for name in ("concurrent.futures.thread", "tempfile", "json", "uuid", "termios", "numpy", "ctypes", "mmap"):
        importlib.import_module(name)
    import vmconv
    from vmconv.io.registry import installed

    packages = [vmconv]
    for plugin in installed().plugins:
        package = sys.modules[plugin.module.partition(".")[0]]
        if package.__name__ not in ("vmconv", "vmconv_fleet"):
            packages.append(package)
    for package in packages:
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if ".testing" not in found.name and not found.name.endswith("__main__"):
                importlib.import_module(found.name)


class Tally:
    """The counts, and the failures."""

    def __init__(self) -> None:
        self.tried: Counter[str] = Counter()
        self.ended: Counter[str] = Counter()
        self.failures: defaultdict[tuple[str, str], list[Case]] = defaultdict(list)

    def add(self, case: Case, ran: Ran, problems: list[str], where: str) -> None:
        self.tried[case.call] += 1
        self.ended["as usual" if ran.code == 0 else "refused"] += 1
        for problem in problems:
            self.failures[_place(case, where), _without_strangers(problem)].append(case)

    def say(self, seconds: float) -> None:
        total = sum(self.tried.values())
        print(f"{total} cases in {seconds:.0f} s ({seconds / max(1, total) * 1000:.0f} ms each):", end=" ")
        print(", ".join(f"{count} {how}" for how, count in self.ended.items()), end="; ")
        print(f"{len({case for cases in self.failures.values() for case in cases})} wrong")
        for (place, problem), cases in sorted(self.failures.items()):
            results = ", ".join(dict.fromkeys(case.result for case in cases))
            print(f"WRONG {place}: {problem}\n      {results}\n      --case {cases[0]}")
        print("calls: " + ", ".join(f"{call} {count}" for call, count in sorted(self.tried.items())))


def _one_of_each(chosen: list[tuple[Case, str]], most: int) -> list[tuple[Case, str]]:
    """Returns at most `most` cases of each call, kind of file and result, of any scenarios."""
    seen: Counter[tuple[str, str, str, bool]] = Counter()
    found = []
    for case, where in chosen:
        kind = re.sub(r"[0-9a-f]{6,}|#[0-9]+|/(d|o|top|base)(?=\.)", "*", where)
        key = case.call, kind, case.result, case.lasting
        seen[key] += 1
        if seen[key] <= most:
            found.append((case, where))
    return found


def _place(case: Case, where: str) -> str:
    return f"{case.scenario} {case.call} {re.sub('[0-9a-f]{6,}|#[0-9]+', '*', where)}"


def _without_strangers(problem: str) -> str:
    """Returns a problem without what differs from run to run, and from errno to errno."""
    for name in errno.errorcode:
        problem = problem.replace(os.strerror(name), "...")
    return re.sub(r"[0-9a-f]{8,}", "*", problem)


def _all_cases(runner: Runner, options: argparse.Namespace) -> tuple[dict[str, Judge], list[tuple[Case, str]]]:
    judges, found = {}, []
    for scenario in runner.all_scenarios():
        if options.only and scenario.name not in options.only:
            continue
        runner.build(scenario)
        judges[scenario.name], calls = runner.judge(scenario)
        unknown = {call for call, _ in calls} - TABLE.keys()
        if unknown:
            raise SystemExit(f"{scenario.name}: calls without a row in table.py: {sorted(unknown)}")
        nth: Counter[str] = Counter()
        where = {}
        for call, path in calls:
            nth[call] += 1
            where[call, nth[call]] = path
        found += [
            (case, where[case.call, case.nth])
            for case in cases(scenario, calls)
            if not options.call or case.call in options.call
        ]
    return judges, found


def test(base: Path, options: argparse.Namespace) -> int:
    """Tries the cases that are asked for; returns 1 when one was wrong."""
    import_all()
    # What is there is not looked through for garbage by the children: pages that nobody writes to are shared.
    gc.collect()
    gc.freeze()
    runner = Runner(base)
    judges, chosen = _all_cases(runner, options)
    if options.case:
        wanted = {Case.parse(text) for text in options.case}
        chosen = [(case, where) for case, where in chosen if case in wanted]
    # By a digest and not shuffled: a case that is new, or that a run does not come to, exchanges no others.
    chosen.sort(key=lambda one: zlib.crc32(f"{options.seed} {one[0]}".encode()))
    if options.each:
        chosen = _one_of_each(chosen, options.each)
    share = chosen[options.shard :: options.shards][: options.count]
    print(f"{len(share)} cases of {len(judges)} scenarios", flush=True)
    began, tally = time.monotonic(), Tally()
    for case, where in share:
        judge = judges[case.scenario]
        runner.reset(judge.scenario)
        ran = runner.run(judge.scenario, case)
        problems = list(judge.problems(ran, harmless=not runner.shim.failed))
        if case.result in OPTIONAL.get(case.call, ()) and ran.code != judge.usual.code:
            problems.append(f"exit code {ran.code}, though it can be done without")
        if options.case:
            print(f"{case}: exit code {ran.code}\n{ran.err}")
        tally.add(case, ran, problems, where)
    tally.say(time.monotonic() - began)
    return 1 if tally.failures else 0


def undisturbed(name: str, directory: Path) -> int:
    """Runs a scenario in this process, in a directory where it has been built; for strace."""
    from vmconv.cli.main import main

    scenario = next(one for one in SCENARIOS if one.name == name)
    scenario.before()
    if scenario.main:
        return scenario.main(directory)
    return main([part.replace("{}", str(directory)) for part in scenario.argv])


def say_calls(base: Path, options: argparse.Namespace) -> int:
    """Prints which calls each scenario makes, as the shim sees them."""
    import_all()
    runner = Runner(base)
    found = {}
    for scenario in SCENARIOS:
        if not options.only or scenario.name in options.only:
            runner.build(scenario)
            _, calls = runner.judge(scenario)
            found[scenario.name] = sorted({call for call, _ in calls})
    print(json.dumps(found))
    return 0


def _mounted(base: Path) -> Path:
    """Returns the mount point of a new filesystem that shares blocks."""
    image, point = base / "xfs.img", base / "xfs"
    point.mkdir()
    with image.open("wb") as file:
        file.truncate(1 << 30)
    subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, point], check=True)
    return point


def _again_with_shim(base: Path, arguments: list[str]) -> int:
    library = base / "shim.so"
    command = ["gcc", "-O1", "-Wall", "-shared", "-fPIC", "-o", str(library), str(HERE / "shim.c"), "-ldl"]
    subprocess.run(command, check=True)
    environment = os.environ | {"LD_PRELOAD": str(library), "INJECT_BASE": str(base), "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, __file__, *arguments], env=environment, check=False).returncode


def main() -> int:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--all", action="store_true", help="try the whole table")
    what.add_argument("--count", type=int, help="number of cases in a sample")
    what.add_argument("--calls", action="store_true", help="show which calls each scenario makes")
    what.add_argument("--undisturbed", nargs=2, metavar=("SCENARIO", "DIRECTORY"), help="run one without the shim")
    what.add_argument("--case", action="append", help="try one case, and show what it printed; may be repeated")
    parser.add_argument("--only", action="append", help="this scenario; may be repeated")
    parser.add_argument("--call", action="append", help="this call; may be repeated")
    parser.add_argument(
        "--each", type=int, default=0, metavar="N", help="only N cases of each call, kind of file and result"
    )
    parser.add_argument("--seed", type=int, default=11, help="of the order of the cases")
    parser.add_argument("--shard", type=int, default=0)
    parser.add_argument("--shards", type=int, default=1, help="number of shards; try the cases of one")
    parser.add_argument("--directory", type=Path, help="an empty directory on a filesystem that shares blocks")
    options = parser.parse_args()
    if options.case and not options.only:
        options.only = [text.partition(",")[0] for text in options.case]
    if options.undisturbed:
        return undisturbed(options.undisturbed[0], Path(options.undisturbed[1]))
    if "INJECT_BASE" in os.environ:
        return (say_calls if options.calls else test)(Path(os.environ["INJECT_BASE"]), options)
    # In memory where it can be: nothing here asks what storage keeps.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="vmconv-inject-", dir=memory) as scratch:
        base = options.directory or _mounted(Path(scratch))
        try:
            return _again_with_shim(base, sys.argv[1:])
        finally:
            if not options.directory:
                subprocess.run(["umount", base], check=True)


if __name__ == "__main__":
    sys.exit(main())
