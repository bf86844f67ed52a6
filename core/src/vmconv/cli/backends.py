"""`vmconv backends`."""

from __future__ import annotations

import argparse
import os

from vmconv.cli.options import add_output
from vmconv.cli.verbs import Verb


def _run(options: argparse.Namespace) -> int:
    from vmconv.cli.output import print_json, print_table
    from vmconv.errors import BackendError
    from vmconv.io.registry import installed

    if not os.path.isdir(options.directory):
        raise BackendError(f"{options.directory}: is not a directory")
    found = []
    for name, backend in installed().backends.items():
        capabilities = backend.capabilities(options.directory)
        found.append(
            {
                "name": name,
                "title": backend.title,
                "usable": capabilities.usable,
                "shares": capabilities.shares,
                "unit": capabilities.unit,
                "reason": capabilities.reason,
            }
        )
    if options.output == "json":
        print_json({"directory": options.directory, "backends": found}, indent=4)
        return 0
    rows = [["BACKEND", "USABLE", "SHARES", "WHAT IT DOES"]]
    for one in found:
        shares = f"blocks of {one['unit']}" if one["shares"] else "no"
        rows.append([str(one["name"]), "yes" if one["usable"] else "no", shares, str(one["reason"] or one["title"])])
    print_table(rows)
    return 0


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", nargs="?", default=".", help="directory to ask about (default: .)")
    add_output(parser)


VERB = Verb(
    "Shows what each backend can do on the filesystem of a directory, after trying it on a file without a name.",
    _configure,
    _run,
)
