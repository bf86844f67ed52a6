"""`vmconv info`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vmconv.cli.options import (
    add_access,
    add_format,
    add_from_snapshot,
    add_output,
    add_parent,
    add_secret,
    in_snapshot,
    reading,
)
from vmconv.cli.verbs import Verb
from vmconv.errors import in_words, printable

if TYPE_CHECKING:
    from vmconv.model.image import Image


def _run(options: argparse.Namespace) -> int:
    from vmconv.cli.output import print_json
    from vmconv.inspect.description import describe
    from vmconv.inspect.images import described, opened

    asked = reading(options)._replace(path=in_snapshot(options, options.file))
    with opened(asked, content_decides=True) as (image, opener):
        layers = [described(image, opener)]
        if options.backing_chain:
            layers += [describe(layer, opener) for layer in list(image.chain())[1:]]
        if options.output == "json":
            print_json(layers if options.backing_chain else layers[0], indent=4)
            return 0
        for number, facts in enumerate(layers):
            if number:
                print()
            _print_info(facts)
        if image.parent_reference is not None:
            _print_chain(image)
        if child := layers[0].get("child"):
            print(printable(f"has a child: {child} refers to it; a change of this image would damage that one"))
    return 0


def _print_chain(image: Image) -> None:
    from vmconv.cli.tree import chain_lines

    print("chain:")
    for line in chain_lines(image):
        print(f"    {line}")


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
    """Yields the lines of qemu-img's list of snapshots."""
    from vmconv.cli.output import size_text, table_lines

    rows = [["ID", "TAG", "VM SIZE", "DATE", "VM CLOCK"]]
    for one in snapshots[:_LISTED]:
        seconds = one["vm-clock-sec"]
        clock = f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}.{one['vm-clock-nsec'] // 10**6:03}"
        date = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one["date-sec"]))
        rows.append([one["id"], one["name"], size_text(one["vm-state-size"]), date, clock])
    yield from table_lines(rows, "    ")
    if len(snapshots) > _LISTED:
        yield f"    ... {len(snapshots)} in all (--output json has them)"


def _fact_lines(facts: Mapping[str, Any] | Sequence[Any], depth: int) -> Iterator[str]:
    """Yields facts as qemu-img prints them: one per line, nested ones indented."""
    indent = "    " * depth
    pairs = facts.items() if isinstance(facts, Mapping) else ((f"[{n}]", fact) for n, fact in enumerate(facts))
    for number, (key, value) in enumerate(pairs):
        if number == _LISTED:
            yield f"{indent}... {len(facts)} in all (--output json has them)"
            return
        # Keys of Parallels' snapshots are GUIDs, whose dashes must stay.
        title = key.replace("-", " ") if len(key) < _GUID else key
        if isinstance(value, (Mapping, list, tuple)) and value:
            yield f"{indent}{title}:"
            yield from _fact_lines(value, depth + 1)
        elif not isinstance(value, (Mapping, list, tuple)):
            yield f"{indent}{title}: {in_words(value)}"


_GUID = 36
_LISTED = 50
"""Members of a list in human output."""

_INFO_TITLES = {
    "cluster-size": "cluster size",
    "backing-filename": "backing file",
    "backing-filename-format": "backing file format",
}


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="image to look at")
    add_format(parser, default="by its content")
    parser.add_argument("--backing-chain", action="store_true", help="describe every layer of the chain")
    add_output(parser)
    add_from_snapshot(parser, "FILE")
    add_access(parser)
    add_secret(parser)
    add_parent(parser)


VERB = Verb(
    "Describes an image: format, sizes, features, parents, identity and health. Reads headers only.",
    _configure,
    _run,
    "The format is taken from the content when -f is not given, as qemu-img info does: this command\n"
    "only describes. All other commands need a name and content that agree, or -f.",
)
