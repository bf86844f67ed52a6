"""`vmconv convert` and `vmconv plan`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from vmconv.cli.command import Command
from vmconv.cli.options import (
    add_access,
    add_format,
    add_making,
    add_options,
    add_output,
    add_snapshot,
    add_storage,
    source_and_storage,
)
from vmconv.cli.reporting import kept, plan_json, reported

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from vmconv.containers import Container
    from vmconv.conversion import Prepared, Request
    from vmconv.planner import Plan
    from vmconv.streaming import Stream

_STREAM = "-"
"""Standard output as a target."""


def _request(options: argparse.Namespace) -> Request:
    from vmconv.conversion import Request

    return Request(
        options.source,
        options.target,
        target_format=options.format_O,
        options=options.options,
        chain=options.chain,
        backing_file=options.backing_file,
        backing_format=options.backing_format,
        in_place=options.in_place,
        keep_undo=options.keep_undo,
        any_owner=options.any_owner,
        **source_and_storage(options),
    )


def _layer(made: Container) -> dict[str, str]:
    """Returns what becomes of a layer below the one that the user named."""
    return {"source": made.source.file.name, "source_format": made.source.format_name, "name": made.name}


def _planned(request: Request) -> AbstractContextManager[Prepared | Stream]:
    if request.target == _STREAM:
        from vmconv import streaming

        return streaming.prepared(request)
    from vmconv import conversion

    return conversion.prepared(request)


def _run_plan(options: argparse.Namespace) -> int:
    from vmconv.cli.output import print_json
    from vmconv.refusals import refuse_copies

    with _planned(_request(options)) as ready:
        layers = [_layer(made) for made in ready.containers[-2::-1]]
        warnings = ready.conversions[0].warnings
        if options.output == "json":
            print_json({**plan_json(ready.plan), "layers": layers, "warnings": list(warnings)}, indent=4)
        else:
            made = ready.containers[-1]
            formats = made.source.format_name, made.format.name
            print(f"{options.source} ({formats[0]}) -> {options.target} ({formats[1]}) by {ready.plan.way}")
            for line in _plan_lines(ready.plan, layers, warnings):
                print(f"  {line}")
        refuse_copies(options.target, options.zero_copy, ready.plan)
    return 0


def _plan_lines(plan: Plan, layers: Sequence[dict[str, str]], warnings: Sequence[str]) -> Iterator[str]:
    from vmconv.cli.output import size_text
    from vmconv.references import notes

    for name, value in plan.totals._asdict().items():
        if name != "referenced":
            word = kept(plan.backend) if name == "shared" else name
            yield f"{word:<8}{size_text(value):>9}  ({value} bytes)"
    for reference in plan.references:
        yield f"refers to {reference.name}: {size_text(reference.length)} ({reference.length} bytes)"
    for copy in plan.copies:
        ranges = f"{copy.ranges} {'range' if copy.ranges == 1 else 'ranges'}"
        where = f"in {ranges}, the first at {copy.offset:#x} of {copy.file}"
        yield f"copied because {copy.reason}: {size_text(copy.bytes)} {where}"
    for layer in layers:
        yield f"layer {layer['source']} ({layer['source_format']}) -> {layer['name']}"
    yield from (f"file {file.name}: {size_text(file.size)}" for file in plan.files)
    yield from (f"not carried over: {loss}" for loss in plan.losses)
    yield from (f"note: {note}" for note in notes(plan.references, plan.directory))
    yield from (f"warning: {warning}" for warning in warnings)


def _run_convert(options: argparse.Namespace) -> int:
    request = _request(options)
    if request.target == _STREAM:
        return _run_stream(options, request)
    from vmconv.conversion import run

    return reported(options, partial(run, request))


def _run_stream(options: argparse.Namespace, request: Request) -> int:
    """Writes the image to standard output; what is said of it goes to standard error."""
    from contextlib import redirect_stdout

    from vmconv.cli import streams
    from vmconv.errors import UsageError
    from vmconv.streaming import run

    if streams.is_closed(1):
        raise UsageError("standard output is closed", hint="redirect it to a file or a pipe")
    descriptor = sys.stdout.fileno()
    if os.isatty(descriptor):
        raise UsageError("standard output is a terminal", hint="pipe it into a program or redirect it to a file")
    with redirect_stdout(sys.stderr):
        return reported(options, lambda **how: [run(request, descriptor, **how)])


def _configure_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="image or disk to convert; never changed without --in-place")
    parser.add_argument(
        "target", metavar="TARGET", help="file to make; appears complete or not at all; -: standard output"
    )
    add_format(parser, "-f", "SOURCE")
    parser.add_argument("-O", dest="format_O", metavar="FMT", help="format of TARGET (default: by its suffix)")
    add_options(parser, "the target format")
    add_snapshot(parser)
    parser.add_argument(
        "--chain",
        action="store_true",
        help="make an image of each layer of SOURCE, beside TARGET and named after the layer, instead of flattening\n"
        "them; all appear together",
    )
    parser.add_argument(
        "-B",
        dest="backing_file",
        metavar="FILE",
        help="keep the chain from this layer of SOURCE downwards as TARGET's backing file, instead of flattening it;\n"
        "written as given, relative to TARGET's directory",
    )
    parser.add_argument(
        "-F", dest="backing_format", metavar="FMT", help="format of the backing file (default: as SOURCE has it)"
    )
    add_storage(parser)
    parser.add_argument(
        "--force", action="store_true", help="replace TARGET, and what is made beside it, where it exists"
    )
    parser.add_argument(
        "--in-place",
        action="store_true",
        help="turn SOURCE's own file into TARGET: payload stays where it lies, SOURCE is gone afterwards",
    )
    parser.add_argument(
        "--keep-undo",
        action="store_true",
        help="with --in-place: keep what it takes to go back, in TARGET.vmconv-undo; see vmconv undo",
    )
    parser.add_argument(
        "--any-owner",
        action="store_true",
        help="with --in-place: change and remove files of SOURCE that belong to others than SOURCE itself does",
    )
    add_output(parser)
    add_access(parser)


def _configure_convert(parser: argparse.ArgumentParser) -> None:
    _configure_plan(parser)
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

COMMANDS = (
    Command(
        "plan",
        "show what a conversion would share, copy and write",
        "Shows what convert would do with the same arguments: what is shared, copied and written, and why each copied\n"
        "byte must be. Touches nothing.",
        _configure_plan,
        _run_plan,
        "exit status: as vmconv convert would return, as far as that can be known beforehand",
    ),
    Command(
        "convert",
        "convert a disk to another format",
        "Converts a disk without copying its payload wherever storage allows it. What must be copied is announced\n"
        "with the reason before anything is written. The result is read back and compared with the source by its\n"
        "metadata before it gets its name.",
        _configure_convert,
        _run_convert,
        _EXIT_STATUS,
    ),
)
