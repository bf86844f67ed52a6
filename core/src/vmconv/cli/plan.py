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
    from vmconv.model.plan import Plan


def _layer(made: Container) -> dict[str, str]:
    """Returns a lower layer and its new image."""
    return {"source": made.source.file.name, "source_format": made.source.format_name, "name": made.name}


def _run(options: argparse.Namespace) -> int:
    from vmconv.cli.output import print_json
    from vmconv.conversion.pipeline import prepared
    from vmconv.conversion.refusals import refuse_copies

    with prepared(request_of(options, options.source, options.target)) as ready:
        layers = [_layer(made) for made in ready.containers[-2::-1]]
        warnings = ready.conversions[0].warnings
        if options.output == "json":
            print_json({**plan_json(ready.plan), "layers": layers, "warnings": list(warnings)}, indent=4)
        else:
            made = ready.containers[-1]
            formats = made.source.format_name, made.format.name
            source = without_secrets(options.source)
            say(f"{source} ({formats[0]}) -> {options.target} ({formats[1]}) by {ready.plan.way}")
            for line in plan_lines(ready.plan, layers, warnings, details=options.verbose):
                say(f"  {line}")
        if options.picture:
            draw_plan(options.picture, ready.image, ready.plan)
        refuse_copies(options.target, options.zero_copy, ready.plan)
    return 0


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
