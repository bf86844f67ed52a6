"""`vmconv formats`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from vmconv.cli.options import add_output
from vmconv.cli.verbs import Verb

if TYPE_CHECKING:
    from vmconv.interface.format import Format, FormatKind
    from vmconv.io.registry import Registry


def _run(options: argparse.Namespace) -> int:
    from vmconv.io.known import KNOWN
    from vmconv.io.registry import installed

    registry = installed()
    registry.examine()
    versions = {plugin.distribution: plugin.version for plugin in registry.plugins}
    formats = []
    asked = KINDS if options.kind == "all" else (options.kind,)
    chosen = {name: one for kind in asked for name, one in sorted(registry.formats_of(kind).items())}
    for name, one in chosen.items():
        distribution = registry.owners["format", name]
        formats.append(
            {
                "name": name,
                "title": one.title,
                "kind": one.kind,
                "reads": one.can_read,
                "writes": one.can_write,
                "suffixes": list(one.suffixes),
                "distribution": distribution,
                "version": versions[distribution],
                "options": _options(registry, one),
            }
        )
    missing = [
        {"name": known.name, "title": known.title, "distribution": known.distribution}
        for known in KNOWN
        if known.kind in asked and known.distribution and known.name not in registry.all_formats
    ]
    problems = [{"distribution": p.distribution, "reason": p.reason} for p in registry.problems]
    report: dict[str, Any] = {"formats": formats, "installable": missing, "problems": problems}
    if options.output == "json":
        from vmconv.cli.output import print_json

        print_json(report, indent=4)
    else:
        _print_formats(report)
    return 0


def _options(registry: Registry, one: Format) -> list[dict[str, Any]]:
    from vmconv.model.options import describe

    try:
        return [option._asdict() for option in describe(one.options())]
    except Exception as exc:
        registry.add_problem(registry.owners["format", one.name], f"options of {one.name!r}", exc)
        return []


def _print_formats(report: dict[str, Any]) -> None:
    from vmconv.cli.output import print_table

    rows = [["FORMAT", "KIND", "READS", "WRITES", "SUFFIXES", "DISTRIBUTION", "TITLE"]]
    for one in report["formats"]:
        reads, writes = ("yes" if one[key] else "no" for key in ("reads", "writes"))
        distribution = f"{one['distribution']} {one['version']}"
        rows.append([one["name"], one["kind"], reads, writes, " ".join(one["suffixes"]), distribution, one["title"]])
    print_table(rows)
    print_options(report["formats"])
    print_rest(report)


def print_options(formats: list[dict[str, Any]]) -> None:
    """Prints the options of each format that has any."""
    from vmconv.cli.output import print_table

    for one in formats:
        if one["options"]:
            print(f"\nOptions of {one['name']} (-o NAME=VALUE):")
            print_table([[f"{o['name']}={_value(o['default'])}", o["help"]] for o in one["options"]], "  ")


def print_rest(report: dict[str, Any]) -> None:
    """Prints the formats that could be installed, and the problems of plugins."""
    from vmconv.cli.output import print_table

    if report["installable"]:
        print("\nNot installed:")
        rows = [[m["name"], f"pip install {m['distribution']}", m.get("title", "")] for m in report["installable"]]
        print_table(rows, "  ")
    if report["problems"]:
        print("\nProblems:")
        print_table([[p["distribution"], p["reason"]] for p in report["problems"]], "  ")


def _value(default: object) -> str:
    return {True: "on", False: "off"}.get(default, str(default)) if isinstance(default, bool) else str(default)


KINDS: tuple[FormatKind, ...] = ("disk", "memory")


def _configure(parser: argparse.ArgumentParser) -> None:
    add_output(parser)
    parser.add_argument(
        "--kind", choices=("disk", "memory", "all"), default="all", help="formats of disks, of memory, or all (default)"
    )


VERB = Verb(
    "Lists each installed format: whether it is read and written, its writer's options and its distribution.\n"
    "Then the formats that a pip install would add, and broken plugins.",
    _configure,
    _run,
)
