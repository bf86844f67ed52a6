"""The arguments of `convert` and `plan`, and their request."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from vmconv.cli.options import (
    add_access,
    add_any_owner,
    add_bitmaps,
    add_compress,
    add_decompress,
    add_format,
    add_from_snapshot,
    add_ignored,
    add_keep_undo,
    add_options,
    add_output,
    add_parent,
    add_part,
    add_rate,
    add_secret,
    add_snapshot,
    add_sparse,
    add_storage,
    add_target_secret,
    in_snapshot,
    source_and_storage,
)

if TYPE_CHECKING:
    from vmconv.conversion.request import Request

_STANDARD_OUTPUT = 1


SOURCE = "image or disk to convert: a file, a URL, or - for standard input; never changed without --in-place"
TARGET = "file to make; appears complete or not at all; -: standard output"


def add_source_and_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help=SOURCE)
    parser.add_argument("target", metavar="TARGET", help=TARGET)


def configure_request(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of a conversion, without the names of its source and target."""
    add_format(parser, "-f", "SOURCE")
    parser.add_argument(
        "--image-opts",
        action="store_true",
        help="SOURCE is driver=FORMAT,file.filename=PATH, as for QEMU; json:{...} is taken without this option",
    )
    parser.add_argument("-O", dest="format_O", metavar="FMT", help="format of TARGET (default: by its suffix)")
    add_options(parser, "the target format")
    add_compress(parser)
    add_sparse(parser)
    add_bitmaps(parser)
    add_snapshot(parser)
    add_part(parser)
    add_from_snapshot(parser)
    add_decompress(parser)
    parser.add_argument(
        "--chain",
        action="store_true",
        help="make one image per layer of SOURCE, beside TARGET and named after the layer, instead of flattening;\n"
        "all appear together",
    )
    parser.add_argument(
        "-B",
        dest="backing_file",
        metavar="FILE",
        help="keep the chain from this layer of SOURCE downwards as TARGET's backing file, instead of flattening it;\n"
        "stored as given, relative to TARGET's directory",
    )
    parser.add_argument(
        "-F", dest="backing_format", metavar="FMT", help="format of the backing file (default: that in SOURCE)"
    )
    add_storage(parser)
    add_rate(parser)
    add_ignored(parser)
    parser.add_argument(
        "--force", action="store_true", help="replace TARGET, and the files made beside it, if they exist"
    )
    parser.add_argument(
        "--in-place",
        action="store_true",
        help="turn SOURCE's own file into TARGET: payload stays in place, SOURCE no longer exists afterwards",
    )
    parser.add_argument(
        "-n",
        dest="no_create",
        action="store_true",
        help="replace the content of TARGET, which exists: a block device, or an image that keeps its format, options\n"
        "and size, and is replaced in one step",
    )
    parser.add_argument(
        "--target-is-zero",
        action="store_true",
        help="with -n: the device should be zero, as a new thin volume is: read it, and zero only what is not zero",
    )
    add_keep_undo(parser, "TARGET", when="with --in-place: ")
    add_any_owner(parser, "SOURCE", when="with --in-place: ")
    add_output(parser)
    add_access(parser)
    add_secret(parser)
    add_target_secret(parser)
    add_parent(parser)


def request_of(options: argparse.Namespace, source: str, target: str) -> Request:
    """Returns the request from the arguments of `configure_request`, and the names."""
    from vmconv.conversion.request import Request

    common = source_and_storage(options)
    if options.image_opts or source.startswith("json:"):
        from vmconv.cli.image_opts import named

        source, common["source_format"] = named(source, options.format_f, image_opts=options.image_opts)
    return Request(
        in_snapshot(options, source),
        target,
        target_format=options.format_O,
        options=options.options,
        chain=options.chain,
        backing_file=options.backing_file,
        backing_format=options.backing_format,
        in_place=options.in_place,
        keep_undo=options.keep_undo,
        any_owner=options.any_owner,
        descriptor=_STANDARD_OUTPUT if target == "-" else None,
        no_create=options.no_create,
        target_is_zero=options.target_is_zero,
        decompress=options.decompress,
        decompress_limit=options.decompress_limit,
        offset=options.offset,
        length=options.length,
        target_secret=options.target_secret,
        **common,
    )
