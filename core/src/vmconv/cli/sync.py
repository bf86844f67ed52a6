"""`vmconv sync`."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

from vmconv.cli.options import add_access, add_format, add_making, add_options, add_output, add_parent, add_snapshot
from vmconv.cli.output import say
from vmconv.cli.verbs import Verb

if TYPE_CHECKING:
    from vmconv.syncing.request import SyncPlan, SyncRequest, SyncResult


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="disk as it is now; never changed")
    parser.add_argument(
        "target",
        metavar="TARGET",
        help="image made of it earlier, by convert or sync, which keeps its format, options and ids;\n"
        "made if it does not exist",
    )
    add_format(parser, "-f", "SOURCE")
    add_format(parser, "-O", "TARGET")
    add_options(parser, "a new TARGET; an existing one must have them")
    add_snapshot(parser)
    parser.add_argument(
        "--since",
        metavar="FILE",
        help="the disk of the last sync, unchanged since, such as the snapshot or reflink copy that was SOURCE then:\n"
        "blocks that SOURCE still shares with it did not change",
    )
    parser.add_argument(
        "--bitmap",
        metavar="NAME",
        help="a bitmap in SOURCE (qcow2) that was there at the last sync and was not cleared since: what it does not\n"
        "have as written is unchanged. vmconv believes that; --verify=bytes compares the result with SOURCE",
    )
    parser.add_argument(
        "--compare", action="store_true", help="read both disks to find what changed, whatever else could tell it"
    )
    parser.add_argument("--shrink", action="store_true", help="let the disk of TARGET become smaller")
    parser.add_argument(
        "--no-record",
        dest="record",
        action="store_false",
        help="do not record in an attribute of TARGET which state of SOURCE it holds",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace TARGET although it was modified since its last sync, has nothing in common with SOURCE,\n"
        "or loses snapshots, bitmaps or other names",
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be done; change nothing")
    parser.add_argument(
        "--zero-copy",
        choices=("auto", "require"),
        default="auto",
        help="require: fail before any change rather than copy payload (default: auto, copy what cannot be shared)",
    )
    parser.add_argument(
        "-t",
        dest="cache",
        choices=("writeback", "unsafe"),
        default="writeback",
        help="writeback: sync the new file before it replaces TARGET; unsafe: do not (default: writeback)",
    )
    add_output(parser)
    add_access(parser)
    add_parent(parser)
    add_making(parser)


def _request(options: argparse.Namespace) -> SyncRequest:
    from vmconv.syncing.request import SyncRequest

    same = {name for name in SyncRequest._fields if hasattr(options, name)}
    return SyncRequest(
        **{name: getattr(options, name) for name in same},
        source_format=options.format_f,
        target_format=options.format_O,
    )


def _run(options: argparse.Namespace) -> int:
    from vmconv.cli.report import report_of

    report, request = report_of(options), _request(options)
    if options.dry_run:
        return _dry(options, request)
    from vmconv.cli import streams
    from vmconv.syncing.pipeline import run

    words = _Words(options)
    try:
        result = run(
            request,
            verify=options.verify,
            announce=partial(words.announce, report),
            progress=report.progress,
            verifying=report.verifying,
            comparing=words.comparing,
        )
    except KeyboardInterrupt as exc:
        results = getattr(exc, "results", ())
        if not results:
            vars(exc)["left"] = f"{request.target} is as it was"
            raise
        # The signal arrived after the exchange: the run succeeded.
        result = results[0]
    finally:
        report.close()
    with streams.drop_output_on_error():
        words.result(result)
    return 0


def _dry(options: argparse.Namespace, request: SyncRequest) -> int:
    from vmconv.syncing.pipeline import plan

    words = _Words(options)
    found = plan(request, words.comparing)
    if options.output == "json":
        from vmconv.cli.output import print_json

        print_json(_json(found), indent=4)
        return 0
    say(f"{request.source} -> {request.target}: {_changed(found, up_to_date=found.plan is None)}")
    say(f"  evidence: {found.evidence}")
    if found.plan:
        from vmconv.cli.plan import plan_lines

        for line in plan_lines(found.plan, (), (), details=options.verbose):
            say(f"  {line}")
    return 0


def _json(found: SyncPlan) -> dict[str, Any]:
    from vmconv.cli.report import plan_json

    return {**found._asdict(), "plan": plan_json(found.plan) if found.plan else None}


def _changed(found: SyncPlan | SyncResult, *, up_to_date: bool) -> str:
    from vmconv.cli.output import size_text
    from vmconv.errors import counted
    from vmconv.syncing.request import NEW

    if up_to_date:
        return "up to date"
    if found.evidence == NEW:
        return f"is new, {size_text(found.changed)}"
    return f"{size_text(found.changed)} changed in {counted(found.ranges, 'range')}"


class _Words:
    """Says what a sync does, in the style of the options."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.json = options.output == "json"
        self.quiet = options.quiet and not self.json
        self._said = False

    def comparing(self, done: int, total: int) -> None:
        """Says before both disks are read how much that is."""
        if self.json:
            self._event("compare", {"done": done, "total": total})
        elif not (self.quiet or self._said):
            from vmconv.cli.output import size_text

            print(f"reading {size_text(total)} of both disks to find what changed", file=sys.stderr)
        self._said = True

    def announce(self, report: Any, found: SyncPlan) -> None:
        if self.json:
            self._event("changes", {name: value for name, value in found._asdict().items() if name != "plan"})
        if found.plan:
            report.announce(found.plan)

    def result(self, result: SyncResult) -> None:
        from vmconv.cli.output import as_plain, size_text

        if self.json:
            self._event("result", as_plain(result))
            return
        for warning in result.warnings:
            say(f"warning: {warning}", to=sys.stderr)
        if self.quiet:
            return
        same, totals = result.backend == "none", result.totals
        where = f"{result.target}: {_changed(result, up_to_date=same)}"
        if not same:
            kept = "kept" if result.backend == "in-place" else "shared"
            where += (
                f"; {kept} {size_text(totals.shared)}, copied {size_text(totals.copied)}, "
                f"written {size_text(totals.written)}"
            )
        say(f"{where} in {result.seconds:.3f} s")
        say(f"  evidence: {result.evidence}")

    def _event(self, event: str, values: dict[str, Any]) -> None:
        from vmconv.cli.output import print_json

        print_json({"event": event, **values})


_EPILOG = """what changed is learned, in this order, from
  the record of the last sync, if SOURCE is unchanged since, or only got new layers on top (external snapshots)
  --since FILE, a snapshot or reflink copy that was SOURCE of the last sync
  --bitmap NAME, a persistent bitmap in the qcow2 image
  reading both disks; how much is said first
Where TARGET can share all blocks of SOURCE, nothing has to be learned: it shares them again, in milliseconds.

exit status:
  0  TARGET holds the disk of SOURCE
  1  the image, the storage or the plan does not allow it; TARGET is as it was
  2  the request makes no sense: an unknown format, option or combination
  3  --zero-copy=require, and payload would have to be copied; nothing was touched

examples:
  vmconv sync disk.raw disk.qcow2
  vmconv sync --dry-run disk.raw disk.qcow2
  vmconv sync --since monday.raw tuesday.raw /backup/disk.qcow2"""

VERB = Verb(
    "Brings an image that was made of a disk earlier up to date with the disk. Only what changed is moved; where\n"
    "storage can share blocks, nothing is. The old TARGET stays whole until the new one is complete and verified.\n"
    "It keeps its owner, mode and attributes.",
    _configure,
    _run,
    _EPILOG,
)
