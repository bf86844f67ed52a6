"""`vmconv machine info`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from vmconv.cli.options import add_from_snapshot, add_output, in_snapshot
from vmconv.cli.verbs import Verb

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmconv.machine.model import Machine


def _run(options: argparse.Namespace) -> int:
    from vmconv.cli.output import print_json
    from vmconv.errors import printable
    from vmconv.machine.secrets import without_secrets
    from vmconv.machine.source import opened

    with opened(in_snapshot(options, options.source), options.format_f) as source:
        # What is printed is often shown to others.
        machine, secrets = without_secrets(source.machine)
        names = [f"{each.path} {each.value}" for each in secrets]
        if options.output == "json":
            print_json(
                {"format": source.format.name, **as_json(machine), **({"secrets": names} if names else {})}, indent=4
            )
            return 0
        print(printable(f"machine: {machine.name or 'without a name'} ({source.format.title})"))
        for line in (*lines(machine), *(f"not shown: {name}" for name in names)):
            print(f"  {printable(line)}")
    return 0


def as_json(machine: Machine) -> dict[str, Any]:
    """Returns what the machine states, in JSON's types."""
    found: dict[str, Any] = machine.model_dump(mode="json", exclude_none=True)
    return found


def lines(machine: Machine) -> Iterator[str]:
    """Yields one line for each part of the machine, and one for each device."""
    from vmconv.machine.paths import stated

    parts: dict[str, list[str]] = {}
    for path, value in stated(machine):
        part, _, field = path.rpartition(".")
        if part in ("", "extra"):
            parts[path] = [_words(value, path)]
        else:
            parts.setdefault(part, []).append(f"{field} {_words(value, field)}")
    parts.pop("name", None)
    for title, words in parts.items():
        yield f"{title}: {', '.join(words)}"


_BYTES = ("capacity", "file_size", "size", "max", "memory")


def _words(value: Any, field: str) -> str:
    from vmconv.cli.output import size_text
    from vmconv.machine.losses import words

    if field in _BYTES and isinstance(value, int):
        return size_text(value)
    return words(value).replace("\n", " / ")


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="CONFIG", help="configuration of the machine")
    parser.add_argument("-f", dest="format_f", metavar="FMT", help="format of CONFIG (default: by its content)")
    add_from_snapshot(parser, "CONFIG")
    add_output(parser)


VERB = Verb(
    "Describes a machine: processors, memory, firmware, identity, devices, and the files that it refers to. Reads\n"
    "the configuration only.",
    _configure,
    _run,
    """examples:
  vmconv machine info web.vmx
  vmconv machine info --output json appliance.ova""",
)
