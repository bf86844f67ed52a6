"""`vmconv convert`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from vmconv.cli.batch import add_batch, refuse_without_directory
from vmconv.cli.options import Parser, add_making
from vmconv.cli.output import print_json, say
from vmconv.cli.report import run_and_report
from vmconv.cli.requests import SOURCE, TARGET, configure_request, request_of
from vmconv.cli.verbs import Verb
from vmconv.errors import counted
from vmconv.interface.scheme import without_secrets

if TYPE_CHECKING:
    from vmconv.conversion.request import Request


def _run(options: argparse.Namespace) -> int:
    if options.directory is not None:
        from vmconv.cli.batch import run_batch

        return run_batch(options, options.names)
    refuse_without_directory(options)
    options.source, *more, target = _sources_and_target(options.names)
    if more and (options.image_opts or any(name.startswith("json:") for name in (options.source, *more))):
        from vmconv.errors import UsageError

        raise UsageError("several sources are named by their paths", hint="without --image-opts and json:")
    request = request_of(options, options.source, target)._replace(more_sources=more)
    from vmconv.conversion.pipeline import run

    if request.descriptor is not None:
        return _run_stream(options, request)
    if options.if_needed and _is_done(options, request):
        return 0
    return run_and_report(options, partial(run, request), request)


def _sources_and_target(names: Sequence[str]) -> Sequence[str]:
    from vmconv.errors import UsageError

    if len(names) < 2:
        raise UsageError(
            f"{counted(len(names), 'name')} given, and a conversion has SOURCE and TARGET",
            hint="--directory DIR converts many disks",
        )
    return names


def _is_done(options: argparse.Namespace, request: Request) -> bool:
    """Says and returns whether the target is the source's disk already."""
    from vmconv.conversion.needed import is_done

    if not os.path.lexists(request.target) or not is_done(request):
        return False
    if options.output == "json":
        print_json({"event": "current", "source": without_secrets(request.source), "target": request.target})
    elif not options.quiet:
        say(f"{request.target}: is {without_secrets(request.source)} already")
    return True


def _run_stream(options: argparse.Namespace, request: Request) -> int:
    """Writes the image to standard output, and messages to standard error."""
    from contextlib import redirect_stdout

    from vmconv.cli import streams
    from vmconv.conversion.pipeline import run
    from vmconv.errors import UsageError

    if streams.is_closed(1):
        raise UsageError("standard output is closed", hint="redirect it to a file or a pipe")
    descriptor = sys.stdout.fileno()
    if os.isatty(descriptor):
        raise UsageError("standard output is a terminal", hint="pipe it into a program or redirect it to a file")
    # Messages must not mix with the image.
    with redirect_stdout(sys.stderr):
        return run_and_report(options, partial(run, request._replace(descriptor=descriptor)))


def _configure(parser: argparse.ArgumentParser) -> None:
    if isinstance(parser, Parser):
        parser.intermixed = True
    parser.usage = (
        f"{parser.prog} [option ...] SOURCE ... TARGET\n"
        f"       {parser.prog} [option ...] -O FMT --directory DIR SOURCE ..."
    )
    parser.add_argument(
        "names", nargs="+", metavar="SOURCE TARGET", help=f"SOURCE: {SOURCE}; several are joined.\nTARGET: {TARGET}"
    )
    configure_request(parser)
    parser.add_argument(
        "--if-needed",
        action="store_true",
        help="do nothing if TARGET exists and is SOURCE's disk in the wanted format; payload that the two do not\n"
        "share is read. With --force, replace it only if it is not",
    )
    add_batch(parser)
    add_making(parser)


_EXIT_STATUS = """exit status:
  0  converted
  1  the image, the storage or the plan does not allow it; TARGET was not created. A device of
     -n that was begun holds no disk; the message says so
  2  the request makes no sense: an unknown format, option or combination
  3  --zero-copy=require, and payload would have to be copied; nothing was touched
  4  TARGET exists; nothing was touched. With --directory: all targets exist
  5  with --directory: some images were not converted

examples:
  vmconv convert disk.raw disk.qcow2
  vmconv convert -f raw -O qcow2 -o cluster_size=2M /dev/vg0/guest guest.qcow2
  vmconv convert --snapshot before-upgrade disk.qcow2 disk.raw
  vmconv convert -O vhd -o subformat=fixed disk.vmdk - | upload-command
  vmconv convert first.raw second.qcow2 joined.vmdk
  vmconv convert --chain snapshot.vmdk converted/snapshot.qcow2
  vmconv convert -O qcow2 --directory converted --skip-existing --jobs 4 *.vmdk"""

VERB = Verb(
    "Converts a disk without copying its payload wherever storage allows it. What must be copied is announced\n"
    "with the reason before anything is written. The result is read back and compared with the source by its\n"
    "metadata before it appears under its name.",
    _configure,
    _run,
    _EXIT_STATUS,
)
