"""Writes the pages that follow from the code and from the changelog's fragments.

    python docs/generate.py
    python docs/generate.py --release 0.2.0 --date 2026-12-01

The first writes `commands.md`, `formats.md` and `machines.md` in `docs/reference`, `CHANGELOG.md`, and the manual pages
in the folders `man`. The second turns the unreleased changes into a release, removes their fragments, and gives all
distributions its version. A test compares the pages with what this module renders.
"""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import machine_tables
import manpages
import versions
from vmconv.cli import parser as cli
from vmconv.io.registry import installed
from vmconv.model.options import describe

ROOT = Path(__file__).parents[1]
COMMANDS = ROOT / "docs/reference/commands.md"
QEMU_IMG = ROOT / "docs/qemu-img.md"
FORMATS = ROOT / "docs/reference/formats.md"
MACHINES = ROOT / "docs/reference/machines.md"
CHANGELOG = ROOT / "CHANGELOG.md"
FRAGMENTS = ROOT / "changelog.d"

BEFORE_RELEASES = "2026-11-30"
"""Date of the manual pages until the first release."""

KINDS = ("added", "changed", "fixed", "removed", "security")


# Commands


def own_commands() -> dict[str, argparse.ArgumentParser]:
    """Returns the parsers of the commands that ship with vmconv, by name."""
    owners = installed().owners
    found = _subparsers(cli.make_parser())
    return {name: parser for name, parser in found.items() if owners["command", name].startswith("vmconv")}


def _subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    found = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(found[0].choices) if found else {}


def commands_page() -> str:
    """Returns the reference of all commands."""
    commands = own_commands()
    parts = [
        "# Commands",
        "<!-- Written by docs/generate.py from the parsers. Do not edit. -->",
        "Every command and every option. `vmconv COMMAND --help` prints the same. The [guide](../guide/index.md)\n"
        "explains how to use them, and [exit codes](exit-codes.md) lists what each command returns.",
        "\n".join(f"- [`vmconv {name}`](#vmconv-{name}): {_help(name)}" for name in sorted(commands)),
    ]
    for name in sorted(commands):
        parts += _command(f"vmconv {name}", commands[name], 2)
    return "\n\n".join(parts) + "\n"


def _help(name: str) -> str:
    return installed().commands[name].help


def _command(title: str, parser: argparse.ArgumentParser, level: int) -> Iterator[str]:
    """Yields the blocks of one command, and those of its verbs below it."""
    verbs = _subparsers(parser)
    actions = [action for action in parser._actions if not isinstance(action, argparse._SubParsersAction)]
    actions = [action for action in actions if "--help" not in action.option_strings]
    yield f"{'#' * level} {title}"
    usage = manpages.stated_usage(parser) or " ".join([title, *_synopsis(actions, bool(verbs))])
    yield f"```text\n{usage}\n```"
    if parser.description:
        yield parser.description.strip()
    if actions:
        rows = [f"| {_names(action)} | {_meaning(action, parser)} |" for action in _ordered(actions)]
        yield "\n".join(["| argument | meaning |", "| --- | --- |", *rows])
    for group in parser._mutually_exclusive_groups:
        names = ", ".join(f"`{action.option_strings[-1]}`" for action in group._group_actions if action.option_strings)
        yield f"At most one of {names}."
    yield from _epilog(parser.epilog or "")
    for verb, one in verbs.items():
        yield from _command(f"{title} {verb}", one, level + 1)


def _ordered(actions: list[argparse.Action]) -> list[argparse.Action]:
    """Returns positional arguments before options."""
    return sorted(actions, key=lambda action: bool(action.option_strings))


def _value(action: argparse.Action) -> str:
    """Returns what stands for the value of an argument; empty for a switch."""
    if action.nargs == 0:
        return ""
    if action.metavar:
        return str(action.metavar)
    if action.choices:
        return f"{{{','.join(map(str, action.choices))}}}"
    return action.dest.upper() if action.option_strings else action.dest


