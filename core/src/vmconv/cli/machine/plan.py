"""`vmconv machine plan`."""

from __future__ import annotations

import argparse

from vmconv.cli.machine.requests import configure_request, request_of
from vmconv.cli.verbs import Verb


def _run(options: argparse.Namespace) -> int:
    from vmconv.cli.machine.report import plan_lines
    from vmconv.cli.output import as_plain, print_json
    from vmconv.conversion.refusals import refuse_copies
    from vmconv.errors import printable
    from vmconv.machine.pipeline import plan

    found = plan(request_of(options))
    if options.output == "json":
        print_json(as_plain(found), indent=4)
    else:
        print(printable(f"{options.source} ({found.source_format}) -> {found.directory} ({found.target_format})"))
        for line in plan_lines(found):
            print(f"  {printable(line)}")
    refuse_copies(options.target, options.zero_copy, found)
    return 0


VERB = Verb(
    "Shows what convert would do with the same arguments: what becomes of each setting, and of each disk the bytes\n"
    "shared, copied and written. Changes nothing.",
    configure_request,
    _run,
    "exit status: that of vmconv machine convert, as far as it can be known beforehand",
)
