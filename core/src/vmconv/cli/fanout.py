"""`vmconv fanout`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import partial

from vmconv.cli.options import (
    add_access,
    add_bitmaps,
    add_compress,
    add_format,
    add_from_snapshot,
    add_making,
    add_options,
    add_output,
    add_parent,
    add_rate,
    add_secret,
    add_snapshot,
    add_sparse,
    add_storage,
    in_snapshot,
    source_and_storage,
)
from vmconv.cli.report import run_and_report
from vmconv.cli.verbs import Verb


def _run(options: argparse.Namespace) -> int:
    from vmconv.conversion.fanout import requests
    from vmconv.conversion.pipeline import run
    from vmconv.conversion.request import Request

    common = Request(in_snapshot(options, options.source), options.directory, **source_and_storage(options))
    return run_and_report(
        options, partial(run, *requests(common, options.to, options.directory, _by_format(options.options)))
    )


def _by_format(given: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Returns the options of each format, from names such as `qcow2.cluster_size`."""
    from vmconv.errors import UsageError

    found: dict[str, dict[str, str]] = {}
    for name, value in given.items():
        format_name, dot, option = name.partition(".")
        if not dot:
            raise UsageError(f"option {name!r} names no format", hint=f"write FORMAT.{name}={value}")
        found.setdefault(format_name, {})[option] = value
    return found


def _formats(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="image or disk to convert; never changed")
    parser.add_argument(
        "--to", type=_formats, required=True, metavar="FMT,FMT", help="formats to make, separated by commas"
    )
    parser.add_argument("--directory", default=".", metavar="DIR", help="where to make the images (default: .)")
    add_format(parser, "-f", "SOURCE")
    add_options(parser, "the formats", "FMT.NAME=VALUE")
    add_compress(parser)
    add_sparse(parser)
    add_bitmaps(parser)
    add_snapshot(parser)
    add_from_snapshot(parser)
    add_storage(parser)
    add_rate(parser)
    parser.add_argument("--force", action="store_true", help="replace images that exist")
    add_making(parser)
    add_output(parser)
    add_access(parser)
    add_secret(parser)
    add_parent(parser)


VERB = Verb(
    "Makes an image of a disk in each of several formats, named after it. All share the blocks of the disk where\n"
    "storage allows it: together they take the space of one, and deleting one does not affect the others. All\n"
    "appear, or none does.",
    _configure,
    _run,
    """exit status:
  0  all images were made
  1  an image, the storage or the plan does not allow it; none was created
  2  the request makes no sense: an unknown format, option or combination
  3  --zero-copy=require, and payload would have to be copied; nothing was touched
  4  an image exists; nothing was touched

example:
  vmconv fanout golden.raw --to qcow2,vmdk,vhdx,vdi --directory published -o qcow2.cluster_size=2M""",
)
