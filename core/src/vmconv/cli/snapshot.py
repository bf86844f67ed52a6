"""`vmconv snapshot`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from vmconv.cli.options import add_access, add_format, add_keep_undo, add_output, reading
from vmconv.cli.verbs import Verb


def _configure(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_mutually_exclusive_group()
    verbs.add_argument("-l", dest="list", action="store_true", help="list the snapshots (default)")
    verbs.add_argument("-c", dest="create", metavar="NAME", help="take a snapshot")
    verbs.add_argument("-d", dest="delete", metavar="NAME", help="delete the snapshot with this name, or else this id")
    verbs.add_argument("-a", dest="apply", metavar="NAME", help="make the disk what it was in the snapshot")
    parser.add_argument("file", metavar="FILE", help="image with snapshots")
    add_format(parser)
    add_keep_undo(parser, "FILE")
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    add_output(parser)
    add_access(parser)


def _run(options: argparse.Namespace) -> int:
    chosen = [verb for verb in ("create", "delete", "apply") if getattr(options, verb) is not None]
    if not chosen:
        return _list(options)
    from vmconv.api import snapshot
    from vmconv.cli.edited import report

    result = snapshot(
        options.file,
        chosen[0],  # type: ignore[arg-type] # one of the three above
        getattr(options, chosen[0]),
        source_format=options.format_f,
        keep_undo=options.keep_undo,
        allow_external=options.allow_external,
    )
    report(result, options)
    return 0


def _list(options: argparse.Namespace) -> int:
    from vmconv.cli.output import print_json
    from vmconv.errors import printable
    from vmconv.inspect.images import opened

    with opened(reading(options)) as (image, _):
        snapshots = list(image.details.get("snapshots", ()))
    if options.output == "json":
        print_json(snapshots, indent=4)
    elif snapshots:
        # As qemu-img prints them.
        print("Snapshot list:")
        print(_ROW.format("ID", "TAG", "VM SIZE", "DATE", "VM CLOCK", "ICOUNT"))
        for one in snapshots:
            print(printable(_row(one)))
    return 0


_ROW = "{:<10}{:<17}{:>8}{:>20}{:>13}{:>11}"


def _row(one: Mapping[str, Any]) -> str:
    import time

    from vmconv.cli.output import size_text

    seconds, milliseconds = one["vm-clock-sec"], one["vm-clock-nsec"] // 10**6
    clock = f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}.{milliseconds:03}"
    date = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one["date-sec"]))
    return _ROW.format(
        one["id"], one["name"], size_text(one["vm-state-size"]), date, clock, one.get("icount", "")
    ).rstrip()


VERB = Verb(
    "Lists, takes, deletes or applies the internal snapshots of a qcow2 image. Only metadata is written: all of an\n"
    "edit or nothing. What -a replaces is lost unless it is in a snapshot itself.",
    _configure,
    _run,
    """exit status:
  0  listed, or changed
  1  the image or the storage does not allow it; nothing was changed
  2  the request makes no sense: an unknown snapshot

examples:
  vmconv snapshot -c before-upgrade disk.qcow2
  vmconv snapshot -l disk.qcow2
  vmconv snapshot -a before-upgrade disk.qcow2""",
)
