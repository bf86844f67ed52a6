"""`vmconv machine check`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from vmconv.cli.options import add_opening, add_options, add_output
from vmconv.cli.verbs import Verb

if TYPE_CHECKING:
    from vmconv.machine.findings import Finding
    from vmconv.machine.model import Machine
    from vmconv.machine.request import MachineRequest


def _run(options: argparse.Namespace) -> int:
    from vmconv.cli.output import as_plain, print_json
    from vmconv.errors import printable
    from vmconv.machine.check import check
    from vmconv.machine.request import MachineRequest
    from vmconv.machine.source import source_of
    from vmconv.machine.target import adapted_to

    request = MachineRequest(
        options.source,
        ".",
        source_format=options.format_f,
        target_format=options.format_O,
        options=options.options,
        allow_external=tuple(options.allow_external),
        force_share=options.force_share,
    )
    with source_of(request) as source:
        machine = adapted_to(request, source.machine) if request.target_format else source.machine
        findings = check(source, machine, request.target_format, inside=options.filesystems)
        end = _end(request, source.machine, inside=options.filesystems)
        if options.payload:
            from vmconv.machine.digests import check_payload

            findings += check_payload(source)
    if options.output == "json":
        print_json([as_plain(one) for one in findings], indent=4)
    else:
        for one in findings:
            print(printable(_line(one)))
        if all(one.level == "note" for one in findings):
            print("No reason was found why it would not start.")
        print(*map(printable, end), sep="\n")
    return 1 if any(one.level == "error" for one in findings) else 0


def _line(one: Finding) -> str:
    return f"{one.level}: {one.path}: {one.text}" + (f" ({one.hint})" if one.hint else "")


def _end(request: MachineRequest, machine: Machine, *, inside: bool) -> list[str]:
    """Returns lines on unread filesystems, and on the next step after a conversion."""
    from vmconv.machine.handoff import handoff
    from vmconv.machine.readiness import HAVE_LIBRARIES

    lines = handoff(request, machine)
    if inside and HAVE_LIBRARIES:
        return lines
    hint = "" if HAVE_LIBRARIES else ": pip install 'vmconv[guest]'"
    return [f"The filesystems inside were not looked at{hint}.", *lines]


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="CONFIG", help="configuration of the machine; nothing is changed")
    parser.add_argument("-f", dest="format_f", metavar="FMT", help="format of CONFIG (default: by its content)")
    parser.add_argument("-O", dest="format_O", metavar="FMT", help="check the machine as it would be on this platform")
    parser.add_argument(
        "--payload",
        "--manifest",
        dest="payload",
        action="store_true",
        help="also read all of a package, and compare it with its digests: the manifest of an OVF or OVA, those beside "
        "the pieces of an XVA",
    )
    add_options(parser, "the machine format")
    parser.add_argument(
        "--no-filesystems",
        dest="filesystems",
        action="store_false",
        help="do not look into filesystems for fstab, boot loader and drivers",
    )
    add_opening(parser, "configurations")
    add_output(parser)


VERB = Verb(
    "Compares the disks with the firmware and the controllers, of CONFIG or with -O of the machine that convert would\n"
    "make: partition tables, EFI system partition, boot code, encryption. With the libraries of vmconv[guest], looks\n"
    "into filesystems for what starts the guest: devices in fstab and boot loader, drivers of Linux and Windows.\n"
    "Reads only what it needs of the disks.",
    _configure,
    _run,
    """exit status:
  0  no reason was found why the machine would not start
  1  it would not start, or it could not be read
  2  the request makes no sense

examples:
  vmconv machine check web.vmx
  vmconv machine check -O proxmox web.vmx
  vmconv machine check --payload appliance.ova""",
)
