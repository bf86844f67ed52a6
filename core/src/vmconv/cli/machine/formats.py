"""`vmconv machine formats`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from vmconv.cli.options import add_output
from vmconv.cli.verbs import Verb

if TYPE_CHECKING:
    from vmconv.interface.machines import MachineFormat
    from vmconv.io.registry import Registry


def _run(options: argparse.Namespace) -> int:
    from vmconv.cli.output import print_json
    from vmconv.io.known_machines import DISTRIBUTIONS
    from vmconv.io.registry import installed_machines

    registry = installed_machines()
    versions = {plugin.distribution: plugin.version for plugin in registry.plugins}
    formats = [_described(registry, one, versions) for _, one in sorted(registry.machines.items())]
    report: dict[str, Any] = {
        "formats": formats,
        "installable": [
            {"name": name, "distribution": distribution}
            for name, distribution in DISTRIBUTIONS.items()
            if name not in registry.machines
        ],
        "problems": [{"distribution": p.distribution, "reason": p.reason} for p in registry.problems],
    }
    if options.output == "json":
        print_json(report, indent=4)
    else:
        _print(report)
    return 0


def _described(registry: Registry, one: MachineFormat, versions: dict[str, str]) -> dict[str, Any]:
    from vmconv.model.options import describe

    distribution = registry.owners["machine", one.name]
    try:
        described = [option._asdict() for option in describe(one.options())]
    except Exception as exc:
        registry.add_problem(distribution, f"options of {one.name!r}", exc)
        described = []
    return {
        "name": one.name,
        "title": one.title,
        "reads": one.can_read,
        "writes": one.can_write,
        "suffixes": list(one.suffixes),
        "disks": one.disk_format,
        "distribution": distribution,
        "version": versions[distribution],
        "options": described,
    }


def _print(report: dict[str, Any]) -> None:
    from vmconv.cli.formats import print_options, print_rest
    from vmconv.cli.output import print_table

    rows = [["FORMAT", "READS", "WRITES", "SUFFIXES", "DISKS", "DISTRIBUTION", "TITLE"]]
    for one in report["formats"]:
        reads, writes = ("yes" if one[key] else "no" for key in ("reads", "writes"))
        distribution = f"{one['distribution']} {one['version']}"
        suffixes = " ".join(one["suffixes"])
        rows.append([one["name"], reads, writes, suffixes, one["disks"], distribution, one["title"]])
    print_table(rows)
    print_options(report["formats"])
    print_rest(report)


VERB = Verb(
    "Lists each installed machine format: whether it is read and written, the format of its disks, its writer's\n"
    "options and its distribution. Then the formats that a pip install would add, and broken plugins.",
    add_output,
    _run,
)
