"""`vmconv convert`."""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from typing import TYPE_CHECKING

from vmconv.cli.options import add_making
from vmconv.cli.report import run_and_report
from vmconv.cli.requests import configure_request, request_of
from vmconv.cli.verbs import Verb

if TYPE_CHECKING:
    from vmconv.conversion.request import Request


def _run(options: argparse.Namespace) -> int:
    request = request_of(options)
    from vmconv.conversion.pipeline import run

    if request.descriptor is not None:
        return _run_stream(options, request)
    return run_and_report(options, partial(run, request))


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
    configure_request(parser)
    add_making(parser)


_EXIT_STATUS = """exit status:
  0  converted
  1  the image, the storage or the plan does not allow it; TARGET was not created
  2  the request makes no sense: an unknown format, option or combination
  3  --zero-copy=require, and payload would have to be copied; nothing was touched

examples:
  vmconv convert disk.raw disk.qcow2
  vmconv convert -f raw -O qcow2 -o cluster_size=2M /dev/vg0/guest guest.qcow2
  vmconv convert --snapshot before-upgrade disk.qcow2 disk.raw
  vmconv convert -O vhd -o subformat=fixed disk.vmdk - | upload-command
  vmconv convert --chain snapshot.vmdk converted/snapshot.qcow2"""

VERB = Verb(
    "Converts a disk without copying its payload wherever storage allows it. What must be copied is announced\n"
    "with the reason before anything is written. The result is read back and compared with the source by its\n"
    "metadata before it appears under its name.",
    _configure,
    _run,
    _EXIT_STATUS,
)
