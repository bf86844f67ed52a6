"""`vmconv info`, `vmconv map` and `vmconv check`: looking at one image."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vmconv.cli.command import Command
from vmconv.cli.options import access, add_access, add_format, add_output
from vmconv.errors import in_words, printable

if TYPE_CHECKING:
    from vmconv.formats import CheckReport
    from vmconv.opener import Opener

_CHECK_NOT_DONE, _CHECK_CORRUPT, _CHECK_LEAKS, _CHECK_UNSUPPORTED = 1, 2, 3, 63


def _opener(options: argparse.Namespace) -> Opener:
    from vmconv.opener import Opener
    from vmconv.registry import installed

    return Opener(installed(), **access(options))


def _run_info(options: argparse.Namespace) -> int:
    from vmconv.cli.output import print_json
    from vmconv.description import describe

    with _opener(options) as opener:
        image = opener.image(options.file, options.format_f, content_decides=True)
        layers = [describe(layer, opener) for layer in (image.chain() if options.backing_chain else (image,))]
    if options.output == "json":
        print_json(layers if options.backing_chain else layers[0], indent=4)
        return 0
    for number, facts in enumerate(layers):
        if number:
            print()
        _print_info(facts)
    return 0


def _print_info(facts: dict[str, Any]) -> None:
    from vmconv.cli.output import size_text

    lines = [
        f"image: {facts['filename']}",
        f"file format: {facts['format']}",
        f"virtual size: {size_text(facts['virtual-size'])} ({facts['virtual-size']} bytes)",
        f"disk size: {size_text(facts['actual-size'])}",
    ]
    lines += [f"{title}: {facts[key]}" for key, title in _INFO_TITLES.items() if facts.get(key)]
    if facts.get("snapshots"):
        lines += ["snapshot list:", *_snapshot_lines(facts["snapshots"])]
    data = facts.get("format-specific", {}).get("data", {})
    if data:
        lines += ["format specific information:", *_fact_lines(data, 1)]
    for reference in facts.get("references", ()):
        lines.append(f"refers to: {reference['filename']} ({reference['role']})")
    lines += [f"not carried over: {loss}" for loss in facts["losses"]]
    lines += [f"warning: {warning}" for warning in facts["warnings"]]
    for line in lines:
        print(printable(line))


def _snapshot_lines(snapshots: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yields the snapshots as qemu-img lists them."""
    from vmconv.cli.output import size_text, table_lines

    rows = [["ID", "TAG", "VM SIZE", "DATE", "VM CLOCK"]]
    for one in snapshots[:_LISTED]:
        seconds = one["vm-clock-sec"]
        clock = f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}.{one['vm-clock-nsec'] // 10**6:03}"
        date = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one["date-sec"]))
        rows.append([one["id"], one["name"], size_text(one["vm-state-size"]), date, clock])
    yield from table_lines([[printable(cell) for cell in row] for row in rows], "    ")
    if len(snapshots) > _LISTED:
        yield f"    ... {len(snapshots)} in all (--output json has them)"


def _fact_lines(facts: Mapping[str, Any] | Sequence[Any], depth: int) -> Iterator[str]:
    """Yields facts as qemu-img prints them: each on a line, what is inside of one below it."""
    indent = "    " * depth
    pairs = facts.items() if isinstance(facts, Mapping) else ((f"[{n}]", fact) for n, fact in enumerate(facts))
    for number, (key, value) in enumerate(pairs):
        if number == _LISTED:
            yield f"{indent}... {len(facts)} in all (--output json has them)"
            return
        # GUIDs are keys too, of Parallels' snapshots.
        title = key.replace("-", " ") if len(key) < _GUID else key
        if isinstance(value, (Mapping, list, tuple)) and value:
            yield f"{indent}{title}:"
            yield from _fact_lines(value, depth + 1)
        elif not isinstance(value, (Mapping, list, tuple)):
            yield f"{indent}{title}: {in_words(value)}"


_GUID = 36
_LISTED = 50
"""Members of a list that are shown to people."""

_INFO_TITLES = {
    "cluster-size": "cluster size",
    "backing-filename": "backing file",
    "backing-filename-format": "backing file format",
}


def _configure_info(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="image to look at")
    add_format(parser, default="by its content")
    parser.add_argument("--backing-chain", action="store_true", help="describe every layer of the chain")
    add_output(parser)
    add_access(parser)


def _run_map(options: argparse.Namespace) -> int:
    from vmconv.cli.output import print_table
    from vmconv.mapping import map_rows

    with _opener(options) as opener:
        rows = map_rows(opener.image(options.file, options.format_f))
        if options.output == "json":
            _print_map(rows)
            return 0
        table = [["Offset", "Length", "Mapped to", "File"]]
        for row in rows:
            if row.data and not row.zero:
                place = "-" if row.offset is None else f"{row.offset:#x}"
                table.append([f"{row.start:#x}", f"{row.length:#x}", place, row.file or "-"])
        print_table(table)
    return 0


def _print_map(rows: Any) -> None:
    """Prints the rows as qemu-img does, so that the two can be compared line by line."""
    import json

    before = "["
    for row in rows:
        print(before, end="")
        before = ",\n"
        print(json.dumps(row.as_json()).replace("{", "{ ", 1)[:-1] + "}", end="")
    print("]" if before != "[" else "[]")


def _configure_map(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="image to map")
    add_format(parser)
    add_output(parser)
    add_access(parser)


def _configure_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="image to check")
    add_format(parser)
    add_output(parser)
    add_access(parser)
    # 2 and 3 say what was found, so a check that could not be done has a code of its own.
    parser.set_defaults(error_code=_CHECK_NOT_DONE)


def _run_check(options: argparse.Namespace) -> int:
    from vmconv.checking import check_image
    from vmconv.cli.output import print_json

    with _opener(options) as opener:
        image = opener.image(options.file, options.format_f)
        report = check_image(image, opener)
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


COMMANDS = (
    Command(
        "info",
        "describe an image",
        "Describes an image: format, sizes, features, parent, identity and health. Reads the header only.",
        _configure_info,
        _run_info,
        "The format is taken from the content when -f is not given, as qemu-img info does: nothing depends on it\n"
        "here. All other commands want name and content to agree, or -f.",
    ),
    Command(
        "map",
        "show where each range of the guest's disk lies",
        "Shows, for each range of the guest's address space, what it is and where it lies in which file.\n"
        "--output json prints what qemu-img map --output=json prints.",
        _configure_map,
        _run_map,
    ),
    Command(
        "check",
        "check the structure of an image",
        "Checks the structure of an image: references out of range, overlaps, leaks and wrong reference counts; and\n"
        "whether the files it refers to are there and unchanged since. Changes nothing.",
        _configure_check,
        _run_check,
        "exit status (as qemu-img check):\n"
        "  0   no errors\n"
        "  1   the check could not be done\n"
        "  2   the image is corrupt, or a file that it refers to is not what it was\n"
        "  3   clusters are leaked, nothing is corrupt\n"
        "  63  the format has no structure to check",
    ),
)
