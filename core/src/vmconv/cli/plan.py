"""`vmconv plan`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from vmconv.cli.options import add_verbose
from vmconv.cli.output import say
from vmconv.cli.picture import add_picture, draw_plan
from vmconv.cli.report import plan_json, shared_word, shown_losses
from vmconv.cli.requests import add_source_and_target, configure_request, request_of
from vmconv.cli.verbs import Verb
from vmconv.interface.scheme import without_secrets

if TYPE_CHECKING:
    from vmconv.conversion.containers import Container
    from vmconv.conversion.pipeline import Prepared
    from vmconv.model.plan import Plan


def _layer(made: Container) -> dict[str, str]:
    """Returns a lower layer and its new image."""
    return {"source": made.source.file.name, "source_format": made.source.format_name, "name": made.name}


def _run(options: argparse.Namespace) -> int:
    from vmconv.conversion.pipeline import prepared

    with prepared(request_of(options, options.source, options.target)) as ready:
        layers = [_layer(made) for made in ready.containers[-2::-1]]
        show_plan(ready, layers, as_json=options.output == "json", details=options.verbose)
        if options.picture:
            draw_plan(options.picture, ready.image, ready.plan)
        _refuse_copies(ready)
    return 0


def show_plan(
    ready: Prepared, layers: Sequence[dict[str, str]] = (), *, as_json: bool = False, details: bool = False
) -> None:
    """Prints a planned conversion; `layers` are images below the target."""
    from vmconv.cli.output import print_json

    warnings = ready.conversions[0].warnings
    if as_json:
        print_json({**plan_json(ready.plan), "layers": list(layers), "warnings": list(warnings)}, indent=4)
        return
    for request, containers, _ in ready.conversions:
        made = containers[-1]
        source = without_secrets(request.source)
        formats = made.source.format_name, made.format.name
        say(f"{source} ({formats[0]}) -> {request.target} ({formats[1]}) by {ready.plan.way}")
    for line in plan_lines(ready.plan, layers, warnings, details=details):
        say(f"  {line}")


def _refuse_copies(ready: Prepared) -> None:
    from vmconv.conversion.refusals import refuse_copies

    request = ready.conversions[0].request
    refuse_copies(request.target, request.zero_copy, ready.plan)


def plan_lines(
    plan: Plan, layers: Sequence[dict[str, str]], warnings: Sequence[str], *, details: bool
) -> Iterator[str]:
    from vmconv.cli.output import size_text
    from vmconv.errors import counted
    from vmconv.model.references import notes

    for name, value in plan.totals._asdict().items():
        if name != "referenced":
            word = shared_word(plan) if name == "shared" else name
            yield f"{word:<8}{size_text(value):>9}  ({value} bytes)"
    for reference in plan.references:
        yield f"refers to {reference.name}: {size_text(reference.length)} ({reference.length} bytes)"
    for copy in plan.copies:
        where = f"in {counted(copy.ranges, 'range')}, the first at {copy.offset:#x} of {copy.file}"
        yield f"copied because {copy.reason}: {size_text(copy.bytes)} {where}"
    for layer in layers:
        yield f"layer {layer['source']} ({layer['source_format']}) -> {layer['name']}"
    yield from (f"file {file.name}: {size_text(file.size)}" for file in plan.files)
    yield from (f"not carried over: {loss}" for loss in shown_losses(plan, details=details))
    yield from (f"note: {note}" for note in (*plan.notes, *notes(plan.references, plan.directory)))
    yield from (f"warning: {warning}" for warning in warnings)


def _configure(parser: argparse.ArgumentParser) -> None:
    add_source_and_target(parser)
    configure_request(parser)
    add_verbose(parser)
    add_picture(parser, "the source's disk and the new files")


VERB = Verb(
    "Shows what convert would do with the same arguments: the bytes shared, copied and written, and a reason for\n"
    "each copied byte. Changes nothing.",
    _configure,
    _run,
    "exit status: that of vmconv convert, as far as it can be known beforehand",
)
