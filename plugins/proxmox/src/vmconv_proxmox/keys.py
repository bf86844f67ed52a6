"""The language of qemu-server's configurations: lines, property strings, and text in them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote, unquote

from vmconv.machine import config_text, quoted, refused
from vmconv.plugin import MAX_SIZE

if TYPE_CHECKING:
    from vmconv.plugin import File

_SECTION = re.compile(r"\[([^]]*)\]\s*")
_SETTING = re.compile(r"([a-z][a-z_-]*\d*):\s*(.*?)\s*", re.DOTALL)
_SNAPSHOT = re.compile(r"[A-Za-z][A-Za-z0-9_-]+")
_SIZE = re.compile(r"(\d{1,20}(?:\.\d{1,20})?)(?:([KMGT])(?:iB)?)?")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
# PVE::ParseUtils::encode_text: control characters, bytes above 0x7e, the colon and the percent sign are escaped.
_PLAIN = "".join(chr(code) for code in range(0x20, 0x7F) if chr(code) not in "%:")
_SERIAL = "-_.!~*'()"

DEFAULTS = {
    "ide": "file",
    "sata": "file",
    "scsi": "file",
    "virtio": "file",
    "efidisk": "file",
    "tpmstate": "file",
    "net": "model",
    "vga": "type",
    "machine": "type",
    "memory": "current",
    "cpu": "cputype",
    "watchdog": "model",
    "rng": "source",
    "boot": "legacy",
}
"""The property whose name may be left out, by the key without its number."""


class Conf(NamedTuple):
    """The current state in a configuration; pending changes are not in effect yet."""

    settings: dict[str, str]
    description: str | None
    snapshots: tuple[str, ...]


def parse(file: File, data: bytes | None = None) -> Conf:
    """Returns the settings of a configuration, as `PVE::QemuServer::parse_vm_config` takes them.

    `data` are its bytes, by default the whole file. Raises `ImageError` for an invalid line.
    """
    settings: dict[str, str] = {}
    notes, snapshots = [], []
    current = True
    for number, line in enumerate(config_text(file, data).replace("\r\n", "\n").split("\n"), start=1):
        if section := _SECTION.fullmatch(line):
            current = False
            snapshots += [section[1]] if _SNAPSHOT.fullmatch(section[1]) and section[1].lower() != "pending" else []
        elif not current or not line.strip():
            continue
        elif line.startswith("#"):
            notes.append(decoded(line[1:]))
        elif setting := _SETTING.fullmatch(line):
            # The last line of a key counts, as in Proxmox.
            settings[setting[1]] = setting[2]
        else:
            raise refused(file, f"line {number}", f'{quoted(line)} is not "key: value"')
    notes += [decoded(settings.pop("description"))] if "description" in settings else []
    return Conf(settings, "\n".join(notes).rstrip() or None, tuple(snapshots))


def properties(file: File, key: str, value: str) -> dict[str, str]:
    """Returns a property string as a dict: `PVE::JSONSchema::parse_property_string`.

    Raises `ImageError` for a property without name or value, and for one that is given twice.
    """
    found: dict[str, str] = {}
    for each in value.split(","):
        if not each.strip():
            continue
        name, equals, text = each.partition("=")
        if not equals:
            name, text = DEFAULTS.get(key.rstrip("0123456789"), ""), each
        if not name or not text:
            raise refused(file, key, f"{quoted(each)} is not property=value")
        if name in found:
            raise refused(file, key, f"property {quoted(name)} is given twice")
        found[name] = text
    return found


def joined(key: str, values: Mapping[str, str]) -> str:
    """Returns a property string, with the default property first."""
    default = DEFAULTS.get(key.rstrip("0123456789"), "")
    first = [values[default]] if default in values else []
    return ",".join([*first, *(f"{name}={text}" for name, text in values.items() if name != default)])


def boolean(file: File, element: str, text: str) -> bool:
    """Returns a truth value as Proxmox writes it; raises `ImageError` for any other text."""
    if re.fullmatch("1|on|yes|true", text, re.IGNORECASE):
        return True
    if re.fullmatch("0|off|no|false", text, re.IGNORECASE):
        return False
    raise refused(file, element, f"{quoted(text)} is neither 1 nor 0")


def size(file: File, element: str, text: str) -> int:
    """Returns a number of bytes from `8G` or `4.5M`; raises `ImageError`."""
    match = _SIZE.fullmatch(text)
    count = int(float(match[1]) * _UNITS[match[2] or ""]) if match and "." in match[1] else None
    if match and count is None:
        count = int(match[1]) * _UNITS[match[2] or ""]
    if count is None or count > MAX_SIZE:
        raise refused(file, element, f"{quoted(text)} is not a size such as 32G")
    return count


def size_text(count: int) -> str:
    """Returns a number of bytes in the largest unit that divides it."""
    unit = max((name for name in _UNITS if count % _UNITS[name] == 0), key=_UNITS.__getitem__) if count else ""
    return f"{count // _UNITS[unit]}{unit}"


def encoded(line: str) -> str:
    """Returns a line of the description as `PVE::Tools::encode_text` does."""
    return quote(line, safe=_PLAIN)


def decoded(text: str) -> str:
    return unquote(text, errors="replace")


def encoded_serial(text: str) -> str:
    """Returns a serial number in the characters of the format `urlencoded`."""
    return quote(text, safe=_SERIAL)
