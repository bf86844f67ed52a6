"""Arguments of the verbs that convert machines, or plan to."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from vmconv.cli.options import (
    SetOptions,
    add_from_snapshot,
    add_opening,
    add_options,
    add_output,
    add_storage,
    durability,
    in_snapshot,
)

if TYPE_CHECKING:
    from vmconv.machine.request import MachineRequest


def configure_request(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="CONFIG", help="configuration of the machine to convert; never changed")
    parser.add_argument(
        "target", metavar="TARGET", help="configuration to make, or with -O the directory to make the machine in"
    )
    parser.add_argument("-f", dest="format_f", metavar="FMT", help="format of CONFIG (default: by its content)")
    add_from_snapshot(parser, "CONFIG and its disks")
    parser.add_argument("-O", dest="format_O", metavar="FMT", help="format to make (default: by TARGET's suffix)")
    add_options(parser, "the machine format")
    parser.add_argument("--disk-format", metavar="FMT", help="format of the disks (default: the platform's own)")
    parser.add_argument(
        "--disk-options",
        action=SetOptions,
        default={},
        metavar="NAME=VALUE",
        help="options of the disks' format, separated by commas; vmconv formats lists them",
    )
    parser.add_argument(
        "--uuid",
        choices=("guest", "text"),
        default="guest",
        help="guest: the guest reads the same UUID as before; text: the new configuration shows the same UUID as the\n"
        "old one, which differs for VMware (default: guest)",
    )
    parser.add_argument(
        "--new-identity", action="store_true", help="give the machine a new UUID and new MAC addresses, for a clone"
    )
    parser.add_argument(
        "--chain",
        action="store_true",
        help="make one image for each layer of a disk with snapshots or backing files, instead of flattening it",
    )
    parser.add_argument(
        "--in-place",
        action="store_true",
        help="turn CONFIG's own disks into the new ones, also where storage cannot share; CONFIG itself is kept",
    )
    parser.add_argument("--keep-undo", action="store_true", help="with --in-place: keep an undo file for each disk")
    parser.add_argument("--strict", action="store_true", help="fail before any change rather than lose a setting")
    parser.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="FIELD",
        help="fail rather than lose this field, such as tpm or nics.mac; may be repeated",
    )
    add_storage(parser)
    parser.add_argument("--force", action="store_true", help="replace files that exist")
    add_opening(parser, "configurations")
    add_output(parser)


def request_of(options: argparse.Namespace) -> MachineRequest:
    """Returns the request of the arguments."""
    from vmconv.machine.request import MachineRequest

    return MachineRequest(
        in_snapshot(options, options.source),
        options.target,
        source_format=options.format_f,
        target_format=options.format_O,
        options=options.options,
        disk_format=options.disk_format,
        disk_options=options.disk_options,
        uuid=options.uuid,
        new_identity=options.new_identity,
        chain=options.chain,
        in_place=options.in_place,
        keep_undo=options.keep_undo,
        strict=options.strict,
        keep=tuple(options.keep),
        backend=options.backend,
        zero_copy=options.zero_copy,
        cache=durability(options.cache),
        force=options.force,
        force_share=options.force_share,
        allow_external=tuple(options.allow_external),
        mode=options.mode,
    )
