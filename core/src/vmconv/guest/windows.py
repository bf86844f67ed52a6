"""What a Windows guest needs to start: its drivers as its registry states them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib import import_module
from typing import Any

from vmconv.guest.facts import Service, System, cut
from vmconv.guest.filesystems import Filesystem
from vmconv.guest.volumes import Stream

REGISTRY = "pyregf"
"""The module of the library that reads hives."""

MAX_HIVE = 1 << 30

_CONFIG = "Windows/System32/config"
_HIBERNATED = (b"hibr", b"rstr")
"""Beginnings of `hiberfil.sys` while it holds memory, in lower case."""


class HiveError(Exception):
    """The registry does not have what each Windows has."""


def is_windows(filesystem: Filesystem) -> bool:
    """True if Windows is installed on a filesystem."""
    return filesystem.content == "ntfs" and filesystem.file(f"{_CONFIG}/SYSTEM") is not None


def examine(root: Filesystem, services: Iterable[str]) -> System:
    """Returns the facts of an installed Windows; raises `HiveError` if its registry is not one of a Windows."""
    hive = _hive(root, "SYSTEM")
    select = _key(hive, "Select")
    current = None if select is None else _number(select, "Current")
    if current is None:
        raise HiveError("its SYSTEM hive does not name the current control set")
    below = f"ControlSet{current:03d}\\Services"
    if _key(hive, below) is None:
        raise HiveError(f"its SYSTEM hive has no {below}")
    found = tuple(_services(root, hive, below, services))
    memory = root.file("hiberfil.sys")
    hibernated = memory is not None and memory.read(0, 4).lower() in _HIBERNATED
    return System("windows", root.where, _product(root), services=found, hibernated=hibernated)


def _hive(root: Filesystem, name: str) -> Any:
    file = root.file(f"{_CONFIG}/{name}")
    if file is None or file.size > MAX_HIVE:
        raise HiveError(f"its {name} hive is missing or too large")
    hive = import_module(REGISTRY).file()
    hive.open_file_object(Stream(file.read, file.size))
    return hive


def _services(root: Filesystem, hive: Any, below: str, services: Iterable[str]) -> Iterator[Service]:
    for name in services:
        key = _key(hive, f"{below}\\{name}")
        if key is not None:
            override = _key(hive, f"{below}\\{name}\\StartOverride")
            # The value "0" is for the hardware profile that all machines have now.
            over = None if override is None else _number(override, "0")
            yield Service(name, _number(key, "Start"), over, root.file(_image(key, name)) is not None)


def _image(key: Any, name: str) -> str:
    """Returns the path of a driver's file on the filesystem."""
    value = key.get_value_by_name("ImagePath")
    given = (value.get_data_as_string() or "") if value is not None else ""
    parts = [part for part in given.strip("\0").split("\\") if part] or ["System32", "drivers", f"{name}.sys"]
    # \SystemRoot\System32\drivers\x.sys, System32\drivers\x.sys, and \??\C:\Windows\System32\drivers\x.sys
    start = next((at for at, part in enumerate(parts) if part.lower() == "system32"), None)
    return "/".join(["Windows", *parts[start:]] if start is not None else parts)


def _product(root: Filesystem) -> str | None:
    """Returns the name of the edition; None if the registry does not state it."""
    try:
        key = _key(_hive(root, "SOFTWARE"), "Microsoft\\Windows NT\\CurrentVersion")
        value = None if key is None else key.get_value_by_name("ProductName")
        text = None if value is None else value.get_data_as_string()
    # It is for people only, and a damaged hive of programs does not keep Windows from starting.
    except (HiveError, OSError):
        return None
    return cut(text.strip("\0")) if text else None


def _key(hive: Any, path: str) -> Any:
    """Returns the key of a hive below its root; None if it does not exist."""
    key = hive.get_root_key()
    for name in path.split("\\"):
        if key is None:
            return None
        key = key.get_sub_key_by_name(name)
    return key


def _number(key: Any, name: str) -> int | None:
    value = key.get_value_by_name(name)
    data = None if value is None else value.get_data()
    return int.from_bytes(data, "little") if data is not None and len(data) == 4 else None
