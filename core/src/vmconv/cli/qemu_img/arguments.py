"""The arguments of qemu-img's verbs, as getopt reads them, and values in them that have qemu-img's own notation."""

from __future__ import annotations

import getopt
import os
import re
import stat
from collections.abc import Sequence
from typing import NamedTuple

from vmconv.cli.qemu_img.handing import NotAnsweredError


class Grammar(NamedTuple):
    """Options that the front end understands: short and long, in getopt's notation, and long names for short ones."""

    short: str
    long: tuple[str, ...] = ()
    same: tuple[tuple[str, str], ...] = (("--force-share", "-U"),)


GRAMMARS = {
    "bitmap": Grammar(
        "f:g:",
        ("add", "remove", "clear", "enable", "disable", "merge=", "granularity="),
        (("--granularity", "-g"),),
    ),
    "check": Grammar("qf:U", ("format=", "output=", "force-share"), (("--format", "-f"), ("--force-share", "-U"))),
    "commit": Grammar("f:t:b:dpq"),
    "compare": Grammar("f:F:T:pqU", ("force-share",)),
    "convert": Grammar(
        "f:O:B:CcF:o:l:pt:T:qnm:WUr:", ("force-share", "target-is-zero", "bitmaps", "skip-broken-bitmaps")
    ),
    "create": Grammar("F:b:f:o:q"),
    "info": Grammar(
        "f:U", ("format=", "output=", "backing-chain", "force-share"), (("--format", "-f"), ("--force-share", "-U"))
    ),
    "map": Grammar(
        "f:s:l:U",
        ("format=", "output=", "start-offset=", "max-length=", "force-share"),
        (("--format", "-f"), ("--start-offset", "-s"), ("--max-length", "-l"), ("--force-share", "-U")),
    ),
    "measure": Grammar("f:O:o:l:U", ("output=", "size=", "force-share")),
    "rebase": Grammar("f:F:b:upt:T:qU", ("force-share",)),
    "resize": Grammar("f:q", ("shrink", "preallocation=")),
    "snapshot": Grammar("la:c:d:qU", ("force-share",)),
}
"""The verbs of the front end. Other options of these verbs, such as --object and --image-opts, are handed over."""

FORMATS = {
    "parallels": "parallels",
    "qcow2": "qcow2",
    "qed": "qed",
    "raw": "raw",
    "vdi": "vdi",
    "vhdx": "vhdx",
    "vmdk": "vmdk",
    "vpc": "vhd",
}
"""QEMU's names of formats, and vmconv's."""

QEMU_NAMES = {ours: name for name, ours in FORMATS.items()}

SECTOR = 512

_CACHE_MODES = ("none", "writeback", "unsafe", "directsync", "writethrough")
_SUFFIXES = "BKMGTPE"
_MAX_SIZE = 2**63 - 512


class Given:
    """The arguments of one command: `options` in their order, `names` without a dash."""

    def __init__(self, verb: str, arguments: Sequence[str]) -> None:
        grammar = GRAMMARS[verb]
        self.arguments = list(arguments)
        for argument in self.arguments:
            # getopt takes beginnings of names, and knows only ours: another of QEMU's may begin alike.
            if argument[:2] == "--" and argument[2:] and not _is_exact(argument[2:], grammar.long):
                raise NotAnsweredError(f"{argument} is not an option of vmconv's front end")
        # Its last argument may begin with a minus.
        last = [self.arguments.pop()] if verb == "resize" and self.arguments else []
        try:
            options, self.names = getopt.gnu_getopt(self.arguments, grammar.short, grammar.long)
        except getopt.GetoptError as exc:
            raise NotAnsweredError(str(exc)) from exc
        self.names += last
        same = dict(grammar.same)
        self.options = [(same.get(option, option), value) for option, value in options]

    def has(self, option: str) -> bool:
        return any(name == option for name, _ in self.options)

    def last(self, option: str) -> str | None:
        """Returns the value that counts: the last one."""
        return next((value for name, value in reversed(self.options) if name == option), None)

    def format(self, option: str) -> str | None:
        """Returns vmconv's name of the format that an option names."""
        name = self.last(option)
        if name is not None and name not in FORMATS:
            raise NotAnsweredError(f"format {name!r} is not one of {', '.join(FORMATS)}")
        return None if name is None else FORMATS[name]

    def is_json(self) -> bool:
        """Returns whether the answer is JSON."""
        output = self.last("--output")
        if output not in (None, "human", "json"):
            raise NotAnsweredError(f"output {output!r}")
        return output == "json"

    def cache(self, option: str, default: str) -> str:
        mode = self.last(option) or default
        if mode not in _CACHE_MODES:
            raise NotAnsweredError(f"cache mode {mode!r}")
        return mode

    def writer_options(self) -> dict[str, str]:
        """Returns the names and values of all -o, the last of each name."""
        found: dict[str, str] = {}
        for name, value in self.options:
            if name != "-o":
                continue
            # Two commas are one in a value.
            if ",," in value or not value:
                raise NotAnsweredError(f"-o {value}")
            for each in value.split(","):
                key, equals, text = each.partition("=")
                if not equals or not key:
                    raise NotAnsweredError(f"-o {value}")
                found[key] = text
        return found

    def one_file(self) -> str:
        """Returns the only name, that of a file that exists."""
        if len(self.names) != 1:
            raise NotAnsweredError(f"{len(self.names)} names")
        return plain_file(self.names[0])


def _is_exact(word: str, known: Sequence[str]) -> bool:
    return any(word == name or (name[-1] == "=" and word.partition("=")[0] == name[:-1]) for name in known)


def plain_file(name: str) -> str:
    """Returns the name of an existing regular file or block device; others are protocols, or errors."""
    plain_name(name)
    try:
        mode = os.stat(name).st_mode
    except (OSError, ValueError) as exc:
        raise NotAnsweredError(f"{name}: {exc}") from exc
    if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
        raise NotAnsweredError(f"{name}: not a regular file or block device")
    return name


def plain_name(name: str) -> str:
    """Returns a name that QEMU takes for that of a file, and not for a protocol, an option or JSON."""
    if not name or ":" in name.partition("/")[0] or "\n" in name:
        raise NotAnsweredError(f"{name!r} is not the name of a file")
    return name


def size_of(text: str) -> int:
    """Returns bytes for a whole number with qemu-img's suffix."""
    found = re.fullmatch(r"([0-9]{1,19})([bkmgtpeBKMGTPE]?)", text)
    if not found:
        raise NotAnsweredError(f"size {text!r}")
    size = int(found[1]) << 10 * _SUFFIXES.index(found[2].upper() or "B")
    if size > _MAX_SIZE:
        raise NotAnsweredError(f"size {text!r}")
    return size
