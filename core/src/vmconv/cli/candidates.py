"""What may stand at the end of a command line, from the parsers and the installed formats."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Iterable
from contextlib import suppress

from vmconv.cli.options import SetOptions
from vmconv.interface.format import Format
from vmconv.interface.machines import MachineFormat
from vmconv.io.registry import installed, installed_machines


def split(line: str) -> list[str]:
    """Returns the words of a command line behind `vmconv`; the last is the one that is being written, maybe empty."""
    # A quote may be open.
    for end in ("", "'", '"'):
        try:
            # The mark is the end of the word that is being written, which may be empty.
            words = shlex.split(f"{line}\0{end}")
        except ValueError:
            continue
        break
    else:
        return []
    words[-1] = words[-1].replace("\0", "")
    names = [os.path.basename(word) for word in words[:-1]]
    return words[names.index("vmconv") + 1 :] if "vmconv" in names else []


def candidates(words: list[str]) -> list[str]:
    """Returns the words that the last of `words` may become, sorted; none where a file name or any text may stand."""
    if not words:
        return []
    *before, current = words
    if before[:1] == ["--debug"]:
        before.pop(0)
    if not before:
        return _beginning(current, [*installed().commands, "--debug", "--help", "--version"])
    if before[0] not in installed().commands:
        return []
    return _Line(before).candidates(current)


def _beginning(current: str, words: Iterable[str], done: str = "") -> list[str]:
    return sorted(f"{done}{word}" for word in set(words) if word.startswith(current))


class _Line:
    """A command line before its last word: the parser of its verb, the option that wants a value, and the values."""

    def __init__(self, words: list[str]) -> None:
        from vmconv.cli.parser import make_parser

        self._words = words
        self._parser = make_parser(words[0])
        self._wanting: argparse.Action | None = None
        self._given: dict[str, str] = {}
        self._names: list[str] = []
        for word in words:
            self._take(word)

    def _take(self, word: str) -> None:
        if self._wanting is not None:
            self._given[self._wanting.dest] = word
            self._wanting = None
        elif word.startswith("-"):
            name, equals, value = word.partition("=")
            action = self._parser._option_string_actions.get(name)
            if action is not None and action.nargs != 0 and not equals:
                self._wanting = action
            elif action is not None:
                self._given[action.dest] = value
        elif (verbs := self._verbs()) is not None:
            self._parser = verbs.get(word, self._parser)
        else:
            self._names.append(word)

    def _verbs(self) -> dict[str, argparse.ArgumentParser] | None:
        found = [action for action in self._parser._actions if isinstance(action, argparse._SubParsersAction)]
        return dict(found[0].choices) if found else None

    def candidates(self, current: str) -> list[str]:
        if self._wanting is not None:
            return self._values(self._wanting, current)
        name, equals, value = current.partition("=")
        action = self._parser._option_string_actions.get(name)
        if equals and action is not None:
            return [f"{name}={word}" for word in self._values(action, value)]
        if current.startswith("-"):
            return _beginning(current, self._parser._option_string_actions)
        verbs = self._verbs()
        if verbs is not None:
            return _beginning(current, verbs)
        positional = [action for action in self._parser._actions if not action.option_strings]
        return self._values(positional[min(len(self._names), len(positional) - 1)], current) if positional else []

    def _values(self, action: argparse.Action, current: str) -> list[str]:
        """Returns what the value of an argument may become."""
        if action.choices is not None:
            return _beginning(current, map(str, action.choices))
        if isinstance(action, SetOptions):
            return self._options(action, current)
        if action.metavar == "FMT":
            return _beginning(current, self._formats(action.dest))
        if action.metavar == "FMT,FMT":
            done, comma, last = current.rpartition(",")
            return _beginning(last, self._formats("format_O"), done + comma)
        if action.option_strings == ["--backend"]:
            return _beginning(current, ["auto", *installed().backends])
        return []

    def _formats(self, dest: str) -> list[str]:
        """Returns the names of the formats that an argument may name; those of targets can be written."""
        if self._words[0] == "machine" or dest == "machine_format":
            return list(installed_machines().machines)
        writes = dest in ("format_O", "format", "target_format") or self._words[0] == "create"
        return [name for name, one in installed().all_formats.items() if one.can_write or not writes]

    def _options(self, action: argparse.Action, current: str) -> list[str]:
        """Returns what `-o` may become: names, or the values of a name."""
        done, comma, last = current.rpartition(",")
        name, equals, value = last.partition("=")
        known = self._known(named=str(action.metavar).startswith("FMT."))
        if not equals:
            taken = {part.partition("=")[0] for part in done.split(",")}
            return _beginning(last, [f"{name}=" for name in known.keys() - taken], done + comma)
        return _beginning(value, known.get(name, ()), f"{done}{comma}{name}=")

    def _known(self, *, named: bool) -> dict[str, set[str]]:
        """Returns the values of each option of the target's format; `named` if the format is part of the name."""
        from vmconv.model.options import choices

        known: dict[str, set[str]] = {}
        for one in self._targets():
            # A broken plugin must not hide the others.
            with suppress(Exception, SystemExit):
                for name, values in choices(one.options()).items():
                    known.setdefault(f"{one.name}.{name}" if named else name, set()).update(values)
        return known

    def _targets(self) -> list[Format] | list[MachineFormat]:
        """Returns the format of the target as far as the words name it; else all that can be written."""
        if self._words[0] == "machine":
            machines = installed_machines().machines
            return [machines[name] for name in (self._given.get("format_O", ""),) if name in machines]
        formats = installed().all_formats
        options = ("format_O", "target_format", *(["format_f"] if self._words[0] in ("create", "resize") else []))
        named = [self._given[dest] for dest in options if self._given.get(dest)]
        by_name = [found for name in reversed(self._names) if (found := installed().format_by_suffix(name))]
        for name in (*named, *(by_name[:1] if len(self._names) > 1 or self._words[0] == "create" else [])):
            if name in formats:
                return [formats[name]]
        return [one for one in formats.values() if one.can_write]
