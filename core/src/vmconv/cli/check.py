"""`vmconv check`."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from vmconv.cli.options import add_access, add_format, add_output, reading
from vmconv.cli.verbs import Verb
from vmconv.errors import printable

if TYPE_CHECKING:
    from vmconv.interface.format import CheckReport


_CHECK_NOT_DONE, _CHECK_CORRUPT, _CHECK_LEAKS, _CHECK_UNSUPPORTED = 1, 2, 3, 63


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="image to check")
    add_format(parser)
    parser.add_argument(
        "--payload",
        action="store_true",
        help="also read all of the disk, and compare it with the hashes that the image stores (EWF: MD5, SHA-1)",
    )
    add_output(parser)
    add_access(parser)
    # As in qemu-img check, 2 and 3 are findings, so a check that failed needs another code.
    parser.set_defaults(error_code=_CHECK_NOT_DONE)


def _run(options: argparse.Namespace) -> int:
    from vmconv.cli.output import print_json
    from vmconv.inspect.checking import check_image
    from vmconv.inspect.images import opened

    with opened(reading(options)) as (image, opener):
        report = check_image(image, opener, payload=options.payload)
    if report is None:
        print(f"vmconv: {options.file}: {image.format_name} images have no structure to check", file=sys.stderr)
        return _CHECK_UNSUPPORTED
    if options.output == "json":
        print_json({"filename": options.file, "format": image.format_name, **_report_json(report)}, indent=4)
    else:
        _print_report(report)
    if report.errors:
        return _CHECK_NOT_DONE
    if report.corruption_count:
        return _CHECK_CORRUPT
    return _CHECK_LEAKS if report.leak_count else 0


def _report_json(report: CheckReport) -> dict[str, Any]:
    return {
        "corruptions": report.corruption_count,
        "leaks": report.leak_count,
        "check-errors": len(report.errors),
        "allocated-clusters": report.allocated_clusters,
        "total-clusters": report.total_clusters,
        "image-end-offset": report.image_end,
        "findings": [*report.errors, *report.corruptions, *report.leaks],
        "doubts": list(report.doubts),
    }


def _print_report(report: CheckReport) -> None:
    # The wording of qemu-img check.
    for title, texts in (
        ("Not checked: ", report.errors),
        ("ERROR ", report.corruptions),
        ("Leaked ", report.leaks),
        ("Note: ", report.doubts),
    ):
        for text in texts:
            print(f"{title}{printable(text)}")
    for count, shown, what in (
        (report.corruption_count, len(report.corruptions), "errors"),
        (report.leak_count, len(report.leaks), "leaked clusters"),
    ):
        if count > shown:
            print(f"... {count} {what} in all")
    if report.errors:
        print("The check is not complete.")
    elif not report.corruption_count and not report.leak_count:
        print("No errors were found on the image.")
    if report.total_clusters:
        part = report.allocated_clusters / report.total_clusters
        print(f"{report.allocated_clusters}/{report.total_clusters} = {part:.2%} allocated")
    print(f"Image end offset: {report.image_end}")


VERB = Verb(
    "Checks the structure of an image: references out of range, overlaps, leaks and wrong reference counts; and\n"
    "whether the files it refers to exist and are unchanged. Changes nothing.",
    _configure,
    _run,
    "exit status (as qemu-img check):\n"
    "  0   no errors\n"
    "  1   the check failed\n"
    "  2   the image is corrupt, or a file that it refers to has changed\n"
    "  3   clusters are leaked, nothing is corrupt\n"
    "  63  the format has no structure to check",
)
