"""`vmconv machine convert`."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from vmconv.cli import streams
from vmconv.cli.machine.requests import configure_request, request_of
from vmconv.cli.options import add_making
from vmconv.cli.output import say
from vmconv.cli.verbs import Verb

if TYPE_CHECKING:
    from vmconv.machine.request import MachinePlan, MachineResult


def _run(options: argparse.Namespace) -> int:
    from vmconv.cli.report import report_of
    from vmconv.machine.pipeline import run

    report = report_of(options)

    def announce(plan: MachinePlan) -> None:
        if options.output == "json":
            from vmconv.cli.output import as_plain, print_json

            print_json({"event": "plan", **as_plain(plan)})
        elif not options.quiet:
            _announce(plan)

    try:
        result = run(
            request_of(options),
            verify=options.verify,
            announce=announce,
            progress=report.progress,
            verifying=report.verifying,
        )
    finally:
        report.close()
    with streams.drop_output_on_error():
        _print(result, options)
    return 0


def _announce(plan: MachinePlan) -> None:
    from vmconv.cli.machine.report import change_lines
    from vmconv.cli.output import size_text
    from vmconv.errors import printable

    for copy in plan.copies:
        say(f"copying {size_text(copy.bytes)} ({copy.bytes} bytes) because {copy.reason}", to=sys.stderr)
    if plan.digested:
        print(f"reading {size_text(plan.digested)} for the digests of the manifest", file=sys.stderr)
    for line in (*change_lines(plan), *(f"warning: {warning}" for warning in plan.warnings)):
        print(printable(line), file=sys.stderr)


def _print(result: MachineResult, options: argparse.Namespace) -> None:
    from vmconv.cli.output import as_plain, print_json, size_text
    from vmconv.errors import counted

    if options.output == "json":
        print_json({"event": "result", **as_plain(result)})
    elif not options.quiet:
        totals, disks = result.plan.totals, len(result.plan.disks)
        print(
            f"{result.target}: {counted(disks, 'disk')}, shared {size_text(totals.shared)}, "
            f"copied {size_text(totals.copied)}, written {size_text(totals.written)} in {result.seconds:.3f} s"
        )


def _configure(parser: argparse.ArgumentParser) -> None:
    configure_request(parser)
    add_making(parser)


VERB = Verb(
    "Converts a machine: its configuration, the firmware's variables and all its disks. Settings that the target\n"
    "cannot express are listed before anything is written. The result is read back and compared with the source\n"
    "before its files appear under their names: all of them, the configuration last, or none.",
    _configure,
    _run,
    """exit status:
  0  converted
  1  the machine, a disk, the storage or --strict does not allow it; nothing was created
  2  the request makes no sense: an unknown format, option or combination
  3  --zero-copy=require, and payload would have to be copied; nothing was touched
  4  a file of the new machine exists; nothing was touched

examples:
  vmconv machine convert -O libvirt web.vmx /var/lib/libvirt/images
  vmconv machine convert -O proxmox -o vmid=101 web.vmx /var/lib/vz
  vmconv machine convert web.xml web.ova""",
)