def _synopsis(actions: list[argparse.Action], verbs: bool) -> Iterator[str]:
    if any(action.option_strings and not action.required for action in actions):
        yield "[OPTIONS]"
    for action in _ordered([one for one in actions if one.required or not one.option_strings]):
        shown = " ".join(filter(None, [*action.option_strings[-1:], _value(action)]))
        yield f"[{shown}]" if action.nargs in ("?", "*") else shown
    if verbs:
        yield "VERB"


def _names(action: argparse.Action) -> str:
    value = _value(action)
    names = [" ".join(filter(None, [name, value])) for name in action.option_strings] or [value]
    return ", ".join(f"`{name}`" for name in names).replace("|", "\\|")


def _meaning(action: argparse.Action, parser: argparse.ArgumentParser) -> str:
    text = (action.help or "") % {**vars(action), "prog": parser.prog} if action.help else ""
    text = " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
    return f"{text} (required)" if action.option_strings and action.required else text


def _epilog(text: str) -> Iterator[str]:
    """Yields what is below the arguments; exit codes are left out, because they have a page."""
    for part in re.split(r"\n\s*\n", text.strip()):
        first, _, rest = part.partition("\n")
        if not part or first.startswith("exit status"):
            continue
        if first in ("example:", "examples:"):
            yield f"```sh\n{textwrap.dedent(rest)}\n```"
        else:
            yield f"{part[0].upper()}{part[1:].rstrip('.')}."


def manual() -> dict[Path, dict[str, str]]:
    """Returns the manual pages of each distribution with commands, by folder."""
    released = re.search(r"^## \S+ \((\d{4}-\d\d-\d\d)\)", CHANGELOG.read_text(), re.MULTILINE)
    date = released[1] if released else BEFORE_RELEASES
    texts = manpages.pages(cli.make_parser(), own_commands(), versions.current_version(ROOT), date)
    folders: dict[Path, dict[str, str]] = {}
    for name, text in texts.items():
        owner = installed().owners.get(("command", name.removesuffix(".1").partition("-")[2]), "vmconv")
        home = ROOT / "core" if owner == "vmconv" else ROOT / "plugins" / owner.removeprefix("vmconv-")
        folders.setdefault(home / "man", {})[name] = text
    chapter = QEMU_IMG.read_text().partition("\n## A front end that answers as qemu-img\n")[2].partition("\n## ")[0]
    front = manpages.front_end(chapter, versions.current_version(ROOT), date)
    folders[ROOT / "core/man"]["vmconv-qemu-img.1"] = front
    return folders


# Formats


def shipped_formats() -> list[str]:
    """Returns the names of the formats of this repository."""
    owners = installed().owners
    distributions = {f"vmconv-{path.name}" for path in (ROOT / "plugins").iterdir() if path.is_dir()}
    disks, memory = (sorted(table) for table in (installed().formats, installed().memory_formats))
    return [name for name in (*disks, *memory) if owners["format", name] in distributions]


def formats_page() -> str:
    """Returns the reference of all formats and of their writers' options."""
    parts = [
        "# Formats and their options",
        "<!-- Written by docs/generate.py from the formats. Do not edit. -->",
        "`-o NAME=VALUE,NAME=VALUE` sets options of the target format. Names and values are those of\n"
        "`qemu-img create -o` where it has them. Sizes may have a suffix K, M, G, T, P or E, in units of 1024.\n"
        "`vmconv formats` lists the same. [Formats](../guide/formats.md) has notes on each format.",
        "## Metadata that a format keeps",
        "An image may state more of a disk than its bytes. A conversion carries this over if the target can state it\n"
        'too, and reports the rest as "not carried over".',
        "\n".join(["| format | states, besides the size |", "| --- | --- |", *map(_carries, shipped_formats())]),
    ]
    for name in shipped_formats():
        parts += _format(name)
    return "\n\n".join(parts) + "\n"


def _carries(name: str) -> str:
    one = installed().format(name)
    fields = sorted([field.replace("_", " ") for field in one.carries] + [*one.carries_state])
    return f"| {name} | {', '.join(fields) or 'nothing'} |"


