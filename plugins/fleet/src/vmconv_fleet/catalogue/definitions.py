"""Virtual machines as files define them: VMware's `.vmx` and libvirt's domain XML.

These files are as untrusted as images: they are read up to a limit, and names in them are only looked up in the
catalogue, never opened.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from xml.etree import ElementTree
from xml.parsers import expat

MAX_SIZE = 1 << 20
MAX_DISKS = 256
_MAX_TEXT = 255

_VMX_LINE = re.compile(r'\s*([A-Za-z0-9_.:]+)\s*=\s*"([^"]*)"')
_VMX_DISK = re.compile(r"(?:scsi|sata|ide|nvme)\d+:\d+\.filename")
_UNITS = {"b": 1, "bytes": 1, "kb": 1000, "k": 1 << 10, "kib": 1 << 10, "mb": 10**6, "m": 1 << 20, "mib": 1 << 20}
_UNITS |= {"gb": 10**9, "g": 1 << 30, "gib": 1 << 30, "tb": 10**12, "t": 1 << 40, "tib": 1 << 40}


class Definition(NamedTuple):
    """A virtual machine as its file defines it; `disks` are file names as written there."""

    name: str
    system: str
    memory: int | None
    processors: int | None
    disks: tuple[str, ...]


def read(path: str) -> Definition | None:
    """Returns the virtual machine that the file defines; None if it defines none, or is too large."""
    parse = _PARSERS.get(os.path.splitext(path)[1].lower())
    if parse is None:
        return None
    with open(path, "rb") as file:
        content = file.read(MAX_SIZE + 1)
    return parse(content) if len(content) <= MAX_SIZE else None


def _vmx(content: bytes) -> Definition | None:
    text = content.decode("utf-8", "replace")
    values: Mapping[str, str] = {
        match[1].lower(): match[2] for match in map(_VMX_LINE.match, text.splitlines()) if match
    }
    if "displayname" not in values and "guestos" not in values:
        return None
    megabytes = _number(values.get("memsize"))
    disks = [value for key, value in values.items() if _VMX_DISK.fullmatch(key) and value.lower().endswith(".vmdk")]
    return Definition(
        values.get("displayname", "")[:_MAX_TEXT],
        values.get("guestos", "")[:_MAX_TEXT],
        None if megabytes is None else megabytes << 20,
        _number(values.get("numvcpus")) or 1,
        tuple(disks[:MAX_DISKS]),
    )


def _domain(content: bytes) -> Definition | None:
    root = _xml(content)
    if root is None or root.tag != "domain":
        return None
    memory = root.find("memory")
    amount = _number(memory.text) if memory is not None else None
    unit = _UNITS.get(memory.get("unit", "KiB").lower(), 1 << 10) if memory is not None else 1
    sources = [source.get("file") for source in root.iterfind("devices/disk[@device='disk']/source")]
    system = root.find("os/type")
    return Definition(
        (root.findtext("name") or "")[:_MAX_TEXT],
        " ".join(filter(None, [system.get("arch"), system.text]))[:_MAX_TEXT] if system is not None else "",
        None if amount is None else amount * unit,
        _number(root.findtext("vcpu")),
        tuple([name for name in sources if name][:MAX_DISKS]),
    )


class _EntitiesError(Exception):
    """The file declares entities: no definition of a machine needs them, and expanding them has no bound."""


def _xml(content: bytes) -> ElementTree.Element | None:
    def refuse(*_declaration: object) -> None:
        raise _EntitiesError

    builder = ElementTree.TreeBuilder()
    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = refuse
    parser.EntityDeclHandler = refuse
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    try:
        parser.Parse(content, True)
    except (expat.ExpatError, _EntitiesError, ValueError):
        return None
    return builder.close()


def _number(text: str | None) -> int | None:
    match = re.fullmatch(r"\s*(\d{1,12})\s*", text or "")
    return int(match[1]) if match else None


_PARSERS: Mapping[str, Callable[[bytes], Definition | None]] = {".vmx": _vmx, ".xml": _domain}


def body(found: Definition, datastore: str, name: str, disk_of: Callable[[str], str | None]) -> dict[str, Any]:
    """Returns the body of a `vm` record; `disk_of` returns the id of a file that the definition names."""
    fallback = os.path.splitext(os.path.basename(name))[0]
    body: dict[str, Any] = {
        "datastore": datastore,
        "file": name,
        "name": found.name or fallback,
        "system": found.system,
        "disks": [{"name": disk, "disk": disk_of(disk)} for disk in found.disks],
    }
    if found.memory is not None:
        body["memory"] = found.memory
    if found.processors is not None:
        body["processors"] = found.processors
    return body
