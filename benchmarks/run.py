"""Measures vmconv beside qemu-img and beside the least that storage allows. See README.md."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
from contextlib import AbstractContextManager, nullcontext

from bench import VMCONV, Bench
from cases import CASES, Case
from images import GIB, Filesystem, Place, command
from measure import BenchmarkError, peak
from report import machine, print_expectations, write_json

_KINDS = ("none", "xfs", "btrfs", "ext4", "directory")
_UNITS = {"M": 1 << 20, "G": GIB}


def main() -> int:
    options = _options()
    signal.signal(signal.SIGTERM, _terminate)
    problem = _problem(options)
    if problem:
        print(f"benchmarks: {problem}", file=sys.stderr)
        return 2
    facts = {"machine": machine(), "size": options.size, "runs": options.runs, "quick": options.quick}
    for name, value in facts["machine"].items():
        print(f"{name}: {value}")
    with tempfile.TemporaryDirectory(prefix="vmconv-benchmarks-", dir=options.directory) as work:
        _keep_bytecode(work)
        bench = Bench(work, options.size, options.runs, options.quick)
        try:
            failed = _measure(bench, options)
        except KeyboardInterrupt:
            print("interrupted; everything was removed", file=sys.stderr)
            return 130
        finally:
            if options.json:
                write_json(options.json, facts, bench.results, bench.expectations)
    print(f"\npeak memory of a program cannot be seen below that of the suite itself, {peak() >> 20} MiB")
    print_expectations(bench.expectations, quick=options.quick)
    for line in failed:
        print(f"FAILED  {line}")
    return 1 if failed else 0


def _measure(bench: Bench, options: argparse.Namespace) -> list[str]:
    """Measures all cases, one filesystem after the other; returns what failed."""
    failed = []
    for kind in _KINDS:
        cases = [case for case in CASES if kind in case.places and case.name in options.only]
        if not cases or (kind == "directory" and not options.named):
            continue
        with _place(kind, bench) as place:
            _warm_up(place)
            failed += [problem for problem in (_one(case, bench, place) for case in cases) if problem]
    return failed


def _one(case: Case, bench: Bench, place: Place) -> str | None:
    try:
        case.measure(bench, place)
    except BenchmarkError as exc:
        print(f"\n{case.name} ({place.kind}) FAILED: {exc}", flush=True)
        return f"{case.name} ({place.kind}): {exc}"
    return None


def _keep_bytecode(work: str) -> None:
    """Lets children find compiled modules, as they do once a package is installed, whatever the environment says."""
    # Where this is set, each run would compile each module of an editable installation again: about 0.1 s.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    # Not into the source tree, and not what an earlier run of another version left there.
    os.environ["PYTHONPYCACHEPREFIX"] = os.path.join(work, "bytecode")


def _place(kind: str, bench: Bench) -> AbstractContextManager[Place]:
    if kind in ("none", "directory"):
        return nullcontext(Place(kind, bench.work))
    # Room for the source, a whole copy of it, and metadata; the file behind it is sparse.
    return Filesystem(kind, bench.work, 2 * bench.size + 4 * GIB)


def _warm_up(place: Place) -> None:
    """Runs everything once that is measured, so that the first run does not pay for cold files."""
    with place.scratch("warm.raw", "warm.qcow2", "again.raw") as (raw, image, again):
        with open(raw, "wb") as file:
            file.write(os.urandom(1 << 20))
        command(VMCONV, "formats")
        command(VMCONV, "--version")
        for program in ([VMCONV, "convert", "-q"], ["qemu-img", "convert"]):
            command(*program, "-O", "qcow2", raw, image)
            command(*program, "-O", "raw", image, again)
            command(VMCONV, "compare", raw, image)
            os.unlink(image)
            os.unlink(again)


def _options() -> argparse.Namespace:
    names = [case.name for case in CASES]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--directory",
        help="where images and filesystems are built (default: the directory for temporary files); when it is given, "
        "copying is measured in it too",
    )
    parser.add_argument("--only", default=",".join(names), help=f"cases, separated by commas: {', '.join(names)}")
    parser.add_argument("--size", help="size of ordinary images (default: 8G, quick: 4G)")
    parser.add_argument("--runs", type=int, help="rounds (default: 5, quick: 3); slow programs take fewer")
    parser.add_argument("--json", metavar="FILE", help="write every figure of every run here")
    parser.add_argument("--quick", action="store_true", help="smaller images and fewer rounds")
    options = parser.parse_args()
    options.named = options.directory is not None
    options.directory = options.directory or tempfile.gettempdir()
    options.only = options.only.split(",")
    options.runs = options.runs or (3 if options.quick else 5)
    options.size = _bytes(parser, options.size or ("4G" if options.quick else "8G"))
    unknown = sorted(set(options.only) - set(names))
    if unknown:
        parser.error(f"--only: {', '.join(unknown)}: no such case")
    return options


def _bytes(parser: argparse.ArgumentParser, text: str) -> int:
    number, unit = text[:-1], text[-1:].upper()
    if not number.isdigit() or unit not in _UNITS or int(number) * _UNITS[unit] % (64 << 20):
        parser.error(f"--size: {text}: is not a multiple of 64M such as 512M or 8G")
    return int(number) * _UNITS[unit]


def _problem(options: argparse.Namespace) -> str | None:
    """Returns why nothing can be measured here."""
    if os.geteuid() != 0:
        return "mounting filesystems needs root"
    programs = ("qemu-img", "mkfs.xfs", "mkfs.btrfs", "mkfs.ext4", "mount", "umount", "cp", "sync")
    missing = [name for name in programs if not shutil.which(name)]
    if missing or not os.access(VMCONV, os.X_OK):
        return f"not installed: {', '.join(missing) or 'vmconv, for this interpreter'}"
    need = 2 * options.size + 6 * GIB
    free = shutil.disk_usage(options.directory).free
    if free < need:
        return f"{options.directory}: {free / GIB:.1f} GiB are free, {need / GIB:.1f} are needed (--size makes it less)"
    return None


def _terminate(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