def _format(name: str) -> Iterator[str]:
    one = installed().format(name)
    yield f"## {name}"
    suffixes = ", ".join(f"`{suffix}`" for suffix in one.suffixes)
    backing = "Can have a parent." if one.supports_backing else "Cannot have a parent."
    if one.kind == "memory":
        backing = "A memory image." if one.can_write else "A memory image, only read."
    yield f"{one.title[0].upper()}{one.title[1:]}. Suffixes: {suffixes}. {backing}"
    rows = [f"| `{o.name}` | `{_default(o.default)}` | {_cell(o.help)} |" for o in describe(one.options())]
    yield "\n".join(["| option | default | meaning |", "| --- | --- | --- |", *rows]) if rows else "No options."


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _default(value: Any) -> str:
    if value is None:
        return "none"
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


# Machine formats


def machines_page() -> str:
    """Returns the reference of the machine formats of this repository."""
    distributions = {f"vmconv-{path.name}" for path in (ROOT / "plugins").iterdir() if path.is_dir()}
    _refuse_missing(distributions)
    return machine_tables.page(machine_tables.shipped(distributions))


def _refuse_missing(distributions: set[str]) -> None:
    """Ends the run if a plugin of this repository is not installed, because its part of the page would be lost."""
    missing = sorted(name for name in distributions if not _is_installed(name))
    if missing:
        raise SystemExit(f"not installed: {', '.join(missing)}")


def _is_installed(distribution: str) -> bool:
    try:
        return bool(version(distribution))
    except PackageNotFoundError:
        return False


# The changelog


def fragments() -> dict[str, list[Path]]:
    """Returns the fragments of each kind, in the order of their issues."""
    found: dict[str, list[Path]] = {kind: [] for kind in KINDS}
    for path in FRAGMENTS.glob("*.*.md"):
        found[path.name.split(".")[1]].append(path)
    return {kind: sorted(paths, key=lambda path: int(path.name.split(".")[0])) for kind, paths in found.items()}


def _changes() -> Iterator[str]:
    for kind, paths in fragments().items():
        if paths:
            yield f"### {kind.capitalize()}"
            yield "\n".join(map(_entry, paths))


def _entry(path: Path) -> str:
    text = path.read_text().strip().replace("](../", "](")
    return text if text.startswith("- ") else f"- {textwrap.indent(text, '  ').strip()}"


def changelog(current: str, release: str | None = None) -> str:
    """Returns the changelog with the fragments' changes on top; `release` is the heading they get."""
    released = re.search(r"^## (?!Unreleased).*", current, re.MULTILINE | re.DOTALL)
    parts = [
        "# Changelog",
        "<!-- Unreleased changes are written by docs/generate.py from changelog.d. Do not edit them here. -->",
        f"## {release or 'Unreleased'}",
        *_changes(),
    ]
    if released:
        parts.append(released[0].strip())
    return "\n\n".join(parts) + "\n"


def _release(version: str, date: str) -> None:
    versions.set_version(ROOT, version, date)
    CHANGELOG.write_text(changelog(CHANGELOG.read_text(), f"{version} ({date})"))
    for paths in fragments().values():
        for path in paths:
            path.unlink()
    CHANGELOG.write_text(changelog(CHANGELOG.read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes the generated pages.")
    parser.add_argument("--release", metavar="VERSION", help="turn the unreleased changes into this release")
    parser.add_argument("--date", metavar="DATE", help="date of the release, YYYY-MM-DD")
    given = parser.parse_args()
    if given.release:
        if not given.date:
            parser.error("--release needs --date")
        _release(given.release, given.date)
    COMMANDS.write_text(commands_page())
    FORMATS.write_text(formats_page())
    MACHINES.write_text(machines_page())
    CHANGELOG.write_text(changelog(CHANGELOG.read_text() if CHANGELOG.exists() else ""))
    manpages.write(manual())


if __name__ == "__main__":
    main()
