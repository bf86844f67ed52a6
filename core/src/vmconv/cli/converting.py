"""`vmconv convert` and `vmconv plan`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from vmconv.cli.command import Command
from vmconv.cli.options import SetOptions, add_access, add_format, add_output

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from vmconv.containers import Container
    from vmconv.conversion import Prepared, Request, Result
    from vmconv.planner import Plan
    from vmconv.streaming import Stream

_STREAM = "-"
"""Standard output as a target."""


def _request(options: argparse.Namespace) -> Request:
    from vmconv.conversion import Request

    return Request(
        options.source,
        options.target,
        source_format=options.format_f,
        target_format=options.format_O,
        options=options.options,
        snapshot=options.snapshot,
        chain=options.chain,
        backing_file=options.backing_file,
        backing_format=options.backing_format,
        backend=options.backend,
        zero_copy=options.zero_copy,
        cache=options.cache,
        force=options.force,
        force_share=options.force_share,
        allow_external=options.allow_external,
    )


def _plan_json(plan: Plan) -> dict[str, Any]:
    return {
        "backend": plan.backend,
        **plan.totals._asdict(),
        "copies": [copy._asdict() for copy in plan.copies],
        "references": [{"name": one.name, "bytes": one.length} for one in plan.references],
        "losses": list(plan.losses),
        "files": [{"name": file.name, "size": file.size, **_steps(file)} for file in plan.files],
    }


def _layer(made: Container) -> dict[str, str]:
    """Returns what becomes of a layer below the one that the user named."""
    return {"source": made.source.file.name, "source_format": made.source.format_name, "name": made.name}


def _steps(file: Any) -> dict[str, int]:
    from vmconv.planner import Action

    return {action.name.lower(): file.steps.total(action) for action in Action}


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
            print_json({**_plan_json(ready.plan), "layers": layers, "warnings": list(warnings)}, indent=4)
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
            yield f"{name:<8}{size_text(value):>9}  ({value} bytes)"
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


_EVENT_SECONDS = 0.1


class _Silence:
    """What `--quiet` prints."""

    def announce(self, plan: Plan) -> None:
        pass

    def progress(self, done: int, to_do: int) -> None:
        pass

    def results(self, *results: Result) -> None:
        pass

    def close(self) -> None:
        pass


class _Events(_Silence):
    """One JSON document on each line: the plan, progress, the result."""

    def announce(self, plan: Plan) -> None:
        self._print("plan", _plan_json(plan))

    def __init__(self) -> None:
        self._said = 0.0

    def progress(self, done: int, to_do: int) -> None:
        now = time.monotonic()
        if done in (0, to_do) or now - self._said >= _EVENT_SECONDS:
            self._said = now
            self._print("progress", {"done": done, "total": to_do})

    def results(self, *results: Result) -> None:
        from vmconv.cli.output import as_plain

        for result in results:
            self._print("result", as_plain(result))

    def _print(self, event: str, values: dict[str, Any]) -> None:
        from vmconv.cli.output import print_json

        print_json({"event": event, **values})


class _Words(_Silence):
    """What people read: what will be copied and why, a bar, and what was done."""

    def __init__(self, *, bar: bool) -> None:
        from vmconv.cli.output import ProgressBar

        self._bar = ProgressBar() if bar else None

    def announce(self, plan: Plan) -> None:
        from vmconv.cli.output import size_text
        from vmconv.references import notes

        if plan.backend == "stream":
            print(f"{plan.files[0].name}: {plan.files[0].size} bytes", file=sys.stderr)
        for copy in plan.copies:
            print(f"copying {size_text(copy.bytes)} ({copy.bytes} bytes) because {copy.reason}", file=sys.stderr)
        for loss in plan.losses:
            print(f"not carried over: {loss}", file=sys.stderr)
        for note in notes(plan.references, plan.directory):
            print(f"note: {note}", file=sys.stderr)

    def progress(self, done: int, to_do: int) -> None:
        if self._bar:
            self._bar(done, to_do)

    def close(self) -> None:
        if self._bar:
            self._bar.close()

    def results(self, *results: Result) -> None:
        for warning in dict.fromkeys(warning for result in results for warning in result.warnings):
            print(f"warning: {warning}", file=sys.stderr)
        seconds = f" in {results[0].seconds:.3f} s"
        for result in results:
            print(f"{_done(result)}{seconds if len(results) == 1 else ''}")
        if len(results) > 1:
            print(f"{len(results)} images{seconds}")


def _done(result: Result) -> str:
    from vmconv.cli.output import size_text

    totals = result.totals
    referenced = f"referenced {size_text(totals.referenced)}, " if totals.referenced else ""
    return (
        f"{' on '.join([result.target, *result.layers])}: {referenced}shared {size_text(totals.shared)}, "
        f"copied {size_text(totals.copied)}, written {size_text(totals.written)}"
    )


def reported(options: argparse.Namespace, convert: Callable[..., Sequence[Result]]) -> int:
    """Calls `convert`, printing what will be done, progress and results as the options want it."""
    report = _Silence() if options.quiet else _Words(bar=options.progress or sys.stderr.isatty())
    if options.output == "json":
        report = _Events()
    try:
        results = convert(verify=options.verify, announce=report.announce, progress=report.progress)
    finally:
        report.close()
    report.results(*results)
    return 0


def _run_convert(options: argparse.Namespace) -> int:
    request = _request(options)
    if request.target == _STREAM:
        return _run_stream(options, request)
    from vmconv.conversion import run

    return reported(options, partial(run, request))


def _run_stream(options: argparse.Namespace, request: Request) -> int:
    """Writes the image to standard output; what is said of it goes to standard error."""
    from contextlib import redirect_stdout

    from vmconv.errors import UsageError
    from vmconv.streaming import run

    descriptor = sys.stdout.fileno()
    if os.isatty(descriptor):
        raise UsageError("standard output is a terminal", hint="pipe it into a program or redirect it to a file")
    with redirect_stdout(sys.stderr):
        return reported(options, lambda **how: [run(request, descriptor, **how)])


def _configure_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="image or disk to convert; never changed")
    parser.add_argument(
        "target", metavar="TARGET", help="file to make; appears complete or not at all; -: standard output"
    )
    add_format(parser, "-f", "SOURCE")
    parser.add_argument("-O", dest="format_O", metavar="FMT", help="format of TARGET (default: by its suffix)")
    parser.add_argument(
        "-o",
        dest="options",
        action=SetOptions,
        default={},
        metavar="NAME=VALUE",
        help="options of the target format, separated by commas; vmconv formats lists them",
    )
    parser.add_argument(
        "-l", "--snapshot", metavar="NAME", help="convert this internal snapshot (id or name), not the present state"
    )
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
    add_output(parser)
    add_access(parser)


def add_storage(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that say how bytes get where they belong."""
    parser.add_argument(
        "--zero-copy",
        choices=("auto", "require"),
        default="auto",
        help="require: fail, touching nothing, rather than copy a byte of payload (default: auto, copies what must be)",
    )
    parser.add_argument(
        "--backend", default="auto", metavar="NAME", help="auto, or one that vmconv backends lists (default: auto)"
    )
    parser.add_argument(
        "-t",
        dest="cache",
        choices=("writeback", "unsafe"),
        default="writeback",
        help="writeback: what is made is on storage before it gets its name; unsafe: do not wait for storage, as\n"
        "qemu-img convert does unless told otherwise: a power cut may leave damaged images (default: writeback)",
    )


def _configure_convert(parser: argparse.ArgumentParser) -> None:
    _configure_plan(parser)
    add_making(parser)


def add_making(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of what is not only planned but made."""
    parser.add_argument("-p", "--progress", action="store_true", help="show progress even when not on a terminal")
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    parser.add_argument(
        "--no-verify", dest="verify", action="store_false", help="do not read the result's metadata back and check it"
    )


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
