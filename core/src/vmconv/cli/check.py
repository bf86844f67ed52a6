"""`vmconv check`."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from vmconv.cli.options import add_access, add_format, add_keep_undo, add_output, add_parent, add_secret, reading
from vmconv.cli.verbs import Verb
from vmconv.errors import UsageError, printable

if TYPE_CHECKING:
    from vmconv.interface.format import CheckReport


_CHECK_NOT_DONE, _CHECK_CORRUPT, _CHECK_LEAKS, _CHECK_UNSUPPORTED = 1, 2, 3, 63


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="image to check")
    add_format(parser)
    parser.add_argument(
        "--payload",
        action="store_true",
        help="also read all of the disk, and compare it with the hashes that the image stores (EWF: MD5, SHA-1;\n"
        "DMG: CRC-32)",
    )
    parser.add_argument(
        "-r",
        dest="repair",
        choices=("leaks", "all"),
        metavar="leaks|all",
        help="repair leaks, or all that follows from the rest of the image; its content stays as it is",
    )
    add_keep_undo(parser, "FILE", "with -r, ")
    add_output(parser)
    add_access(parser)
    add_secret(parser)
    add_parent(parser)
    # As in qemu-img check, 2 and 3 are findings, so a check that failed needs another code.
    parser.set_defaults(error_code=_CHECK_NOT_DONE)


def _run(options: argparse.Namespace) -> int:
    if options.repair:
        return _repair(options)
    if options.keep_undo:
        raise UsageError("--keep-undo is for repairs", hint="-r all repairs what can be")
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
        print_report(report)
    return _code(report)


def _repair(options: argparse.Namespace) -> int:
    from vmconv.api import repair
    from vmconv.cli.output import print_json

    for given, name in ((options.payload, "--payload"), (options.force_share, "-U")):
        if given:
            raise UsageError(f"{name} is for a check that changes nothing", hint=f"without -r {options.repair}")
    done = repair(
        options.file,
        options.repair,
        source_format=options.format_f,
        keep_undo=options.keep_undo,
        allow_external=options.allow_external,
    )
    if done is None:
        print(f"vmconv: {options.file}: the format has no structure to check", file=sys.stderr)
        return _CHECK_UNSUPPORTED
    if options.output == "json":
        fixed = {"leaks-fixed": done.leaks, "corruptions-fixed": done.corruptions, "written": done.written}
        print_json({"filename": options.file, **_report_json(done.after), **fixed}, indent=4)
        return _code(done.after)
    if done.written:
        # The wording of qemu-img check.
        print("The following inconsistencies were found and repaired:\n")
        print(f"    {done.leaks} leaked clusters\n    {done.corruptions} corruptions\n")
        print("Double checking the fixed image now...")
    print_report(done.after)
    return _code(done.after)


def _code(report: CheckReport) -> int:
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


def print_report(report: CheckReport) -> None:
    """Prints what a check has found, in the words of qemu-img check."""
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
    "whether the files it refers to exist and are unchanged. Changes nothing without -r.",
    _configure,
    _run,
    "exit status (as qemu-img check):\n"
    "  0   no errors, or all are repaired\n"
    "  1   the check failed\n"
    "  2   the image is corrupt, or a file that it refers to has changed\n"
    "  3   clusters are leaked, nothing is corrupt\n"
    "  63  the format has no structure to check",
)
